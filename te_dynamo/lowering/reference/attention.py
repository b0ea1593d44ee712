"""FP8 attention by definition, forward and backward, in blocks of query rows.

Every operand of its seven GEMMs is FP8, one scale a tensor, E4M3 in forward and E5M2 for gradients:

    forward:   P = q k^T * softmax_scale + mask;  S = softmax(P);  o = S v                     q, k, v, S, o in E4M3
    backward:  dS = do v^T;  dP = S * (dS - delta);  dv = S^T do;  dq = dP k;  dk = dP^T q     do, dP in E5M2

As in Transformer Engine (`FP8EmulationFunc` of its unfused attention, and what its cuDNN kernels do): S is quantized
after it is normalized, and only as a GEMM's operand (the softmax's backward reads it in float32); P and dS stay in
float32; dP is the gradient of the scaled scores; S has the same scale in backward as in forward; dq, dk and dv share
one scale; o leaves in FP8 under delayed scaling and in high precision under current scaling. Two differences: here q, k
and v have a scale each (TE quantizes the three with one), and S and dP may take theirs from their own amax (TE's
kernels keep delayed scaling for those two under every per-tensor recipe, only its emulation does not).

The products are computed in float32 from FP8 operands, exactly except for the accumulation. A long sequence never has a full
[B, H, S, S_kv] tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from te_dynamo.ir import masked
from te_dynamo.ir.layout import ORDER, Form, as_bhsd
from te_dynamo.ir.sizes import product
from te_dynamo.lowering import fp8
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.fp8 import E4M3, Casting
from te_dynamo.lowering.limits import DTYPES
from te_dynamo.lowering.quantized import Quantized, Scale, Scales
from te_dynamo.lowering.registry import PER_TENSOR, Backward, Case, Forward, Implementation, Needs, implements, missing
from te_dynamo.lowering.rotation import prepared
from te_dynamo.recipe import CLASSES

BLOCK = 1 << 20  # scores in one block: 4 MB in float32


class Block(NamedTuple):
    """A part of the scores: slices of [B, H, S] and [B, H, S_kv]."""

    queries: tuple[slice, slice, slice]
    keys: tuple[slice, slice, slice]


def _blocks(b: int, h: int, s: int, s_kv: int, causal: bool) -> Iterator[Block]:
    """Whole rows, less the future if causal, up to `BLOCK` scores in a block: of one head, or of several heads or batches if they fit."""
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
    """The masked scores of a block, float32. q, k: FP8 data as float32; factor: multiplies the products."""
    rows, columns = block.queries[2], block.keys[2]
    scores = (q[block.queries] @ k[block.keys].mT) * factor
    if mask is not None:
        part = mask.expand(*q.shape[:3], k.shape[2])[block.queries + (columns,)]
        if part.dtype == torch.bool:
            scores = scores.masked_fill(~part, -torch.inf)
        else:
            # A mask spells "never" as the lowest float as often as -inf. Next to 3e38 the log of the sum would be lost, and a row that may
            # attend to nothing (uniform, as in high precision) could not be recomputed from its lse.
            scores = scores + part
            scores = torch.where(scores == -torch.inf, scores, scores.clamp(min=masked.LEAST_SCORE))
    if causal:
        row = torch.arange(rows.start, rows.stop, device=q.device)
        future = torch.arange(columns.stop, device=q.device) > row[:, None]
        scores = scores.masked_fill(future, -torch.inf)
    return scores


def _softmax(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse); 0 in a row that attends to nothing, as in `scaled_dot_product_attention`."""
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))


