"""The kernel of `te_dynamo::qkv_gradient`. Imported where it is launched: Triton is not needed elsewhere.

A program writes one tile; with a norm, all tiles of a head, whose rows it reads twice, the second time from a cache.
"""

import triton
import triton.language as tl

from te_dynamo.lowering.kernels.tiles_triton import place, write_both


@triton.jit
def located(
    block_row, block_column, rows, width, tokens, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile as `place` has it, and where its elements are in a tensor [B, H, S, D]: batch, token, head and feature."""
    row, column, inside = place(block_row, block_column, rows, width, BLOCK_ROWS, BLOCK_COLUMNS)
    b, s = (row // tokens).to(tl.int64)[:, None], (row % tokens).to(tl.int64)[:, None]
    return row, column, inside, b, s, (column // D).to(tl.int64)[None, :], (column % D)[None, :]


@triton.jit
def unrotated(
    head, cos, sin, d, inside, turned, ROTARY: tl.constexpr, COS_PAIRS: tl.constexpr, SIN_PAIRS: tl.constexpr,
):  # fmt: skip
    """A tile of a gradient, back through RoPE. head, cos, sin: pointers to the rows; turned: how many features of a head RoPE rotates."""
    values = tl.load(head + d, mask=inside, other=0.0).to(tl.float32)
    if ROTARY:
        half = turned // 2
        if ROTARY == 2:
            partner, leads, pair = d ^ 1, d % 2 == 0, d // 2
        else:
            partner, leads, pair = tl.where(d < half, d + half, d - half), d < half, tl.where(d < half, d, d - half)
        turns = inside & (d < turned)
        other = tl.load(head + partner, mask=turns, other=0.0).to(tl.float32)
        c = tl.load(cos + (pair if COS_PAIRS else d), mask=turns, other=1.0).to(tl.float32)
        n = tl.load(sin + (pair if SIN_PAIRS else partner), mask=turns, other=0.0).to(tl.float32)
        values = values * c + tl.where(leads, other, -other) * n
    return values


@triton.jit
def factor(weight, d, ZERO_CENTERED: tl.constexpr, WEIGHT: tl.constexpr):
    """What a norm multiplies the features d by."""
    if WEIGHT:
        w = tl.load(weight + d).to(tl.float32)
        if ZERO_CENTERED:
            w += 1.0
    else:
        w = 1.0
    return w


@triton.jit
def part(
    grad, x, weight, cos, sin, scale, data, across, amaxes, sums, norm_sums, tile, block_row, first, rows, total, columns, tokens, width,
    start, beside, pitch, turned, eps, gb, gh, gs, xb, xh, xs, cb, cs, nb, ns,
    D: tl.constexpr, STEPS: tl.constexpr, NORM: tl.constexpr, ZERO_CENTERED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROTARY: tl.constexpr, COS_PAIRS: tl.constexpr, SIN_PAIRS: tl.constexpr, TOP: tl.constexpr, DATA: tl.constexpr,
    ACROSS: tl.constexpr, SUMS: tl.constexpr, SATURATE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some tiles of one of q, k and v. beside: the column at which it begins in `norm_sums`, whose rows are `pitch` apart."""
    mean, along, level, rstd = 0.0, 0.0, 0.0, 1.0
    if NORM:  # of one head, whose features are exactly those of the tiles
        if NORM == 2:
            mean = tl.zeros((BLOCK_ROWS, 1), tl.float32)
            for step in range(STEPS):
                row, column, inside, b, s, h, d = located(block_row, first + step, rows, width, tokens, D, BLOCK_ROWS, BLOCK_COLUMNS)
                at = x + b * xb + s * xs + h * xh + d
                mean += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32), 1)[:, None] / D
        squares = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        along = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        level = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        for step in range(STEPS):
            row, column, inside, b, s, h, d = located(block_row, first + step, rows, width, tokens, D, BLOCK_ROWS, BLOCK_COLUMNS)
            at = x + b * xb + s * xs + h * xh + d
            centered = tl.where(inside, tl.load(at, mask=inside, other=0.0).to(tl.float32) - mean, 0.0)
            head = grad + b * gb + s * gs + h * gh
            g = unrotated(head, cos + b * cb + s * cs, sin + b * nb + s * ns, d, inside, turned, ROTARY, COS_PAIRS, SIN_PAIRS)
            g = g * factor(weight, d, ZERO_CENTERED, WEIGHT)
            squares += tl.sum(centered * centered, 1)[:, None]
            along += tl.sum(g * centered, 1)[:, None]
            if NORM == 2:
                level += tl.sum(g, 1)[:, None] / D
        rstd = tl.rsqrt(squares / D + eps)
        along = along * rstd / D
    for step in range(STEPS):
        row, column, inside, b, s, h, d = located(block_row, first + step, rows, width, tokens, D, BLOCK_ROWS, BLOCK_COLUMNS)
        head = grad + b * gb + s * gs + h * gh
        values = unrotated(head, cos + b * cb + s * cs, sin + b * nb + s * ns, d, inside, turned, ROTARY, COS_PAIRS, SIN_PAIRS)
        if NORM:
            at = x + b * xb + s * xs + h * xh + d
            normalized = (tl.load(at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
            if WEIGHT:
                target = norm_sums + block_row.to(tl.int64) * pitch + beside + column
                tl.store(target, tl.sum(tl.where(inside, values * normalized, 0.0), 0))
                if BIAS:
                    tl.store(target + tl.cdiv(total, BLOCK_ROWS) * pitch, tl.sum(values, 0))
            values = values * factor(weight, d, ZERO_CENTERED, WEIGHT)
            values = tl.where(inside, (values - normalized * along - level) * rstd, 0.0)
        write_both(
            values, tl.load(scale), data, across, amaxes, sums, tile + step, block_row, row, start + column, start + width, total, columns,
            TOP, DATA, ACROSS, SUMS, SATURATE,
        )  # fmt: skip


@triton.jit
def qkv_gradient_kernel(
    dq, dk, dv, q, k, q_weight, k_weight, cos, sin, scale, data, across, amaxes, sums, norm_sums, rows, total, columns, tokens,
    q_width, k_width, v_width, q_at, k_at, v_at, turned, eps, gqb, gqh, gqs, gkb, gkh, gks, gvb, gvh, gvs, qb, qh, qs, kb, kh, ks,
    cb, cs, nb, ns,
    D: tl.constexpr, STEPS: tl.constexpr, NORM: tl.constexpr, ZERO_CENTERED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROTARY: tl.constexpr, COS_PAIRS: tl.constexpr, SIN_PAIRS: tl.constexpr, TOP: tl.constexpr, DATA: tl.constexpr,
    ACROSS: tl.constexpr, SUMS: tl.constexpr, SATURATE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) * STEPS
    of_q, of_k = tl.cdiv(q_width, BLOCK_COLUMNS), tl.cdiv(k_width, BLOCK_COLUMNS)
    wide = of_q + of_k + tl.cdiv(v_width, BLOCK_COLUMNS)
    block_row, block = tile // wide, tile % wide
    pitch = q_width + k_width
    if block < of_q:
        part(
            dq, q, q_weight, cos, sin, scale, data, across, amaxes, sums, norm_sums, tile, block_row, block, rows, total, columns, tokens,
            q_width, q_at, 0, pitch, turned, eps, gqb, gqh, gqs, qb, qh, qs, cb, cs, nb, ns,
            D, STEPS, NORM, ZERO_CENTERED, WEIGHT, BIAS, ROTARY, COS_PAIRS, SIN_PAIRS, TOP, DATA, ACROSS, SUMS, SATURATE,
            BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
    elif block < of_q + of_k:
        block -= of_q
        part(
            dk, k, k_weight, cos, sin, scale, data, across, amaxes, sums, norm_sums, tile, block_row, block, rows, total, columns, tokens,
            k_width, k_at, q_width, pitch, turned, eps, gkb, gkh, gks, kb, kh, ks, cb, cs, nb, ns,
            D, STEPS, NORM, ZERO_CENTERED, WEIGHT, BIAS, ROTARY, COS_PAIRS, SIN_PAIRS, TOP, DATA, ACROSS, SUMS, SATURATE,
            BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
    else:
        block -= of_q + of_k
        part(
            dv, dv, k_weight, cos, sin, scale, data, across, amaxes, sums, norm_sums, tile, block_row, block, rows, total, columns, tokens,
            v_width, v_at, 0, pitch, turned, eps, gvb, gvh, gvs, 0, 0, 0, cb, cs, nb, ns,
            D, STEPS, 0, False, False, False, 0, False, False, TOP, DATA, ACROSS, SUMS, SATURATE, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
