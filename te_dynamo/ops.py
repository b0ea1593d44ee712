"""The semantic operations: what a site of the model means, independent of how it is computed.

Each is an ordinary Python function over tensors whose body is its definition in high precision, so a graph that
contains them still runs and can be compared with the graph it came from. `lowering` replaces them by a provider's
operations. In a graph, tensors are passed by position and attributes by keyword.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

NormKind = Literal["layer", "rms"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype) -> Tensor:
    """`x @ weight.T + bias`, computed in `out_dtype`.

    x: [..., K]; weight: [N, K]; bias: [N] or None. Returns [..., N] in `out_dtype` (the dtype that the model's own
    linear gave: under autocast it differs from that of `x` and `weight`).
    """
    return F.linear(x.to(out_dtype), weight.to(out_dtype), None if bias is None else bias.to(out_dtype))


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    out_dtype: torch.dtype,
    merged: bool = False,
    interleave: int = 0,
) -> list[Tensor]:
    """Linears of one input: the input is quantized once for all of them.

    x: [..., K]; weights: [N_i, K]; biases: [N_i] or None. Returns one [..., N_i] for each weight.
    merged: one GEMM for all of them; what it returns are views of one buffer.
    interleave: 0, or the size of a head: the rows of the merged GEMM are then ordered head by head (q, k and v of a
        head side by side: the BSH3D layout) instead of one linear after the other (BS3HD), and what is returned is
        [..., N_i / interleave, interleave]. All N_i must be equal.
    """
    ys = [linear(x, w, b, out_dtype=out_dtype) for w, b in zip(weights, biases, strict=True)]
    return [y.unflatten(-1, (-1, interleave)) for y in ys] if interleave else ys


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: NormKind,
    eps: float,
    out_dtype: torch.dtype,
    dims: int = 1,
    zero_centered: bool = False,
    round_before_weight: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm or RMSNorm over the last `dims` dimensions, computed in float32.

    x: [..., *normalized]; weight, bias: [*normalized] or None. Returns the shape of `x` in `out_dtype`.
    zero_centered: the weight is stored minus one (Gemma).
    round_before_weight: the dtype to which the normalized value is rounded before the weight is applied (Llama
        rounds there, and again at the end; TE's RMSNorm rounds once).
    """
    axes = tuple(range(-dims, 0))
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "layer":
        h = h - h.mean(axes, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(axes, keepdim=True) + eps)
    if round_before_weight is not None:
        h = h.to(round_before_weight)
    if weight is not None:
        if round_before_weight is None:
            weight = weight.to(h.dtype)
        h = h * (1 + weight if zero_centered else weight)
    if bias is not None:
        h = h + bias.to(h.dtype)
    return h.to(out_dtype)


def norm_linears(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    kind: NormKind,
    eps: float,
    norm_dtype: torch.dtype,
    zero_centered: bool,
    round_before_weight: torch.dtype | None,
    out_dtype: torch.dtype,
    merged: bool = False,
    interleave: int = 0,
) -> list[Tensor]:
    """A norm over the last dimension and the linears that read it: `[norm(x), *linears(norm(x))]`.

    The attributes are those of `norm` (its out_dtype is called norm_dtype here) and of `linears`.
    """
    h = norm(
        x,
        norm_weight,
        norm_bias,
        kind=kind,
        eps=eps,
        out_dtype=norm_dtype,
        zero_centered=zero_centered,
        round_before_weight=round_before_weight,
    )
    return [h, *linears(h, weights, biases, out_dtype=out_dtype, merged=merged, interleave=interleave)]


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


SEMANTIC_OPS = frozenset({linear, linears, norm, norm_linears, attention})
