"""The kernels of `te_dynamo::activation` and `te_dynamo::activation_gradient`. Imported where they are launched: Triton is not
needed elsewhere.

All is computed in float32 and rounded once, to FP8.
"""

import triton
import triton.language as tl

from te_dynamo.lowering import fp8
from te_dynamo.lowering.kernels.tiles_triton import place, write_both

E4M3_MAX, LEAST = tl.constexpr(fp8.FP8_MAX[fp8.E4M3]), tl.constexpr(fp8.LEAST_AMAX)


@triton.jit
def value_and_slope(x, alpha, FUNCTION: tl.constexpr):
    """f(x) and f'(x), in float32. alpha: of a SiLU, `x * sigmoid(alpha * x)`."""
    if FUNCTION == "relu" or FUNCTION == "relu_squared":
        slope = tl.where(x <= 0.0, 0.0, 1.0)
        value = tl.where(x <= 0.0, 0.0, x)
        if FUNCTION == "relu_squared":
            slope = 2.0 * value
            value = value * value
    elif FUNCTION == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
        value = x * below
    elif FUNCTION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        value = x * s
        slope = s + value * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif FUNCTION == "mish":
        e = tl.exp(tl.where(x > 20.0, 20.0, x))
        t = e * (e + 2.0) / (e * (e + 2.0) + 2.0)  # tanh(log(1 + e))
        value = x * t
        slope = t + x * tl.sigmoid(x) * (1.0 - t * t)
    elif FUNCTION == "sigmoid":
        value = tl.sigmoid(x)
        slope = value * (1.0 - value)
    else:
        s = tl.sigmoid(alpha * x)
        value = x * s
        slope = s + alpha * value * (1.0 - s)
    return value, slope


@triton.jit
def within(x, limit, LOWER: tl.constexpr):
    """x limited to [-limit, limit], or above alone; 1 where a gradient passes, else 0."""
    passes = tl.where(x > limit, 0.0, 1.0)
    x = tl.where(x > limit, limit, x)
    if LOWER:
        passes = tl.where(x < -limit, 0.0, passes)
        x = tl.where(x < -limit, -limit, x)
    return x, passes


@triton.jit
def keep(values, kept, scale_inv, part, rows, width, wide, row, column, block, inside):
    """Writes a tile of a matrix that backward reads: see `tiles.KeptInputs`."""
    magnitude = tl.where(values == values, tl.abs(values), 0.0)  # a NaN does not count
    largest = tl.max(magnitude, 1)
    scale = tl.where(largest > LEAST, E4M3_MAX / largest, 1.0)
    down = part * rows.to(tl.int64) + row
    tl.store(scale_inv + down * wide + block, tl.where(largest > LEAST, largest / E4M3_MAX, 1.0), mask=row < rows)
    tl.store(kept + down[:, None] * width + column[None, :], (values * scale[:, None]).to(kept.dtype.element_ty), mask=inside)


@triton.jit
def kept_or_not(x, scale_inv, pitch, part, rows, wide, row, column, block, inside, KEPT: tl.constexpr):
    """A tile of an input, in float32."""
    values = tl.load(x + row[:, None].to(tl.int64) * pitch + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if KEPT:
        down = part * rows.to(tl.int64) + row
        values = values * tl.load(scale_inv + down * wide + block, mask=row < rows, other=0.0)[:, None]
    return values


@triton.jit
def activation_kernel(
    x, up, scale_inv, scale, data, across, amaxes, keeping, keeping_inv, rows, total, width, x_pitch, up_pitch, alpha, limit,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, LIMITED: tl.constexpr, KEPT: tl.constexpr, KEEPS: tl.constexpr, TOP: tl.constexpr,
    DATA: tl.constexpr, ACROSS: tl.constexpr, SATURATE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    wide = tl.cdiv(width, BLOCK_COLUMNS)
    row, column, inside = place(tile // wide, tile % wide, rows, width, BLOCK_ROWS, BLOCK_COLUMNS)
    gate = kept_or_not(x, scale_inv, x_pitch, 0, rows, wide, row, column, tile % wide, inside, KEPT)
    if KEEPS:
        keep(gate, keeping, keeping_inv, 0, rows, width, wide, row, column, tile % wide, inside)
    if LIMITED:
        gate, _ = within(gate, limit, False)
    values, _ = value_and_slope(gate, alpha, FUNCTION)
    if GATED:
        factor = kept_or_not(up, scale_inv, up_pitch, 1, rows, wide, row, column, tile % wide, inside, KEPT)
        if KEEPS:
            keep(factor, keeping, keeping_inv, 1, rows, width, wide, row, column, tile % wide, inside)
        if LIMITED:
            factor, _ = within(factor, limit, True)
            factor += 1.0
        values = values * factor
    values = tl.where(inside, values, 0.0)
    write_both(
        values, tl.load(scale), data, across, amaxes, amaxes, tile, tile // wide, row, column, width, total, width,
        TOP, DATA, ACROSS, False, SATURATE,
    )  # fmt: skip


@triton.jit
def activation_gradient_kernel(
    grad, x, up, scale_inv, scale, data, across, amaxes, sums, rows, total, width, columns, x_at, up_at, x_pitch, up_pitch, alpha, limit,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, LIMITED: tl.constexpr, KEPT: tl.constexpr, TOP: tl.constexpr, DATA: tl.constexpr,
    ACROSS: tl.constexpr, SUMS: tl.constexpr, SATURATE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    wide = tl.cdiv(width, BLOCK_COLUMNS)
    row, column, inside = place(tile // wide, tile % wide, rows, width, BLOCK_ROWS, BLOCK_COLUMNS)
    g = tl.load(grad + row[:, None].to(tl.int64) * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    gate = kept_or_not(x, scale_inv, x_pitch, 0, rows, wide, row, column, tile % wide, inside, KEPT)
    passes = 1.0
    if LIMITED:
        gate, passes = within(gate, limit, False)
    value, slope = value_and_slope(gate, alpha, FUNCTION)
    by = tl.load(scale)
    if GATED:
        factor = kept_or_not(up, scale_inv, up_pitch, 1, rows, wide, row, column, tile % wide, inside, KEPT)
        through = 1.0
        if LIMITED:
            factor, through = within(factor, limit, True)
            factor += 1.0
        d_up = tl.where(inside, g * value * through, 0.0)
        write_both(
            d_up, by, data, across, amaxes, sums, tile + tl.num_programs(0), tile // wide, row, up_at + column, up_at + width, total,
            columns, TOP, DATA, ACROSS, SUMS, SATURATE,
        )  # fmt: skip
        g = g * factor
    d_x = tl.where(inside, g * slope * passes, 0.0)
    write_both(
        d_x, by, data, across, amaxes, sums, tile, tile // wide, row, x_at + column, x_at + width, total, columns,
        TOP, DATA, ACROSS, SUMS, SATURATE,
    )  # fmt: skip
