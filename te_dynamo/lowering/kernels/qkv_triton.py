"""The kernel of `te_dynamo::qkv`. Imported where it is launched: Triton is not needed elsewhere."""

import triton
import triton.language as tl


@triton.jit
def normalized(
    x, mean, rstd, weight, bias, at, D, ROUNDS: tl.constexpr, ZERO_CENTERED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    x = (x - mean) * rstd
    if ROUNDS:
        x = x.to(dtype).to(tl.float32)
    if WEIGHT:
        w = tl.load(weight + at, mask=at < D, other=0.0).to(tl.float32)[None, :]
        if ZERO_CENTERED:
            w += 1.0
        x = x * w
        if ROUNDS:
            x = x.to(dtype).to(tl.float32)
    if BIAS:
        x = x + tl.load(bias + at, mask=at < D, other=0.0).to(tl.float32)[None, :]
    return x.to(dtype).to(tl.float32)


@triton.jit
def write(
    source, target, weight, bias, cos, sin, b, s, first, heads, width, eps, sb, sh, ss, tb, th, ts, cb, cs, nb, ns,
    D: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr, NORM_LAST: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    ROUNDS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, COS_PAIRS: tl.constexpr, SIN_PAIRS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    h = first + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK)
    inside = (h[:, None] < heads) & (d[None, :] < D)
    row = source + b * sb + s * ss + h[:, None].to(tl.int64) * sh
    x = tl.load(row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    dtype = source.dtype.element_ty
    half = width // 2
    if ROTARY == 2:
        partner, leads, pair = d ^ 1, d % 2 == 0, d // 2
    else:
        partner, leads, pair = tl.where(d < half, d + half, d - half), d < half, tl.where(d < half, d, d - half)
    turns = d < width
    if ROTARY:
        other = tl.load(row + partner[None, :], mask=inside & turns[None, :], other=0.0).to(tl.float32)
    if NORM and not NORM_LAST:
        mean = tl.sum(x, 1)[:, None] / D if NORM == 2 else 0.0
        centered = tl.where(inside, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centered * centered, 1)[:, None] / D + eps)
        x = normalized(x, mean, rstd, weight, bias, d, D, ROUNDS, ZERO_CENTERED, WEIGHT, BIAS, dtype)
        if ROTARY:
            other = normalized(other, mean, rstd, weight, bias, partner, D, ROUNDS, ZERO_CENTERED, WEIGHT, BIAS, dtype)
    if ROTARY:
        c = tl.load(cos + b * cb + s * cs + (pair if COS_PAIRS else d), mask=turns, other=1.0).to(tl.float32)
        n = tl.load(sin + b * nb + s * ns + (pair if SIN_PAIRS else d), mask=turns, other=0.0).to(tl.float32)
        turned = x * c[None, :] + tl.where(leads[None, :], -other, other) * n[None, :]
        x = tl.where(turns[None, :], turned, x).to(dtype).to(tl.float32)
    if NORM and NORM_LAST:
        mean = tl.sum(tl.where(inside, x, 0.0), 1)[:, None] / D if NORM == 2 else 0.0
        centered = tl.where(inside, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centered * centered, 1)[:, None] / D + eps)
        x = normalized(x, mean, rstd, weight, bias, d, D, ROUNDS, ZERO_CENTERED, WEIGHT, BIAS, dtype)
    out = target + b * tb + s * ts + h[:, None].to(tl.int64) * th + d[None, :]
    tl.store(out, x.to(target.dtype.element_ty), mask=inside)


@triton.jit
def qkv_kernel(
    q, k, v, to_q, to_k, to_v, cos, sin, q_weight, k_weight, q_bias, k_bias, tokens, heads, heads_kv, width, eps,
    qb, qh, qs, kb, kh, ks, vb, vh, vs, tqb, tqh, tqs, tkb, tkh, tks, tvb, tvh, tvs, cb, cs, nb, ns,
    D: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr, NORM_LAST: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    ROUNDS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, COS_PAIRS: tl.constexpr, SIN_PAIRS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, s = tl.program_id(0).to(tl.int64) // tokens, tl.program_id(0).to(tl.int64) % tokens
    chunk, of_q, of_k = tl.program_id(1), tl.cdiv(heads, HEADS), tl.cdiv(heads_kv, HEADS)
    if chunk < of_q:
        write(
            q, to_q, q_weight, q_bias, cos, sin, b, s, chunk * HEADS, heads, width, eps, qb, qh, qs, tqb, tqh, tqs, cb, cs, nb, ns,
            D, ROTARY, NORM, NORM_LAST, ZERO_CENTERED, ROUNDS, WEIGHT, BIAS, COS_PAIRS, SIN_PAIRS, HEADS, BLOCK,
        )  # fmt: skip
    elif chunk < of_q + of_k:
        first = (chunk - of_q) * HEADS
        write(
            k, to_k, k_weight, k_bias, cos, sin, b, s, first, heads_kv, width, eps, kb, kh, ks, tkb, tkh, tks, cb, cs, nb, ns,
            D, ROTARY, NORM, NORM_LAST, ZERO_CENTERED, ROUNDS, WEIGHT, BIAS, COS_PAIRS, SIN_PAIRS, HEADS, BLOCK,
        )  # fmt: skip
    else:
        first = (chunk - of_q - of_k) * HEADS
        write(
            v, to_v, k_weight, k_bias, cos, sin, b, s, first, heads_kv, width, eps, vb, vh, vs, tvb, tvh, tvs, cb, cs, nb, ns,
            D, 0, 0, False, False, False, False, False, False, False, HEADS, BLOCK,
        )  # fmt: skip
