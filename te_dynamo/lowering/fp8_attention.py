"""FP8 attention by definition, forward and backward: two opaque operations and the function that ties them to autograd.

Every operand of its seven GEMMs is FP8, one scale a tensor, E4M3 in forward and E5M2 for gradients:

    forward:   P = q k^T * softmax_scale + mask;  S = softmax(P);  o = S v                     q, k, v, S, o in E4M3
    backward:  dS = do v^T;  dP = S * (dS - delta);  dv = S^T do;  dq = dP k;  dk = dP^T q     do, dP in E5M2

As in Transformer Engine (`FP8EmulationFunc` of its unfused attention, and what its cuDNN kernels do): S is quantized
after it is normalized, and only as a GEMM's operand (the softmax's backward reads it in float32); P and dS stay in
float32; dP is the gradient of the scaled scores; S has the same scale in backward as in forward; dq, dk and dv share
one scale; o leaves in FP8 under delayed scaling and in high precision under current scaling. Two differences: here q, k
and v have a scale each (TE quantizes the three with one), and S and dP may take theirs from their own amax (TE's
kernels keep delayed scaling for those two under every per-tensor recipe, only its emulation does not).

The products are computed in float32 from FP8 operands, exactly but for the accumulation, in blocks of query rows: at no
time is there a [B, H, S, S_kv] tensor of a long sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from te_dynamo.ir import masked
from te_dynamo.lowering import fp8
from te_dynamo.lowering.first_use import agreed
from te_dynamo.lowering.fp8 import E4M3, Casting, casting_of

FORWARD_SLOTS = ("q", "k", "v", "s", "o")
GRADIENT_SLOTS = ("do", "dp", "dqkv")

# The dimensions of a [B, H, S, D] tensor in the order in which they lie in memory.
FORMATS = {"bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3), "bhsd": (0, 1, 2, 3)}

BLOCK = 1 << 20  # scores in one block: 4 MB in float32


class Block(NamedTuple):
    """A part of the scores: slices of [B, H, S] and [B, H, S_kv]."""

    queries: tuple[slice, slice, slice]
    keys: tuple[slice, slice, slice]


def unsupported(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout_p: float = 0.0, enable_gqa: bool = False) -> str | None:
    """Why these arguments of an attention cannot be computed in FP8 here; None if they can. Fake tensors will do."""
    if dropout_p:
        return f"FP8 attention has no dropout (dropout_p={dropout_p})"
    if not (q.dim() == k.dim() == v.dim() == 4):
        return f"FP8 attention takes [batch, heads, sequence, head size]; q has {q.dim()} dimensions, k {k.dim()}, v {v.dim()}"
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FP8 attention takes q, k and v of one dtype among float32, bfloat16 and float16, not {q.dtype}, {k.dtype}, {v.dtype}"
    if mask is not None and mask.requires_grad:
        return "FP8 attention gives no gradient to its mask (a learned bias)"
    heads_match = q.shape[1] % k.shape[1] == 0 if enable_gqa else q.shape[1] == k.shape[1]
    if not heads_match or k.shape[0] != q.shape[0] or k.shape[:3] != v.shape[:3]:
        return f"FP8 attention does not broadcast: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    return None


def _blocks(b: int, h: int, s: int, s_kv: int, causal: bool) -> Iterator[Block]:
    """Whole rows, less the future, up to `BLOCK` scores in a block: of one head, of more or of batches where there is room."""
    row = max(1, s_kv)
    rows = max(1, min(s, BLOCK // row))
    heads = max(1, min(h, BLOCK // (rows * row)))
    batches = max(1, min(b, BLOCK // (heads * rows * row)))
    for i in range(0, b, batches):
        for j in range(0, h, heads):
            for r in range(0, s, rows):
                stop = min(r + rows, s)
                part = slice(i, i + batches), slice(j, j + heads)
                yield Block((*part, slice(r, stop)), (*part, slice(0, min(stop, s_kv) if causal else s_kv)))


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, block: Block, factor: Tensor, causal: bool) -> Tensor:
    """The masked scores of a block, float32. q, k: FP8 data as float32; factor: what a product is worth."""
    rows, columns = block.queries[2], block.keys[2]
    scores = (q[block.queries] @ k[block.keys].mT) * factor
    if mask is not None:
        part = mask.expand(*q.shape[:3], k.shape[2])[block.queries + (columns,)]
        if part.dtype == torch.bool:
            scores = scores.masked_fill(~part, -torch.inf)
        else:
            # "Never" is spelled as the lowest float as often as -inf. Beside 3e38 the log of the sum would be lost, and a row
            # in which nothing may be seen (uniform, as in high precision) could not be recomputed from its lse.
            scores = scores + part
            scores = torch.where(scores == -torch.inf, scores, scores.clamp(min=masked.LEAST_SCORE))
    if causal:
        row = torch.arange(rows.start, rows.stop, device=q.device)
        future = torch.arange(columns.stop, device=q.device) > row[:, None]
        scores = scores.masked_fill(future, -torch.inf)
    return scores


def _softmax(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse); 0 in a row in which nothing is seen, as `scaled_dot_product_attention` has it."""
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))


