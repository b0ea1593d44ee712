"""The kernel of `te_dynamo::qkv_gradient`. Imported where it is launched: Triton is not needed elsewhere."""

import triton
import triton.language as tl

from te_dynamo.lowering.kernels.tiles_triton import place, write_both


@triton.jit
def part(
    grad, cos, sin, scale, data, across, amaxes, sums, tile, block_row, block_column, rows, total, columns, tokens, width, start, turned,
    gb, gh, gs, cb, cs, nb, ns,
    D: tl.constexpr, ROTARY: tl.constexpr, COS_PAIRS: tl.constexpr, SIN_PAIRS: tl.constexpr, TOP: tl.constexpr, DATA: tl.constexpr,
    ACROSS: tl.constexpr, SUMS: tl.constexpr, SATURATE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of one of q, k and v. turned: how many features of a head RoPE rotates."""
    row, column, inside = place(block_row, block_column, rows, width, BLOCK_ROWS, BLOCK_COLUMNS)
    b, s = (row // tokens).to(tl.int64)[:, None], (row % tokens).to(tl.int64)[:, None]
    h, d = (column // D).to(tl.int64)[None, :], (column % D)[None, :]
    head = grad + b * gb + s * gs + h * gh
    values = tl.load(head + d, mask=inside, other=0.0).to(tl.float32)
    if ROTARY:
        half = turned // 2
        if ROTARY == 2:
            partner, leads, pair = d ^ 1, d % 2 == 0, d // 2
        else:
            partner, leads, pair = tl.where(d < half, d + half, d - half), d < half, tl.where(d < half, d, d - half)
        turns = inside & (d < turned)
        other = tl.load(head + partner, mask=turns, other=0.0).to(tl.float32)
        c = tl.load(cos + b * cb + s * cs + (pair if COS_PAIRS else d), mask=turns, other=1.0).to(tl.float32)
        n = tl.load(sin + b * nb + s * ns + (pair if SIN_PAIRS else partner), mask=turns, other=0.0).to(tl.float32)
        values = values * c + tl.where(leads, other, -other) * n
    write_both(
        values, tl.load(scale), data, across, amaxes, sums, tile, block_row, row, start + column, start + width, total, columns,
        TOP, DATA, ACROSS, SUMS, SATURATE,
    )  # fmt: skip


@triton.jit
def qkv_gradient_kernel(
    dq, dk, dv, cos, sin, scale, data, across, amaxes, sums, rows, total, columns, tokens, q_width, k_width, v_width, q_at, k_at, v_at,
    turned, qb, qh, qs, kb, kh, ks, vb, vh, vs, cb, cs, nb, ns,
    D: tl.constexpr, ROTARY: tl.constexpr, COS_PAIRS: tl.constexpr, SIN_PAIRS: tl.constexpr, TOP: tl.constexpr, DATA: tl.constexpr,
    ACROSS: tl.constexpr, SUMS: tl.constexpr, SATURATE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    of_q, of_k = tl.cdiv(q_width, BLOCK_COLUMNS), tl.cdiv(k_width, BLOCK_COLUMNS)
    wide = of_q + of_k + tl.cdiv(v_width, BLOCK_COLUMNS)
    block_row, block = tile // wide, tile % wide
    if block < of_q:
        part(
            dq, cos, sin, scale, data, across, amaxes, sums, tile, block_row, block, rows, total, columns, tokens, q_width, q_at, turned,
            qb, qh, qs, cb, cs, nb, ns, D, ROTARY, COS_PAIRS, SIN_PAIRS, TOP, DATA, ACROSS, SUMS, SATURATE, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
    elif block < of_q + of_k:
        block -= of_q
        part(
            dk, cos, sin, scale, data, across, amaxes, sums, tile, block_row, block, rows, total, columns, tokens, k_width, k_at, turned,
            kb, kh, ks, cb, cs, nb, ns, D, ROTARY, COS_PAIRS, SIN_PAIRS, TOP, DATA, ACROSS, SUMS, SATURATE, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
    else:
        block -= of_q + of_k
        part(
            dv, cos, sin, scale, data, across, amaxes, sums, tile, block_row, block, rows, total, columns, tokens, v_width, v_at, turned,
            vb, vh, vs, cb, cs, nb, ns, D, 0, False, False, TOP, DATA, ACROSS, SUMS, SATURATE, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
