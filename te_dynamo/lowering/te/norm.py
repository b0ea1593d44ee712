"""TE's norms that write FP8, its transposed copy and the amax, with what backward needs: one kernel.

The calls are those of TE 2.20 (pytorch/module/_common.py, apply_normalization). TE rounds once, to FP8, from float32. Backward is
plain torch: what it computes Inductor fuses with the gradients that are added to it and casts that follow, a kernel of TE's
would write its result for a kernel of the sum to read again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from te_dynamo.lowering.te.library import api, running
from te_dynamo.lowering.te.linear import plain, plain_fake, quantizer
from te_dynamo.ops import NormKind


@torch.library.custom_op("te_dynamo::te_norm", mutates_args=())
def te_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, dtype: torch.dtype, kind: str, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [T, H]; weight, bias [H] of x's dtype; scale f32, 0-d -> (FP8 [T, H], FP8 [H, T], the mean f32 [T] (empty for "rms"),
    one over the deviation or the root mean square f32 [T], amax f32 [1])."""
    te = api()
    amax = x.new_zeros(1, dtype=torch.float32)
    with running():
        q = quantizer(scale, amax, dtype, True, True)
        rest = (eps, None, q, te.dtype[x.dtype], 0, zero_centered)
        if kind == "layer":
            y, mean, inverse = te.tex.layernorm_fwd(x, weight, bias, *rest)
        else:
            y, mean, inverse = te.tex.rmsnorm_fwd(x, weight, *rest)
    return *plain(y, x, dtype, True, True), inverse.new_empty(0) if mean is None else mean, inverse, amax


@te_norm.register_fake
def _(x, weight, bias, scale, dtype, kind, eps, zero_centered):
    f32 = {"dtype": torch.float32}
    mean = x.new_empty(x.shape[0] if kind == "layer" else 0, **f32)
    return *plain_fake(x, dtype, True, True), mean, x.new_empty(x.shape[0], **f32), x.new_empty(1, **f32)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, kind: NormKind, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, x [T, H]; mean, inverse: as `te_norm` gave them -> (dx [T, H] in x's dtype, dweight f32 [H], dbias f32 [H])."""
    dy = dy.float()
    normal = x.float()
    if kind == "layer":
        normal = normal - mean[:, None]
    normal = normal * inverse[:, None]
    scaled = dy * (weight.float() + zero_centered)
    dx = scaled - normal * (scaled * normal).mean(-1, keepdim=True)
    if kind == "layer":
        dx = dx - scaled.mean(-1, keepdim=True)
    return (dx * inverse[:, None]).to(x.dtype), (dy * normal).sum(0), dy.sum(0)


def unsupported(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, multiple: int) -> str | None:
    """Why TE's kernel does not compute this norm over the last dimension of x [..., H], as a clause; None if it does."""
    if weight is None:
        return "TE's norms have a weight"
    if kind == "rms" and bias is not None:
        return "TE's RMSNorm has no bias"
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return f"TE's norms take weights of the dtype of what they normalise, {x.dtype}, not {weight.dtype}"
    sizes = x.shape[:-1]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return "the number of tokens is not known when it is compiled"
    tokens = math.prod(sizes)
    return f"{tokens} tokens are not a multiple of {multiple}" if tokens % multiple else None
