"""Scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from te_dynamo.ir.graph import fake_like, hint
from te_dynamo.ir.layout import Layout
from te_dynamo.ir.meta import LAYOUT, MASK, QKV_LAYOUT
from te_dynamo.ir.op import Invariant, operation
from te_dynamo.ir.sizes import product, same
from te_dynamo.recipe import Recipe

aten = torch.ops.aten
FUSED = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
FORWARD, GRADIENT = ("q", "k", "v", "s", "o"), ("do", "dp", "dqkv")


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return fake_like(q, (*q.shape[:-1], v.shape[-1]), q.dtype)


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return q.dim() == k.dim() == v.dim() == 4 and same(q.shape[-1:], k.shape[-1:]) and same(k.shape[:-1], v.shape[:-1])


def _heads(q: Any, k: Any, gqa: bool) -> bool:
    q, k = hint(q), hint(k)
    return q is None or k is None or q == k or (gqa and q % k == 0)


def _flops(q: Any, k: Any, v: Any, *_: Any) -> int:
    return 2 * product((*q[:3], k[2], q[3] + v[3]))


def _attributes(node: Node, recipe: Recipe | None) -> Mapping[str, Any]:
    """form: the memory order of the results' dimensions; qkv_layout: the layout of q, k and v, as TE spells it; window: if the mask was
    proved to be a sliding window, how many columns before its own a row attends to, else -1; attends: the mask as a formula (see
    `te_dynamo.passes.masks.attends`), () if it has none; padded: if the mask was proved to hide what data says is padding, what it shows
    otherwise, "causal" or "all", else ""; quantize_output, quantize_gradients: whether o, and the gradients of q, k and v,
    are returned in FP8."""
    form, in_memory = node.meta.get(LAYOUT, Layout()).form, node.meta.get(QKV_LAYOUT)
    proof = node.meta.get(MASK)
    window = proof.window if proof is not None and proof.kind == "window" else None
    attends = None if proof is None else proof.attends
    padded = proof.within if proof is not None and proof.kind == "padded" and proof.within != "window" else ""
    rounds = bool(getattr(recipe, "fp8_mha", False))
    return {
        "form": form,
        "qkv_layout": in_memory or Layout(form).name,
        "window": -1 if window is None else window,
        "attends": () if attends is None else attends.text,
        "padded": padded,
        "quantize_output": rounds,
        "quantize_gradients": rounds,
    }


FACTS: dict[str, Any] = dict(
    kind="attention",
    fake=_fake,
    forward=FORWARD,
    prefix="attention.",
    attributes_of=_attributes,
    activation_flops=_flops,
    in_aten=lambda q, k, v, *_: [(op, (q, k, v)) for op in FUSED],
    noted={LAYOUT: Layout},
    invariants=(
        Invariant("q is [B, H, S, D], k [B, H_kv, S_kv, D], v [B, H_kv, S_kv, D_v]", lambda a: _shapes(a.q, a.k, a.v)),
        Invariant("k has the heads of q; with enable_gqa, a divisor of them", lambda a: _heads(a.q.shape[-3], a.k.shape[-3], a.enable_gqa)),
        Invariant("a mask is bool or float", lambda a: a.mask is None or a.mask.dtype == torch.bool or a.mask.is_floating_point()),
        Invariant("sinks are [H]", lambda a: a.sinks is None or same(a.sinks.shape, a.q.shape[1:2])),
        Invariant("the result is [B, H, S, D_v]", lambda a: same(a.out.shape, (*a.q.shape[:-1], a.v.shape[-1]))),
    ),
)


@operation(gradient=GRADIENT, forward_only="fp8_forward_attention", skipping="unpadded_attention", **FACTS)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    reads: Sequence[Tensor] = (),
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """`softmax(q @ k.T * scale + mask) @ v`, with the meaning of `scaled_dot_product_attention`.

    q: [B, H, S, D]; k: [B, H_kv, S_kv, D]; v: [B, H_kv, S_kv, D_v]; mask: None, bool (True attends) or float
    (added), broadcastable to [B, H, S, S_kv]. Returns [B, H, S, D_v] in the dtype of `q`.
    sinks: [H], for each head the score of one more key, whose value is 0 (gpt-oss); with sinks, no row is without a key.
    reads: tensors from which a formula computes the mask (see `_attributes`); the definition does not use them.
    causal: row i attends to columns <= i (aligned at the top left, as torch does). scale: None is 1/sqrt(D).
    softcap: with c above 0, scores become c tanh(scores / c) before the mask (Gemma 2).
    """
    if sinks is None and not softcap:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal, scale=scale, enable_gqa=enable_gqa
        )
    return _written_out(q, k, v, mask, sinks, causal, q.shape[-1] ** -0.5 if scale is None else scale, dropout_p, softcap)


@operation(**FACTS)
def fp8_forward_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    reads: Sequence[Tensor] = (),
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """`attention` with only its forward in FP8: a planned `attention` becomes this if its gradients are in high precision."""
    return attention(q, k, v, mask, sinks, reads, causal=causal, scale=scale, dropout_p=dropout_p, enable_gqa=enable_gqa, softcap=softcap)


@operation(**FACTS)
def unpadded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    reads: Sequence[Tensor] = (),
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """`attention` of sequences with padding, whose rows give 0: a planned `attention` becomes this where padding is skipped.

    mask: as `attention` takes it; row i attends to the valid tokens, to all or to those up to i (`padded` in `_attributes`). So a token is
    valid if the last row attends to it.
    """
    assert mask is not None
    out = attention(q, k, v, mask, sinks, reads, causal=causal, scale=scale, dropout_p=dropout_p, enable_gqa=enable_gqa, softcap=softcap)
    return out.masked_fill(~valid_tokens(mask).unsqueeze(-1), 0)


def valid_tokens(mask: Tensor) -> Tensor:
    """Which tokens are no padding, from a mask as `unpadded_attention` takes it [..., S, S]: bool [..., S]."""
    last = mask.select(-2, -1)
    return last if last.dtype == torch.bool else last == 0


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, causal: bool, scale: float, dropout_p: float, softcap: float
) -> Tensor:
    """Attention with its scores in memory, as models with a softcap or sinks compute it in eager mode."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (k, v))
    scores = torch.matmul(q, k.mT) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        row, column = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
        scores = scores.masked_fill(column > row[:, None], -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    scores = scores.float()
    if sinks is not None:
        beside = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
        probabilities = torch.cat((scores, beside), -1).softmax(-1)[..., :-1]
    else:
        probabilities = scores.softmax(-1)
        if mask is not None and mask.dtype == torch.bool:
            probabilities = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, probabilities)
    return torch.matmul(F.dropout(probabilities.to(q.dtype), dropout_p), v)
