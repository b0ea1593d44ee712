"""The kernels of `refresh`. Imported where they are launched: Triton is not needed elsewhere.

gemms int64 [G, 13], parts int64 [P, 10], ranges f32 [G, 2]: see `refresh`. The tables hold the addresses of weights, copies and
samples.
"""

import triton
import triton.language as tl

from te_dynamo.lowering import fp8
from te_dynamo.lowering.kernels import refresh

BLOCK_ROWS, BLOCK_COLUMNS = tl.constexpr(32), tl.constexpr(128)
GEMM, PART = tl.constexpr(13), tl.constexpr(10)  # fields of a row
SAMPLES, SLICES = tl.constexpr(refresh.SAMPLES), tl.constexpr(refresh.SLICES)
TOP, LARGEST, EXPONENT = tl.constexpr(fp8.FP8_MAX[fp8.E4M3]), tl.constexpr(fp8.FLOAT32_MAX), tl.constexpr(fp8.EXPONENT)


@triton.jit
def values(address, dtype, start, at, inside):
    """As float32. dtype: 0 float32, 1 bfloat16, 2 float16; start: in elements from the address; at: int32, from there."""
    if dtype == 0:
        x = tl.load(address.to(tl.pointer_type(tl.float32)) + start + at, mask=inside, other=0.0)
    elif dtype == 1:
        x = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + start + at, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(address.to(tl.pointer_type(tl.float16)) + start + at, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def tile(part, first_row, first_column):
    """(float32 [BLOCK_ROWS, BLOCK_COLUMNS] of a weight, 0 outside of it; rows, columns; where it is inside)."""
    address, dtype = tl.load(part), tl.load(part + 1)
    rows, columns = tl.load(part + 2), tl.load(part + 3)
    row_stride, column_stride = tl.load(part + 4), tl.load(part + 5)
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    inside = (row[:, None] < rows - first_row) & (column[None, :] < columns - first_column)
    at = row[:, None] * row_stride.to(tl.int32) + column[None, :] * column_stride.to(tl.int32)
    x = values(address, dtype, first_row * row_stride + first_column * column_stride, at, inside)
    return x, first_row + row, first_column + column, inside


@triton.jit
def magnitude(x):
    return tl.where(x == x, tl.abs(x), 0.0)  # a NaN does not count


@triton.jit
def scale_of(amax, range_top, epsilon, power_of_2):
    """`lowering.fp8.Casting.scale_of`."""
    amax = tl.where(amax < epsilon, epsilon, amax)
    scale = tl.div_rn(amax * 0.0 + range_top, amax)
    scale = tl.where(scale > LARGEST, LARGEST, scale)
    scale = tl.where((amax > 0) & (amax < float("inf")), scale, 1.0)
    cut = (scale.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
    return tl.where(power_of_2 != 0, cut, scale)


@triton.jit
def sampled(parts, offsets, part):
    """The bits of a weight's samples: int32 [SAMPLES]."""
    at = tl.load(offsets + part * SAMPLES + tl.arange(0, SAMPLES))
    address = tl.load(parts + part * PART)
    if tl.load(parts + part * PART + 1) == 0:
        bits = tl.load(address.to(tl.pointer_type(tl.int32)) + at)
    else:
        bits = tl.load(address.to(tl.pointer_type(tl.int16)) + at).to(tl.int32)
    return bits


@triton.jit
def last_samples(parts, part):
    """Pointers to the samples that were recorded last."""
    return tl.load(parts + part * PART + 9).to(tl.pointer_type(tl.int32)) + tl.arange(0, SAMPLES)


@triton.jit
def look_kernel(gemms, parts, offsets, amaxes, changed, RECORD: tl.constexpr):
    """One program for each slice of each GEMM: checks whether a sample of the weights changed and, if so, measures its slice of a weight
    with one scale."""
    gemm, piece = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES
    row = gemms + gemm * GEMM
    first, count, by_row = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    differs = tl.zeros((SAMPLES,), tl.int32)
    for part in range(first, first + count):
        now = sampled(parts, offsets, part)
        if RECORD:
            if piece == 0:
                tl.store(last_samples(parts, part), now)
        else:
            differs |= (now != tl.load(last_samples(parts, part))).to(tl.int32)
    any_differs = tl.max(differs, 0)
    if piece == 0:
        tl.store(changed + gemm, any_differs)
    if (any_differs != 0) & (by_row == 0):
        peak = tl.zeros((BLOCK_ROWS,), tl.float32)
        for part in range(first, first + count):
            at = parts + part * PART
            across = tl.cdiv(tl.load(at + 3), BLOCK_COLUMNS)
            for number in range(piece, tl.cdiv(tl.load(at + 2), BLOCK_ROWS) * across, SLICES):
                x, _, _, _ = tile(at, number // across * BLOCK_ROWS, number % across * BLOCK_COLUMNS)
                of_rows = tl.max(magnitude(x), 1)
                peak = tl.where(of_rows > peak, of_rows, peak)
        tl.store(amaxes + gemm * SLICES + piece, tl.max(peak, 0))


@triton.jit
def quantized(x, scale):
    scaled = x * scale
    # No clamp, which is a min and a max: see `cast_transpose`.
    scaled = tl.where(scaled > TOP, TOP, scaled)
    return tl.where(scaled < -TOP, -TOP, scaled).to(tl.float8e4nv)


@triton.jit
def store(gemm, place, column, inside, x8):
    """A tile to the copy, and transposed where there is such a copy. place [BLOCK_ROWS]: its rows there."""
    address, row_stride, column_stride = tl.load(gemm + 3), tl.load(gemm + 4), tl.load(gemm + 5)
    at = place[:, None] * row_stride + column[None, :] * column_stride
    tl.store(address.to(tl.pointer_type(tl.float8e4nv)) + at, x8, mask=inside)
    address, row_stride, column_stride = tl.load(gemm + 6), tl.load(gemm + 7), tl.load(gemm + 8)
    if address != 0:
        across = column[:, None] * row_stride + place[None, :] * column_stride
        tl.store(address.to(tl.pointer_type(tl.float8e4nv)) + across, tl.trans(x8), mask=tl.trans(inside))


@triton.jit
def store_scalar(address, value):
    if address != 0:
        tl.store(address.to(tl.pointer_type(tl.float32)), value)


@triton.jit
def placed(part, row):
    """The row of the GEMM's operand that holds a row of the weight."""
    group, pitch, offset = tl.load(part + 6), tl.load(part + 7), tl.load(part + 8)
    return row // group * pitch + offset + row % group


@triton.jit
def write_by_tensor(gemm, at, parts, peaks, range_top, epsilon, program, programs):
    first, count, power_of_2 = tl.load(gemm), tl.load(gemm + 1), tl.load(gemm + 12)
    peak = tl.max(tl.load(peaks + tl.arange(0, SLICES)), 0)
    scale = scale_of(peak, range_top, epsilon, power_of_2)
    if program == at % programs:
        store_scalar(tl.load(gemm + 9), tl.div_rn(1.0, scale))
        store_scalar(tl.load(gemm + 10), scale)
        store_scalar(tl.load(gemm + 11), peak)
    for number in range(first, first + count):
        part = parts + number * PART
        across = tl.cdiv(tl.load(part + 3), BLOCK_COLUMNS)
        for block in range(program, tl.cdiv(tl.load(part + 2), BLOCK_ROWS) * across, programs):
            x, row, column, inside = tile(part, block // across * BLOCK_ROWS, block % across * BLOCK_COLUMNS)
            store(gemm, placed(part, row), column, inside, quantized(x, scale))


@triton.jit
def write_by_row(gemm, parts, range_top, epsilon, program, programs):
    first, count, power_of_2 = tl.load(gemm), tl.load(gemm + 1), tl.load(gemm + 12)
    for number in range(first, first + count):
        part = parts + number * PART
        rows, columns = tl.load(part + 2), tl.load(part + 3)
        for block in range(program, tl.cdiv(rows, BLOCK_ROWS), programs):
            peak = tl.zeros((BLOCK_ROWS,), tl.float32)
            for start in range(0, columns, BLOCK_COLUMNS):
                x, _, _, _ = tile(part, block * BLOCK_ROWS, start)
                of_rows = tl.max(magnitude(x), 1)
                peak = tl.where(of_rows > peak, of_rows, peak)
            scale = scale_of(peak, range_top, epsilon, power_of_2)
            row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            place = placed(part, row)
            inverse = tl.where(peak < float("inf"), tl.div_rn(tl.full((BLOCK_ROWS,), 1.0, tl.float32), scale), float("nan"))
            tl.store(tl.load(gemm + 9).to(tl.pointer_type(tl.float32)) + place, inverse, mask=row < rows)
            for start in range(0, columns, BLOCK_COLUMNS):
                x, _, column, inside = tile(part, block * BLOCK_ROWS, start)
                store(gemm, place, column, inside, quantized(x, scale[:, None]))


@triton.jit
def write_kernel(gemms, ranges, parts, offsets, amaxes, changed, count, COUNT: tl.constexpr):
    """Persistent programs: each quantizes its share of every GEMM whose weights changed, and exits at once if there is none.

    COUNT: `count` GEMMs, rounded up to a power of two.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    everyone = tl.arange(0, COUNT)
    if tl.max(tl.load(changed + everyone, mask=everyone < count, other=0), 0) != 0:
        for at in range(0, count):
            if tl.load(changed + at) != 0:
                gemm = gemms + at * GEMM
                range_top, epsilon = tl.load(ranges + 2 * at), tl.load(ranges + 2 * at + 1)
                if tl.load(gemm + 2) == 0:
                    write_by_tensor(gemm, at, parts, amaxes + at * SLICES, range_top, epsilon, program, programs)
                else:
                    write_by_row(gemm, parts, range_top, epsilon, program, programs)
                if program == at % programs:
                    first = tl.load(gemm)
                    for part in range(first, first + tl.load(gemm + 1)):
                        tl.store(last_samples(parts, part), sampled(parts, offsets, part))
