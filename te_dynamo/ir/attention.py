"""Scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Mapping
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


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **_: Any) -> Tensor:
    return fake_like(q, (*q.shape[:-1], v.shape[-1]), q.dtype)


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return q.dim() == k.dim() == v.dim() == 4 and same(q.shape[-1:], k.shape[-1:]) and same(k.shape[:-1], v.shape[:-1])


def _heads(q: Any, k: Any, gqa: bool) -> bool:
    q, k = hint(q), hint(k)
    return q is None or k is None or q == k or (gqa and q % k == 0)


def _flops(q: Any, k: Any, v: Any, *_: Any) -> int:
    return 2 * product((*q[:3], k[2], q[3] + v[3]))


def _attributes(node: Node, recipe: Recipe | None) -> Mapping[str, Any]:
    """form: the order of the dimensions in memory of what is made; qkv_layout: how q, k and v lie, as TE spells it; window: where the
    mask was proved to be a sliding window, how many columns before its own a row attends to, else -1; whether o, and the gradients of
    q, k and v, leave in FP8."""
    form, in_memory = node.meta.get(LAYOUT, Layout()).form, node.meta.get(QKV_LAYOUT)
    window = getattr(node.meta.get(MASK), "window", None)
    rounds = bool(getattr(recipe, "fp8_mha", False))
    return {
        "form": form,
        "qkv_layout": in_memory or Layout(form).name,
        "window": -1 if window is None else window,
        "quantize_output": rounds,
        "quantize_gradients": rounds,
    }


@operation(
    kind="attention",
    fake=_fake,
    forward=FORWARD,
    gradient=GRADIENT,
    prefix="attention.",
    attributes_of=_attributes,
    activation_flops=_flops,
    in_aten=lambda q, k, v, mask: [(op, (q, k, v)) for op in FUSED],
    noted={LAYOUT: Layout},
    invariants=(
        Invariant("q is [B, H, S, D], k [B, H_kv, S_kv, D], v [B, H_kv, S_kv, D_v]", lambda a: _shapes(a.q, a.k, a.v)),
        Invariant("k has the heads of q; with enable_gqa, a divisor of them", lambda a: _heads(a.q.shape[-3], a.k.shape[-3], a.enable_gqa)),
        Invariant("a mask is bool or float", lambda a: a.mask is None or a.mask.dtype == torch.bool or a.mask.is_floating_point()),
        Invariant("the result is [B, H, S, D_v]", lambda a: same(a.out.shape, (*a.q.shape[:-1], a.v.shape[-1]))),
    ),
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
) -> Tensor:
    """`softmax(q @ k.T * scale + mask) @ v`, with the meaning of `scaled_dot_product_attention`.

    q: [B, H, S, D]; k: [B, H_kv, S_kv, D]; v: [B, H_kv, S_kv, D_v]; mask: None, bool (True attends) or float
    (added), broadcastable to [B, H, S, S_kv]. Returns [B, H, S, D_v] in the dtype of `q`.
    causal: row i attends to columns <= i (aligned at the top left, as torch does). scale: None is 1/sqrt(D).
    """
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal, scale=scale, enable_gqa=enable_gqa
    )
