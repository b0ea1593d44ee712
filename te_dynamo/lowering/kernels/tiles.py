"""How kernels that write an FP8 matrix both ways divide it: into tiles, one to a program, each with an amax of its own.

The matrix [rows, columns] consists of parts side by side (dgate and dup; dQ, dK and dV), and no tile has two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from te_dynamo.lowering.fp8 import Casting, amax

BLOCK_ROWS, BLOCK_COLUMNS = 64, 64


class Both(NamedTuple):
    """data: FP8 [rows, columns]; transposed: FP8 [columns, rows]; amaxes: f32 [tiles], the largest is the matrix's; sums: f32
    [blocks of rows, columns], of the values before the cast: their sum is that of all rows. Empty where not wanted."""

    data: Tensor
    transposed: Tensor
    amaxes: Tensor
    sums: Tensor


def blocks(size: Any, block: int) -> Any:
    return (size + block - 1) // block


def padded(rows: Any, multiple: int) -> Any:
    return blocks(rows, multiple) * multiple


def empty_both(
    like: Tensor, rows: Any, widths: Sequence[int], dtype: torch.dtype, multiple: int, data: bool, transposed: bool, sums: bool
) -> Both:
    """rows are padded to `multiple`; widths: the columns of each part."""
    total, columns = padded(rows, multiple), sum(widths)
    down, across = blocks(total, BLOCK_ROWS), sum(blocks(w, BLOCK_COLUMNS) for w in widths)
    return Both(
        like.new_empty((total, columns) if data else (0, 0), dtype=dtype),
        like.new_empty((columns, total) if transposed else (0, 0), dtype=dtype),
        like.new_empty(down * across, dtype=torch.float32),
        like.new_empty((down, columns) if sums else (0, 0), dtype=torch.float32),
    )


def cast(values: Tensor, scale: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    """As the kernels do. saturate: infinities become the largest number, not NaN."""
    return Casting(saturates_infinite=saturate).saturated(values, scale, dtype).to(dtype)


def fill_both(both: Both, values: Tensor, quantized: Tensor) -> None:
    """The definition, for devices without Triton: of `values` [rows, columns] in float32, and what their cast gives. Only the first amax
    and the first sums are set."""
    rows = values.shape[0]
    for target, made in ((both.data, quantized), (both.transposed.t(), quantized)):
        if target.numel():
            target.zero_()
            target[:rows] = made
    both.amaxes.zero_()
    both.amaxes[:1] = amax(values)
    if both.sums.numel():
        both.sums.zero_()
        both.sums[:1] = values.sum(0)
