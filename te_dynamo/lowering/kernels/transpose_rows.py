"""The transposed copy of an FP8 matrix, with its rows reordered and gaps between them: the operand of a GEMM that sums over the tokens of
each expert separately."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

BLOCK = 128


@torch.library.custom_op("te_dynamo::transpose_rows", mutates_args=())
def transpose_rows(x: Tensor, rows: Tensor, factor: Tensor | None) -> Tensor:
    """x: FP8 [T, C], contiguous; rows: int32 [P] -> FP8 [C, P], contiguous: column p is row rows[p] of x, zeros where that is negative.

    factor: f32 [P], at most 1, multiplies column p; powers of two leave all but the smallest numbers exact.
    """
    return launch(x, rows, factor) if x.device.type == "cuda" else _reference(x, rows, factor)


@transpose_rows.register_fake
def _(x, rows, factor):
    return x.new_empty(x.shape[1], rows.shape[0])


def _reference(x: Tensor, rows: Tensor, factor: Tensor | None) -> Tensor:
    """The definition, for devices without Triton."""
    if not x.shape[0]:
        return x.new_zeros(x.shape[1], rows.shape[0], dtype=torch.float32).to(x.dtype)
    taken = x.float()[rows.long().clamp(min=0)]
    taken = taken if factor is None else taken * factor.unsqueeze(1)
    return taken.masked_fill((rows < 0).unsqueeze(1), 0).t().contiguous().to(x.dtype)


def launch(x: Tensor, rows: Tensor, factor: Tensor | None) -> Tensor:
    columns, places = x.shape[1], rows.shape[0]
    out = x.new_empty(columns, places)
    if out.numel():
        # As raw bytes where nothing is multiplied
        source, target = (x, out) if factor is not None else (x.view(torch.uint8), out.view(torch.uint8))
        blocks = -(-places // BLOCK) * -(-columns // BLOCK)
        multiply = factor is not None
        _kernel()[(blocks,)](source, rows, factor if multiply else rows, target, places, columns, multiply, BLOCK, num_warps=8)
    return out


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def transpose_rows_kernel(source, rows, factor, target, places, columns, MULTIPLY: tl.constexpr, BLOCK: tl.constexpr):
        block = tl.program_id(0).to(tl.int64)
        across = tl.cdiv(columns, BLOCK)
        place = block // across * BLOCK + tl.arange(0, BLOCK)
        column = block % across * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(rows + place, mask=place < places, other=-1).to(tl.int64)
        inside = (row[:, None] >= 0) & (column[None, :] < columns)
        at = source + row[:, None] * columns + column[None, :]
        if MULTIPLY:
            multiple = tl.load(factor + place, mask=place < places, other=0.0)
            values = tl.load(at, mask=inside).to(tl.float32) * multiple[:, None]
            values = tl.where(inside, values, 0.0).to(target.dtype.element_ty)
        else:
            values = tl.load(at, mask=inside, other=0)
        filled = (column[:, None] < columns) & (place[None, :] < places)
        tl.store(target + column[:, None] * places + place[None, :], tl.trans(values), mask=filled)

    return transpose_rows_kernel
