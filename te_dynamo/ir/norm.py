"""LayerNorm and RMSNorm, which compute the operand of most linears."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import is_contiguous_or_false

from te_dynamo.ir.op import Invariant, operation
from te_dynamo.ir.sizes import same

NormKind = Literal["layer", "rms"]


def _fake(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, out_dtype: torch.dtype, **_: Any) -> Tensor:
    return torch.empty_like(x, dtype=out_dtype)


def _is_torchs(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind, out_dtype: torch.dtype) -> bool:
    """Whether torch's LayerNorm computes the same: Inductor has a better backward for it. On a CPU torch's kernel rounds intermediates,
    and its result is always contiguous."""
    dtypes = {out_dtype, *(w.dtype for w in (weight, bias) if w is not None)}
    return kind == "layer" and x.device.type == "cuda" and dtypes == {x.dtype} and is_contiguous_or_false(x)


@operation(
    kind="norm",
    fake=_fake,
    by_rows=lambda attributes: attributes["dims"] == 1,
    invariants=(
        Invariant(
            "weight and bias are the last `dims` sizes of x",
            lambda a: all(w is None or same(w.shape, a.x.shape[a.x.dim() - a.dims :]) for w in (a.weight, a.bias)),
        ),
        Invariant("the result is like x in out_dtype", lambda a: same(a.out.shape, a.x.shape) and a.out.dtype == a.out_dtype),
    ),
)
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
    if _is_torchs(x, weight, bias, kind, out_dtype) and not zero_centered and round_before_weight is None:
        return F.layer_norm(x, x.shape[x.dim() - dims :], weight, bias, eps)
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
