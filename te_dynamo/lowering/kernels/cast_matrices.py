"""Casts a batch of matrices, the weights of experts, to FP8 with one scale for each row or one for all: as they are, transposed, or both in
one read.

Forward sums over columns and reads the matrices; dgrad sums over rows and reads the transposed copies. Both hold the same values, so in
dgrad the scale of a row is multiplied into the other operand.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from te_dynamo.lowering.fp8 import FLOAT32_MAX, FP8_MAX, power_of_2, quantize, row_amax, scale_of

# A row's amax must precede its cast: a program reads its rows twice, the second time from the L2 cache. 32 rows fill a sector of a
# transposed copy; with 4,096 columns, the rows of all programs that run at once fit in an H100's 50 MB.
BLOCK_ROWS, BLOCK_COLUMNS = 32, 256


@torch.library.custom_op("te_dynamo::cast_matrices", mutates_args=())
def cast_matrices(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype, power_of_2_scale: bool, data: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x: [E, N, K], of any strides -> (FP8 [E, N, K], FP8 [E, K, N], scale_inv f32 [E, N], amaxes f32 [blocks], the largest is the
    tensor's).

    scale: f32, 0-d, for the whole tensor; scale_inv is then empty. None: each row has its own, as in `granularity.Blocks`, except that
    the scale_inv of a row of zeros is 0. data, transposed: which of the first two to write; the other is empty.
    """
    if x.device.type != "cuda":
        return _reference(x, scale, dtype, power_of_2_scale, data, transposed)
    made = _empty(x, scale, dtype, data, transposed)
    launch(x, scale, power_of_2_scale, *made)
    return made


@cast_matrices.register_fake
def _(x, scale, dtype, power_of_2_scale, data, transposed):
    return _empty(x, scale, dtype, data, transposed)


def _empty(x: Tensor, scale: Tensor | None, dtype: torch.dtype, data: bool, transposed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    matrices, rows, columns = x.shape
    plain = x.new_empty(x.shape if data else (0, 0, 0), dtype=dtype)
    across = x.new_empty((matrices, columns, rows) if transposed else (0, 0, 0), dtype=dtype)
    by_row = (matrices, rows) if scale is None else (0, 0)
    return plain, across, x.new_empty(by_row, dtype=torch.float32), x.new_empty(_programs(x, scale), dtype=torch.float32)


def _programs(x: Tensor, scale: Tensor | None) -> Any:
    matrices, rows, columns = x.shape
    across = 1 if scale is None else (columns + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    return matrices * ((rows + BLOCK_ROWS - 1) // BLOCK_ROWS) * across


def _reference(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype, power_of_2_scale: bool, data: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition, for devices without Triton. Only the last amax is set, so that tests catch code that reads only the first."""
    by_row = row_amax(x)
    inverse = x.new_empty((0, 0), dtype=torch.float32)
    scales = scale
    if scales is None:
        scales = scale_of(by_row, dtype)
        scales = power_of_2(scales) if power_of_2_scale else scales
        inverse = scales.reciprocal().masked_fill(by_row.isinf(), torch.nan).masked_fill(by_row == 0, 0.0)
        scales = scales.unsqueeze(-1)
    values = quantize(x, scales, dtype)
    nothing = values.new_empty((0, 0, 0))
    amax = x.new_zeros(_programs(x, scale), dtype=torch.float32)
    if x.numel():
        amax[-1] = by_row.amax()
    across = values.transpose(1, 2).clone(memory_format=torch.contiguous_format) if transposed else nothing.clone()
    return values.contiguous() if data else nothing, across, inverse, amax


def launch(x: Tensor, scale: Tensor | None, power_of_2_scale: bool, plain: Tensor, across: Tensor, inverse: Tensor, amax: Tensor) -> None:
    """Runs the kernel, which fills the last four."""
    _, rows, columns = x.shape
    if x.numel():
        _kernel()[(_programs(x, scale),)](
            x,
            x if scale is None else scale,
            plain,
            across,
            inverse,
            amax,
            rows,
            columns,
            *x.stride(),
            TOP=FP8_MAX[plain.dtype],
            LARGEST=FLOAT32_MAX,
            BY_ROW=scale is None,
            POWER_OF_2=power_of_2_scale,
            PLAIN=bool(plain.numel()),
            ACROSS=bool(across.numel()),
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=8,
        )


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def cast_matrices_kernel(
        source,
        scale,
        plain,
        across,
        inverse,
        amax,
        rows,
        columns,
        from_matrix,
        from_row,
        from_column,
        TOP: tl.constexpr,
        LARGEST: tl.constexpr,
        BY_ROW: tl.constexpr,
        POWER_OF_2: tl.constexpr,
        PLAIN: tl.constexpr,
        ACROSS: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        program = tl.program_id(0)
        wide = tl.cdiv(columns, BLOCK_COLUMNS)
        if BY_ROW:  # all columns
            blocks, start, steps = 1, 0, wide
        else:  # a block of them
            blocks, start, steps = wide, program % wide * BLOCK_COLUMNS, 1
        high = tl.cdiv(rows, BLOCK_ROWS)
        matrix = (program // blocks // high).to(tl.int64)
        row = (program // blocks % high * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        source += matrix * from_matrix
        plain += matrix * rows * columns
        across += matrix * rows * columns
        peak = tl.zeros((BLOCK_ROWS,), tl.float32)
        if BY_ROW:
            for step in range(0, steps):
                column = step * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
                inside = (row[:, None] < rows) & (column[None, :] < columns)
                at = row[:, None] * from_row + column[None, :].to(tl.int64) * from_column
                values = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
                magnitude = tl.where(values == values, tl.abs(values), 0.0)  # a NaN does not count
                here = tl.max(magnitude, 1)
                peak = tl.where(here > peak, here, peak)
            usable = (peak > 0) & (peak < float("inf"))
            factor = tl.div_rn(tl.full((BLOCK_ROWS,), TOP, tl.float32), tl.where(usable, peak, 1.0))
            factor = tl.where(usable, tl.where(factor > LARGEST, LARGEST, factor), 1.0)
            if POWER_OF_2:
                factor = (factor.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            undone = tl.div_rn(tl.full((BLOCK_ROWS,), 1.0, tl.float32), factor)
            undone = tl.where(peak == 0, 0.0, tl.where(peak == float("inf"), float("nan"), undone))
            tl.store(inverse + matrix * rows + row, undone, mask=row < rows)
            factor = factor[:, None]
        else:
            factor = tl.load(scale)
        # Backwards, as the columns that were read last are still near.
        for step in range(0, steps):
            column = start + (steps - 1 - step) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            inside = (row[:, None] < rows) & (column[None, :] < columns)
            at = row[:, None] * from_row + column[None, :].to(tl.int64) * from_column
            values = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
            if not BY_ROW:
                peak = tl.max(tl.where(values == values, tl.abs(values), 0.0), 1)
            scaled = values * factor
            # Not clamp, which is a min and a max, here or above: see `cast_transpose`.
            scaled = tl.where(scaled > TOP, TOP, scaled)
            scaled = tl.where(scaled < -TOP, -TOP, scaled).to(plain.dtype.element_ty)
            if PLAIN:
                tl.store(plain + row[:, None] * columns + column[None, :], scaled, mask=inside)
            if ACROSS:
                target = across + column[:, None].to(tl.int64) * rows + row[None, :]
                tl.store(target, tl.trans(scaled), mask=tl.trans(inside))
        tl.store(amax + program, tl.max(peak, 0))

    return cast_matrices_kernel