def _per_head(x: Tensor, heads: int) -> Tensor:
    """FP8 data of keys or values as float32, each head repeated for the queries' heads that share it."""
    return x.float().repeat_interleave(heads // x.shape[1], 1) if x.shape[1] != heads else x.float()


def _of_shared_heads(gradient: Tensor, heads: int) -> Tensor:
    """The gradient of heads that `_per_head` repeated: summed over the copies."""
    return gradient.unflatten(1, (heads, -1)).sum(2) if gradient.shape[1] != heads else gradient


def _empty(like: Tensor, shape: Any, form: Form, dtype: torch.dtype) -> Tensor:
    """An empty [B, H, S, D] tensor, laid out in memory as `form` says."""
    return as_bhsd(like.new_empty([shape[i] for i in ORDER[form]], dtype=dtype), form)


OPERATIONS = ("attention", "fp8_forward_attention")
_NO_SCALE = "FP8 attention has one scale a tensor, and {!r} is no such recipe"
# The definition is many times slower there than high precision.
_NO_KERNEL = "on a GPU only Transformer Engine has kernels for FP8 attention"
for _op in OPERATIONS:
    missing(_op, "native", dict.fromkeys(PER_TENSOR, _NO_KERNEL))
    for _provider in ("reference", "native", "te"):
        missing(_op, _provider, {recipe: _NO_SCALE.format(recipe.name) for recipe in CLASSES if recipe not in PER_TENSOR})


@implements("attention", provider="native", recipes=PER_TENSOR, devices=("cpu",))
@implements("attention", provider="reference", recipes=PER_TENSOR)
class FP8Attention(Implementation):
    """q: [B, H, S, D]; k: [B, H_kv, S_kv, D]; v: [B, H_kv, S_kv, D_v], H a multiple of H_kv; mask: None, bool (True attends) or
    float (added), broadcastable to [B, H, S, S_kv].

    Attributes, besides those of `te_dynamo.ir.attention`: form: a key of `te_dynamo.ir.layout.ORDER`, the layout of all 4-d results;
    quantize_output, quantize_gradients: whether o, and dq, dk and dv, are rounded through FP8.
    """

    opaque = True

    def operands(self, call: Call, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k as they will be rounded."""
        return q, k

    def backward_reads(self, call: Call, needs: Needs) -> tuple[str, ...]:
        return ("mask",) if call["quantize_output"] else ("mask", "outputs")

    def unsupported(self, case: Case) -> str | None:
        q, k, v, mask = (case.inputs[name] for name in ("q", "k", "v", "mask"))
        if reason := modified(case):
            return reason
        if dropout_p := case.attributes["dropout_p"]:
            return f"FP8 attention has no dropout (dropout_p={dropout_p})"
        if not (q.dim() == k.dim() == v.dim() == 4):
            return f"FP8 attention takes [batch, heads, sequence, head size]; q has {q.dim()} dimensions, k {k.dim()}, v {v.dim()}"
        if not (q.dtype == k.dtype == v.dtype) or q.dtype not in DTYPES:
            return f"FP8 attention takes q, k and v of one dtype among float32, bfloat16 and float16, not {q.dtype}, {k.dtype}, {v.dtype}"
        if mask is not None and (mask.requires_grad or (case.trains and case.learns("mask"))):
            return "FP8 attention gives no gradient to its mask (a learned bias)"
        heads_match = q.shape[1] % k.shape[1] == 0 if case.attributes["enable_gqa"] else q.shape[1] == k.shape[1]
        if not heads_match or k.shape[0] != q.shape[0] or k.shape[:3] != v.shape[:3]:
            return f"FP8 attention does not broadcast: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        return None

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        """Saved: q, k and v, the scale of S, o where it is quantized, and lse [B, H, S], the log of the sum of exp(scores)."""
        q, k, v, mask = inputs[:4]
        dtype, (q, k) = q.dtype, self.operands(call, q, k)
        form, causal, casting = call["form"], call["causal"], scales.casting
        b, h, s, _ = q.shape
        peaks = [fp8.amax(x) for x in (q, k, v)]
        q8, k8, v8 = (_quantized(x, scales.at(role).of(peak), casting, form) for x, role, peak in zip((q, k, v), "qkv", peaks, strict=True))
        qf, kf, vf = q8.data.float(), _per_head(k8.data, h), _per_head(v8.data, h)
        factor = q8.scale_inv * k8.scale_inv * softmax_scale(call, q)
        blocks = list(_blocks(b, h, s, k.shape[2], causal))

        @lru_cache(maxsize=1)  # where there is one block, its scores are kept between the two passes
        def scores(i: int) -> Tensor:
            return _scores(qf, kf, mask, blocks[i], factor, causal)

        # The scale of S needs its largest element; each row's is where its score is largest.
        lse = q.new_empty((b, h, s), dtype=torch.float32)
        peak_s = q.new_zeros((), dtype=torch.float32)
        for i, block in enumerate(blocks):
            lse[block.queries] = torch.logsumexp(scores(i), -1)
            peak_s = torch.maximum(peak_s, fp8.amax(_softmax(scores(i).amax(-1, keepdim=True), lse[block.queries])))
        scale_s = scales.at("s").of(peak_s)

        out = q.new_empty((b, h, s, v.shape[3]), dtype=torch.float32)
        for i, block in enumerate(blocks):
            s8 = fp8.quantize(_softmax(scores(i), lse[block.queries]), scale_s.value, E4M3)
            out[block.queries] = (s8.float() @ vf[block.keys]) * (scale_s.inverse * v8.scale_inv)

        peak_o = fp8.amax(out)
        o, o8 = _empty(q, out.shape, form, dtype), Quantized()
        if call["quantize_output"]:
            o8 = _quantized(out, scales.at("o").of(peak_o), casting, form)
            o.copy_(fp8.dequantize(o8.data, o8.scale_inv))
        else:
            o.copy_(out)
        saved = [q8, k8, v8, Quantized(scale=scale_s.value, scale_inv=scale_s.inverse), o8, Quantized(lse)]
        return Forward([o], saved, [*peaks, peak_s, peak_o])

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        q8, k8, v8, s8, o8, (lse, *_) = saved
        mask, (do,) = inputs[3], grads
        form, causal, casting = call["form"], call["causal"], scales.casting
        gradient = casting.gradient
        b, h, s, _ = q8.data.shape
        h_kv, s_kv = k8.data.shape[1:3]
        peak_do = fp8.amax(do)
        scale_do = scales.at("do").of(peak_do)
        inv_do = scale_do.inverse
        dof = casting.saturated(do, scale_do.value, gradient).to(gradient).float()
        qf, kf, vf = q8.data.float(), _per_head(k8.data, h), _per_head(v8.data, h)
        o, o_inv = (o8.data, o8.scale_inv) if call["quantize_output"] else (inputs[-1][0], 1.0)
        delta = (dof * o.float()).sum(-1, keepdim=True) * (inv_do * o_inv)
        times = softmax_scale(call, q8.data)
        factor = q8.scale_inv * k8.scale_inv * times
        blocks = list(_blocks(b, h, s, s_kv, causal))

        @lru_cache(maxsize=1)
        def softmax_and_gradient(i: int) -> tuple[Tensor, Tensor]:
            block = blocks[i]
            probabilities = _softmax(_scores(qf, kf, mask, block, factor, causal), lse[block.queries])
            ds = (dof[block.queries] @ vf[block.keys].mT) * (inv_do * v8.scale_inv)
            return probabilities, probabilities * (ds - delta[block.queries])

        peak_dp = do.new_zeros((), dtype=torch.float32)
        for i in range(len(blocks)):
            peak_dp = torch.maximum(peak_dp, fp8.amax(softmax_and_gradient(i)[1]))
        scale_dp = scales.at("dp").of(peak_dp)

        dq, dk, dv = (torch.zeros_like(x) for x in (qf, kf, vf))
        for i, block in enumerate(blocks):
            probabilities, dp = softmax_and_gradient(i)
            rounded = fp8.quantize(probabilities, s8.scale, E4M3).float()
            dp8 = casting.saturated(dp, scale_dp.value, gradient).to(gradient).float()
            dq[block.queries] = dp8 @ kf[block.keys]
            dk[block.keys] += dp8.mT @ qf[block.queries]
            dv[block.keys] += rounded.mT @ dof[block.queries]
        dq *= scale_dp.inverse * k8.scale_inv * times
        dk *= scale_dp.inverse * q8.scale_inv * times
        dv *= s8.scale_inv * inv_do
        gradients = [dq, *(_of_shared_heads(x, h_kv) for x in (dk, dv))]

        peak_dqkv = torch.stack([fp8.amax(x) for x in gradients]).amax()
        if call["quantize_gradients"]:
            shared = scales.at("dqkv").of(peak_dqkv)
            gradients = [fp8.dequantize(casting.saturated(x, shared.value, gradient).to(gradient), shared.inverse) for x in gradients]
        made = [_empty(do, x.shape, form, do.dtype).copy_(x) for x in gradients]
        return Backward([*made, *no_gradients(call)], [peak_do, peak_dp, peak_dqkv])

    def fake_forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        q, k, v = inputs[:3]
        b, h, s, _ = q.shape
        form, f32 = call["form"], {"dtype": torch.float32}
        scalar, shape = q.new_empty((), **f32), (b, h, s, v.shape[3])
        quantized = [Quantized(_empty(x, x.shape, form, E4M3), torch.empty_like(scalar), scale=torch.empty_like(scalar)) for x in (q, k, v)]
        o8 = Quantized(_empty(q, shape, form, E4M3), scalar, scale=torch.empty_like(scalar)) if call["quantize_output"] else Quantized()
        s8 = Quantized(scale=torch.empty_like(scalar), scale_inv=torch.empty_like(scalar))
        peaks = [torch.empty_like(scalar) for _ in scales.roles.forward]
        return Forward([_empty(q, shape, form, q.dtype)], [*quantized, s8, o8, Quantized(q.new_empty((b, h, s), **f32))], peaks)

    def fake_backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        (do,) = grads
        made = [_empty(do, x.data.shape, call["form"], do.dtype) for x in saved[:3]]
        return Backward([*made, *no_gradients(call)], [do.new_empty((), dtype=torch.float32) for _ in scales.roles.gradient])

    def flops(self, call: Call, inputs: Sequence[Any]) -> int:
        """Two GEMMs, q k^T and S v, a mask or causality not deducted (as torch counts its own attention)."""
        return call.operation.activation_flops(*inputs)

    def backward_flops(self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Any], needs: Needs) -> int:
        """Five GEMMs: q k^T again, dP k, dP^T q of the size of the one; do v^T, S^T do of the other."""
        q, k, v = (x.data for x in saved[:3])
        return 2 * product((*q[:3], k[2], 3 * q[3] + 2 * v[3]))


@implements("fp8_forward_attention", provider="native", recipes=PER_TENSOR, devices=("cpu",))
@implements("fp8_forward_attention", provider="reference", recipes=PER_TENSOR)
class FP8ForwardAttention(FP8Attention):
    """The same forward; backward is that of high-precision attention, with the same q, k and v. (TE's kernels take the softmax's statistics
    from the FP8 forward instead, which costs accuracy where scores are large.) q and k are rotated before they are rounded, and k's mean
    is subtracted (see `lowering.rotation`)."""

    def operands(self, call: Call, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return prepared(call, q, k, keys=2)

    def backward_reads(self, call: Call, needs: Needs) -> tuple[str, ...]:
        return ("q", "k", "v", "mask")

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        return super().forward(call, inputs, scales, needs)._replace(saved=[])

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        (q, k, v, mask), (do,) = inputs[:4], grads
        heads, h_kv, form = q.shape[1], k.shape[1], call["form"]
        qf, kf, vf, dof = q.float(), _per_head(k, heads), _per_head(v, heads), do.float()
        factor = qf.new_tensor(softmax_scale(call, q))
        dq, dk, dv = (torch.zeros_like(x) for x in (qf, kf, vf))
        for block in _blocks(q.shape[0], heads, q.shape[2], k.shape[2], call["causal"]):
            scores = _scores(qf, kf, mask, block, factor, call["causal"])
            probabilities = _softmax(scores, torch.logsumexp(scores, -1))
            ds = dof[block.queries] @ vf[block.keys].mT
            dp = probabilities * (ds - (probabilities * ds).sum(-1, keepdim=True)) * factor
            dq[block.queries] = dp @ kf[block.keys]
            dk[block.keys] += dp.mT @ qf[block.queries]
            dv[block.keys] += probabilities.mT @ dof[block.queries]
        gradients = [dq, *(_of_shared_heads(x, h_kv) for x in (dk, dv))]
        return Backward([*(_empty(do, x.shape, form, do.dtype).copy_(x) for x in gradients), *no_gradients(call)], [])

    def fake_forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        return super().fake_forward(call, inputs, scales, needs)._replace(saved=[])

    def fake_backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        (do,) = grads
        return Backward([*(_empty(do, x.shape, call["form"], do.dtype) for x in inputs[:3]), *no_gradients(call)], [])

    def backward_flops(self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Any], needs: Needs) -> int:
        q, k, v = inputs[:3]
        return 2 * product((*q[:3], k[2], 3 * q[3] + 2 * v[3]))


def _quantized(x: Tensor, scale: Scale, casting: Casting, form: str) -> Quantized:
    data = _empty(x, x.shape, form, E4M3).copy_(casting.saturated(x, scale.value, E4M3).to(E4M3))
    return Quantized(data, scale.inverse, scale=scale.value)


def modified(case: Case) -> str | None:
    """What is done to the scores that kernels of plain attention, and FP8 attention, do not support; None if nothing is."""
    if case.attributes["softcap"]:
        return f"the scores are soft-capped (tanh, {case.attributes['softcap']:g})"
    return None if case.inputs["sinks"] is None else "it has attention sinks"


def no_gradients(call: Call) -> list[Any]:
    """The gradients (None) of the inputs after q, k and v."""
    return [None, None, [None] * len(call.inputs[5])]


def softmax_scale(call: Call, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if call["scale"] is None else call["scale"]
