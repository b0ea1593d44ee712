"""What kernels that write an FP8 matrix both ways have in common. Imported only by them: Triton is not needed elsewhere."""

import triton
import triton.language as tl


@triton.jit
def place(block_row, block_column, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The rows and columns of a tile of a matrix [rows, width], and a mask of the elements inside the matrix."""
    row = block_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = block_column * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return row, column, (row[:, None] < rows) & (column[None, :] < width)


@triton.jit
def write_both(
    values, scale, data, across, amaxes, sums, tile, block_row, row, column, width, total, columns,
    TOP: tl.constexpr, DATA: tl.constexpr, ACROSS: tl.constexpr, SUMS: tl.constexpr, SATURATE: tl.constexpr,
):  # fmt: skip
    """Writes a tile of values, 0 outside of the matrix: its cast, both ways, its amax and its column sums. column: in the whole matrix;
    width: where the tile's part ends. No min, max or clamp of values: see `cast_transpose.py`."""
    magnitude = tl.where(values == values, tl.abs(values), 0.0)  # a NaN does not count
    tl.store(amaxes + tile, tl.max(tl.max(magnitude, 1), 0))
    scaled = values * scale
    scaled = tl.where(scaled > TOP, TOP, scaled)
    scaled = tl.where(scaled < -TOP, -TOP, scaled)
    if not SATURATE:
        scaled = tl.where(magnitude == float("inf"), float("nan"), scaled)
    there = (row[:, None] < total) & (column[None, :] < width)
    if DATA:
        target = data + row[:, None].to(tl.int64) * columns + column[None, :]
        tl.store(target, scaled.to(data.dtype.element_ty), mask=there)
    if ACROSS:
        target = across + column[:, None].to(tl.int64) * total + row[None, :]
        tl.store(target, tl.trans(scaled.to(across.dtype.element_ty)), mask=tl.trans(there))
    if SUMS:
        tl.store(sums + block_row.to(tl.int64) * columns + column, tl.sum(values, 0), mask=column < width)


@triton.jit
def cast_both_kernel(
    x, scale, data, across, amaxes, sums, rows, total, width, pitch,
    TOP: tl.constexpr, DATA: tl.constexpr, SUMS: tl.constexpr, SATURATE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    wide = tl.cdiv(width, BLOCK_COLUMNS)
    row, column, inside = place(tile // wide, tile % wide, rows, width, BLOCK_ROWS, BLOCK_COLUMNS)
    values = tl.load(x + row[:, None].to(tl.int64) * pitch + column[None, :], mask=inside, other=0.0).to(tl.float32)
    write_both(
        values, tl.load(scale), data, across, amaxes, sums, tile, tile // wide, row, column, width, total, width,
        TOP, DATA, True, SUMS, SATURATE,
    )  # fmt: skip
