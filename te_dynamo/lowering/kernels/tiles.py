"""How kernels that write an FP8 matrix both ways (as it is and transposed) divide it: into tiles, one per program, each with its own amax.

The matrix [rows, columns] consists of parts side by side (dgate and dup; dQ, dK and dV), and no tile spans two parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from te_dynamo.lowering.fp8 import E4M3, FP8_MAX, LEAST_AMAX, Casting, amax

BLOCK_ROWS, BLOCK_COLUMNS = 64, 64


class Both(NamedTuple):
    """data: FP8 [rows, columns]; transposed: FP8 [columns, rows]; amaxes: f32 [tiles], the largest is the matrix's; sums: f32 [blocks of
    rows, columns], the column sums of each block of rows before the cast. Empty if not wanted."""

    data: Tensor
    transposed: Tensor
    amaxes: Tensor
    sums: Tensor

    def constants(self, saturate: bool) -> dict[str, Any]:
        """The constants of every kernel that writes these. saturate: see `cast`."""
        blocks = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS, "num_warps": 8}
        return {"TOP": FP8_MAX[self.data.dtype], "DATA": bool(self.data.numel()), "SATURATE": saturate, **blocks}


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


class KeptInputs(NamedTuple):
    """Matrices [rows, columns] that backward reads, kept in FP8; empty if none is kept.

    data: E4M3 [parts, rows, columns]; scale_inv: f32 [parts, rows, blocks], one for each row of a tile.
    """

    data: Tensor
    scale_inv: Tensor

    def part(self, i: int) -> Tensor:
        """Matrix i, dequantized: f32 [rows, columns]."""
        data, columns = self.data[i].float(), self.data.shape[2]
        return data * self.scale_inv[i].repeat_interleave(BLOCK_COLUMNS, 1)[:, :columns]


def empty_kept(like: Tensor, parts: int, rows: Any, columns: Any) -> KeptInputs:
    return KeptInputs(
        like.new_empty((parts, rows, columns), dtype=E4M3),
        like.new_empty((parts, rows, blocks(columns, BLOCK_COLUMNS)), dtype=torch.float32),
    )


def fill_kept(kept: KeptInputs, parts: Sequence[Tensor]) -> None:
    """The definition. NaN stays NaN and counts towards no amax; an infinity leaves no finite value in its row of a tile."""
    for data, scale_inv, part in zip(kept.data, kept.scale_inv, parts, strict=True):
        columns = part.shape[1]
        tiles = torch.nn.functional.pad(part.float(), (0, -columns % BLOCK_COLUMNS)).unflatten(1, (-1, BLOCK_COLUMNS))
        largest = torch.where(tiles.isnan(), 0.0, tiles.abs()).amax(2, keepdim=True)
        scale = torch.where(largest > LEAST_AMAX, torch.full_like(largest, FP8_MAX[E4M3]) / largest, 1.0)  # as in `fp8.scale_of`
        data.copy_((tiles * scale).to(E4M3).flatten(1)[:, :columns])
        scale_inv.copy_((torch.where(largest > LEAST_AMAX, largest / FP8_MAX[E4M3], 1.0)).squeeze(2))


def fill_both(both: Both, values: Tensor, quantized: Tensor) -> None:
    """The definition, for devices without Triton, from `values` [rows, columns] in float32 and their cast. Only the last amax and the last
    sums are set, so that tests catch code that reads only the first."""
    rows = values.shape[0]
    for target, made in ((both.data, quantized), (both.transposed.t(), quantized)):
        if target.numel():
            target.zero_()
            target[:rows] = made
    both.amaxes.zero_()
    both.amaxes[-1:] = amax(values)
    if both.sums.numel():
        both.sums.zero_()
        both.sums[-1:] = values.sum(0)