def _scale(scale: Tensor | None, index: int, amax: Tensor, dtype: torch.dtype, casting: Casting) -> Tensor:
    """The scale in slot `index`; from the tensor's own amax where the slot is unset (0 or NaN) or there are no slots."""
    if scale is None:
        return casting.scale_of(amax, dtype)
    own = casting.scale_of(agreed(amax, scale[index], casting.peers), dtype)
    return torch.where(scale[index] > 0, scale[index], own)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """FP8 data of keys or values as float32, each head repeated for the queries' heads that share it."""
    return x.float().repeat_interleave(heads // x.shape[1], 1) if x.shape[1] != heads else x.float()


def _empty(like: Tensor, shape: Any, form: str, dtype: torch.dtype) -> Tensor:
    """An empty [B, H, S, D] tensor that lies in memory as `form` says."""
    order = FORMATS[form]
    inverse = [order.index(i) for i in range(4)]
    return like.new_empty([shape[i] for i in order], dtype=dtype).permute(inverse)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    f: int,
    causal: bool,
    softmax_scale: float,
    quantize_output: bool,
    form: str,
    recipe: str = "",
    peers: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention with FP8 operands.

    q: [B, H, S, D]; k: [B, H_kv, S_kv, D]; v: [B, H_kv, S_kv, D_v], H a multiple of H_kv; mask: bool (True attends) or
    float (added), broadcastable to [B, H, S, S_kv]; scale: float32 [n] with this site's slots (q, k, v, s, o) from `f`
    on, an unset one (0, NaN, or no tensor at all) being taken from the tensor's own amax; form: a key of `FORMATS`, how
    all 4-d results lie in memory; recipe: its key, "" for HYBRID; peers: the group whose ranks share first scales, or "".

    Returns (o, o8, q8, k8, v8, scale_inv, lse, amax): o [B, H, S, D_v] in q's dtype, rounded through FP8 if
    `quantize_output`; o8 the same in E4M3 (empty otherwise); q8, k8, v8 E4M3; scale_inv, amax float32 [5]; lse float32
    [B, H, S], the log of the sum of exp(scores).
    """
    casting = casting_of(recipe, peers) if recipe else Casting()
    b, h, s, _ = q.shape
    peaks = [fp8.amax(x) for x in (q, k, v)]
    scales = [_scale(scale, f + i, peak, E4M3, casting) for i, peak in enumerate(peaks)]
    q8, k8, v8 = (_empty(x, x.shape, form, E4M3).copy_(fp8.quantize(x, c, E4M3)) for x, c in zip((q, k, v), scales, strict=True))
    inv_q, inv_k, inv_v = (c.reciprocal() for c in scales)
    qf, kf, vf = q8.float(), _per_head(k8, h), _per_head(v8, h)
    factor = inv_q * inv_k * softmax_scale
    blocks = list(_blocks(b, h, s, k.shape[2], causal))

    @lru_cache(maxsize=1)  # where there is one block, its scores are kept between the two passes
    def scores(i: int) -> Tensor:
        return _scores(qf, kf, mask, blocks[i], factor, causal)

    # The scale of S needs its largest element; a row has its own where its score is largest.
    lse = q.new_empty((b, h, s), dtype=torch.float32)
    peak_s = q.new_zeros((), dtype=torch.float32)
    for i, block in enumerate(blocks):
        lse[block.queries] = torch.logsumexp(scores(i), -1)
        peak_s = torch.maximum(peak_s, fp8.amax(_softmax(scores(i).amax(-1, keepdim=True), lse[block.queries])))
    scale_s = _scale(scale, f + 3, peak_s, E4M3, casting)
    inv_s = scale_s.reciprocal()

    out = q.new_empty((b, h, s, v.shape[3]), dtype=torch.float32)
    for i, block in enumerate(blocks):
        s8 = fp8.quantize(_softmax(scores(i), lse[block.queries]), scale_s, E4M3)
        out[block.queries] = (s8.float() @ vf[block.keys]) * (inv_s * inv_v)

    peak_o = fp8.amax(out)
    scale_o = _scale(scale, f + 4, peak_o, E4M3, casting)
    inv_o = scale_o.reciprocal()
    o = _empty(q, out.shape, form, q.dtype)
    if quantize_output:
        o8 = _empty(q, out.shape, form, E4M3).copy_(fp8.quantize(out, scale_o, E4M3))
        o.copy_(fp8.dequantize(o8, inv_o))
    else:
        o8 = q.new_empty(0, dtype=E4M3)
        o.copy_(out)
    return o, o8, q8, k8, v8, torch.stack([inv_q, inv_k, inv_v, inv_s, inv_o]), lse, torch.stack([*peaks, peak_s, peak_o])


def backward(
    do: Tensor,
    o: Tensor,
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    mask: Tensor | None,
    scale_inv: Tensor,
    lse: Tensor,
    scale: Tensor | None,
    g: int,
    causal: bool,
    softmax_scale: float,
    quantize_gradients: bool,
    form: str,
    recipe: str = "",
    peers: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `forward`, from what it returned (o: `o8` if the output was quantized, else `o`).

    do: [B, H, S, D_v]; scale: float32 [n] with this site's slots (do, dp, dqkv) from `g` on, as in `forward`.
    Returns (dq, dk, dv, amax): in do's dtype and the shapes of q8, k8, v8, rounded through E5M2 with one scale if
    `quantize_gradients`; amax float32 [3].
    """
    casting = casting_of(recipe, peers) if recipe else Casting()
    gradient = casting.gradient
    b, h, s, _ = q8.shape
    h_kv, s_kv = k8.shape[1:3]
    inv_q, inv_k, inv_v, inv_s, inv_o = scale_inv.unbind()
    peak_do = fp8.amax(do)
    scale_do = _scale(scale, g, peak_do, gradient, casting)
    inv_do = scale_do.reciprocal()
    dof = fp8.quantize(do, scale_do, gradient).float()
    qf, kf, vf = q8.float(), _per_head(k8, h), _per_head(v8, h)
    delta = (dof * o.float()).sum(-1, keepdim=True) * (inv_do * inv_o if o.dtype == E4M3 else inv_do)
    factor = inv_q * inv_k * softmax_scale
    blocks = list(_blocks(b, h, s, s_kv, causal))

    @lru_cache(maxsize=1)
    def softmax_and_gradient(i: int) -> tuple[Tensor, Tensor]:
        block = blocks[i]
        probabilities = _softmax(_scores(qf, kf, mask, block, factor, causal), lse[block.queries])
        ds = (dof[block.queries] @ vf[block.keys].mT) * (inv_do * inv_v)
        return probabilities, probabilities * (ds - delta[block.queries])

    peak_dp = do.new_zeros((), dtype=torch.float32)
    for i in range(len(blocks)):
        peak_dp = torch.maximum(peak_dp, fp8.amax(softmax_and_gradient(i)[1]))
    scale_dp = _scale(scale, g + 1, peak_dp, gradient, casting)
    inv_dp = scale_dp.reciprocal()

    dq, dk, dv = (torch.zeros_like(x) for x in (qf, kf, vf))
    for i, block in enumerate(blocks):
        probabilities, dp = softmax_and_gradient(i)
        s8 = fp8.quantize(probabilities, inv_s.reciprocal(), E4M3).float()
        dp8 = fp8.quantize(dp, scale_dp, gradient).float()
        dq[block.queries] = dp8 @ kf[block.keys]
        dk[block.keys] += dp8.mT @ qf[block.queries]
        dv[block.keys] += s8.mT @ dof[block.queries]
    dq *= inv_dp * inv_k * softmax_scale
    dk *= inv_dp * inv_q * softmax_scale
    dv *= inv_s * inv_do
    gradients = [dq, *(x.unflatten(1, (h_kv, h // h_kv)).sum(2) for x in (dk, dv))]

    peak_dqkv = torch.stack([fp8.amax(x) for x in gradients]).amax()
    if quantize_gradients:
        scale_dqkv = _scale(scale, g + 2, peak_dqkv, gradient, casting)
        gradients = [fp8.dequantize(fp8.quantize(x, scale_dqkv, gradient), scale_dqkv.reciprocal()) for x in gradients]
    dq, dk, dv = (_empty(do, x.shape, form, do.dtype).copy_(x) for x in gradients)
    return dq, dk, dv, torch.stack([peak_do, peak_dp, peak_dqkv])


def _without_autocast(definition: Callable[..., Any]) -> Callable[..., Any]:
    def run(first: Tensor, *args: Any) -> Any:
        with torch.amp.autocast(first.device.type, enabled=False):
            return definition(first, *args)

    return run


# The operations take any strides and give those of `form`, so that Inductor need not copy an operand.
torch.library.define(
    "te_dynamo::attention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? scale, int f, bool causal, float softmax_scale, bool quantize_output, str form,"
    " str recipe='', str peers='')"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
torch.library.define(
    "te_dynamo::attention_bwd",
    "(Tensor do, Tensor o, Tensor q8, Tensor k8, Tensor v8, Tensor? mask, Tensor scale_inv, Tensor lse, Tensor? scale, int g, bool causal,"
    " float softmax_scale, bool quantize_gradients, str form, str recipe='', str peers='') -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
torch.library.impl("te_dynamo::attention_fwd", "default", _without_autocast(forward))
torch.library.impl("te_dynamo::attention_bwd", "default", _without_autocast(backward))


@torch.library.register_fake("te_dynamo::attention_fwd")
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    f: int,
    causal: bool,
    softmax_scale: float,
    quantize_output: bool,
    form: str,
    recipe: str = "",
    peers: str = "",
) -> tuple[Tensor, ...]:
    b, h, s, _ = q.shape
    shape = (b, h, s, v.shape[3])
    small = q.new_empty(5, dtype=torch.float32)
    return (
        _empty(q, shape, form, q.dtype),
        _empty(q, shape, form, E4M3) if quantize_output else q.new_empty(0, dtype=E4M3),
        *(_empty(x, x.shape, form, E4M3) for x in (q, k, v)),
        small,
        q.new_empty((b, h, s), dtype=torch.float32),
        torch.empty_like(small),
    )


@torch.library.register_fake("te_dynamo::attention_bwd")
def _backward_fake(
    do: Tensor,
    o: Tensor,
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    mask: Any,
    scale_inv: Any,
    lse: Any,
    scale: Any,
    g: int,
    causal: bool,
    softmax_scale: float,
    quantize_gradients: bool,
    form: str,
    recipe: str = "",
    peers: str = "",
) -> tuple[Tensor, ...]:
    return *(_empty(do, x.shape, form, do.dtype) for x in (q8, k8, v8)), do.new_empty(3, dtype=torch.float32)


@register_flop_formula(torch.ops.te_dynamo.attention_fwd)
def _forward_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """Two GEMMs, q k^T and S v, a mask or causality not deducted (as torch counts its own attention)."""
    b, h, s, d = q
    return 2 * b * h * s * k[2] * (d + v[3])


@register_flop_formula(torch.ops.te_dynamo.attention_bwd)
def _backward_flops(do: Any, o: Any, q8: Any, k8: Any, v8: Any, *args: Any, **kwargs: Any) -> int:
    """Five GEMMs: q k^T again, dP k, dP^T q of the size of the one; do v^T, S^T do of the other."""
    b, h, s, d = q8
    return 2 * b * h * s * k8[2] * (3 * d + 2 * v8[3])


class Attention(torch.autograd.Function):
    """The two operations as one differentiable function. Saved for backward: q, k, v (and o, if quantized) in FP8."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: Tensor | None,
        sink: Tensor | None,
        grad_scale: Tensor | None,
        f: int,
        g: int,
        causal: bool,
        softmax_scale: float,
        quantize_output: bool,
        quantize_gradients: bool,
        form: str,
        recipe: str,
        peers: str,
    ) -> tuple[Tensor, Tensor]:
        o, o8, q8, k8, v8, scale_inv, lse, amax = torch.ops.te_dynamo.attention_fwd(
            q, k, v, mask, scale, f, causal, softmax_scale, quantize_output, form, recipe, peers
        )
        ctx.save_for_backward(o8 if quantize_output else o, q8, k8, v8, mask, scale_inv, lse, scale if grad_scale is None else grad_scale)
        ctx.attributes = (g, causal, softmax_scale, quantize_gradients, form, recipe, peers)
        ctx.has_sink = sink is not None
        ctx.mark_non_differentiable(amax)
        return o, amax

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: None) -> tuple[Tensor | None, ...]:
        dq, dk, dv, amax = torch.ops.te_dynamo.attention_bwd(do, *ctx.saved_tensors, *ctx.attributes)
        return dq, dk, dv, None, None, amax if ctx.has_sink else None, *[None] * 10


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    sink: Tensor | None = None,
    grad_scale: Tensor | None = None,
    *,
    f: int = 0,
    g: int = 0,
    causal: bool = False,
    softmax_scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    quantize_output: bool = False,
    quantize_gradients: bool = False,
    form: str = "bshd",
    recipe: str = "",
    peers: str = "",
) -> tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention` in FP8: what a lowered graph calls.

    q, k, v, mask, scale, f, form, recipe, peers: as in `forward`; g: the first of the gradient slots, in `grad_scale` or, where
    that is None, in `scale`; sink: None, or float32 [3] that requires grad: the "gradient" it gets is the amax of (do, dp, dqkv),
    which travels that way out of the backward.
    softmax_scale: None is 1/sqrt(D). Returns (o, amax): o [B, H, S, D_v]; amax float32 [5], not differentiable.
    Raises ValueError with the reason that `unsupported` gives.
    """
    reason = unsupported(q, k, v, mask, dropout_p=dropout_p, enable_gqa=enable_gqa)
    if reason is not None:
        raise ValueError(reason)
    softmax_scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        tensors = (q, k, v, mask, scale, sink, grad_scale)
        return Attention.apply(*tensors, f, g, causal, softmax_scale, quantize_output, quantize_gradients, form, recipe, peers)
    o, *_, amax = torch.ops.te_dynamo.attention_fwd(q, k, v, mask, scale, f, causal, softmax_scale, quantize_output, form, recipe, peers)
    return o, amax
