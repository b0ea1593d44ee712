"""An FP8 matrix, its transposed copy and its amax, in one read of the high-precision one.

Hopper's FP8 GEMM takes both operands with the summed dimension innermost, so gradients and weights are needed both ways.
Inductor writes a transposed copy in a separate pass, or with scattered stores in a row reduction. The kernel has no min or
max: next to one, Triton has been seen to corrupt transposed FP8 stores (its issue 11111).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from te_dynamo.lowering.fp8 import FP8_MAX, quantize, row_amax

BLOCK_ROWS, BLOCK_COLUMNS = 64, 128


@torch.library.custom_op("te_dynamo::cast_transpose", mutates_args=())
def cast_transpose(
    parts: list[Tensor], scale: Tensor, dtype: torch.dtype, interleave: int, data: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """parts: [N_i, C] of one dtype; scale: f32, 0-d -> (FP8 [N, C], FP8 [C, N], amaxes f32 [blocks], the largest is the tensor's).

    N: sum of N_i. interleave: 0, or the head size: the rows of the parts then alternate head by head. data, transposed:
    which of the two to write; the other is empty. One kernel for each part: one read, and one write for each result.
    """
    if parts[0].device.type != "cuda":
        return _reference(parts, scale, dtype, interleave, data, transposed)
    plain, across, amax = _empty(parts, dtype, data, transposed)
    launch(parts, scale, plain, across, amax, interleave)
    return plain, across, amax


@cast_transpose.register_fake
def _(parts, scale, dtype, interleave, data, transposed):
    return _empty(parts, dtype, data, transposed)


def _empty(parts: Sequence[Tensor], dtype: torch.dtype, data: bool, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = sum(p.shape[0] for p in parts), parts[0].shape[1]
    plain = parts[0].new_empty((rows, columns) if data else (0, 0), dtype=dtype)
    across = parts[0].new_empty((columns, rows) if transposed else (0, 0), dtype=dtype)
    return plain, across, parts[0].new_empty(sum(_blocks(p) for p in parts), dtype=torch.float32)


def _blocks(part: Tensor) -> Any:
    rows, columns = part.shape
    return ((rows + BLOCK_ROWS - 1) // BLOCK_ROWS) * ((columns + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS)


def _reference(
    parts: Sequence[Tensor], scale: Tensor, dtype: torch.dtype, interleave: int, data: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, for devices without Triton. Only the last amax is set, so that tests catch code that reads only the first."""
    whole = torch.cat(list(parts)) if not interleave else torch.stack([p.unflatten(0, (-1, interleave)) for p in parts], 1).flatten(0, 2)
    q, nothing = quantize(whole, scale, dtype), whole.new_empty((0, 0), dtype=dtype)
    amax = whole.new_zeros(sum(_blocks(p) for p in parts), dtype=torch.float32)
    if whole.numel():
        amax[-1] = row_amax(whole).amax()
    across = q.t().clone(memory_format=torch.contiguous_format) if transposed else nothing.clone()
    return q if data else nothing, across, amax


def launch(parts: Sequence[Tensor], scale: Tensor, plain: Tensor, across: Tensor, amax: Tensor, interleave: int) -> None:
    """Runs the kernel for each part. Row r of a part is row r // group * pitch + offset + r % group of the whole."""
    rows = sum(p.shape[0] for p in parts)
    start = blocks = 0
    for i, part in enumerate(parts):
        n, columns = part.shape
        group, pitch, offset = (interleave, len(parts) * interleave, i * interleave) if interleave else (max(n, 1), 0, start)
        if part.numel():
            _kernel()[(_blocks(part),)](
                part.contiguous(),
                scale,
                plain,
                across,
                amax[blocks:],
                n,
                columns,
                rows,
                group,
                pitch,
                offset,
                TOP=FP8_MAX[plain.dtype],
                PLAIN=bool(plain.numel()),
                ACROSS=bool(across.numel()),
                BLOCK_ROWS=BLOCK_ROWS,
                BLOCK_COLUMNS=BLOCK_COLUMNS,
                num_warps=8,
            )
        start, blocks = start + n, blocks + _blocks(part)


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def cast_transpose_kernel(
        source,
        scale,
        plain,
        across,
        amax,
        rows,
        columns,
        rows_of_whole,
        group,
        pitch,
        offset,
        TOP: tl.constexpr,
        PLAIN: tl.constexpr,
        ACROSS: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        block = tl.program_id(0)
        wide = tl.cdiv(columns, BLOCK_COLUMNS)
        row = block // wide * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        column = block % wide * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        at = row[:, None].to(tl.int64) * columns + column[None, :]
        values = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        magnitude = tl.where(values == values, tl.abs(values), 0.0)  # a NaN does not count
        tl.store(amax + block, tl.max(tl.max(magnitude, 1), 0))
        scaled = values * tl.load(scale)
        # Not clamp, which is a min and a max: see above.
        scaled = tl.where(scaled > TOP, TOP, scaled)
        scaled = tl.where(scaled < -TOP, -TOP, scaled)
        place = row // group * pitch + offset + row % group
        if PLAIN:
            target = plain + place[:, None].to(tl.int64) * columns + column[None, :]
            tl.store(target, scaled.to(plain.dtype.element_ty), mask=inside)
        if ACROSS:
            target = across + column[:, None].to(tl.int64) * rows_of_whole + place[None, :]
            tl.store(target, tl.trans(scaled.to(across.dtype.element_ty)), mask=tl.trans(inside))

    return cast_transpose_kernel
