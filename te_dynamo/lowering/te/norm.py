"""TE's norms, which write FP8, the amax and what backward needs in one kernel.

The calls are those of TE 2.20 (pytorch/module/_common.py, apply_normalization). TE rounds once, from float32 to FP8. Asked for the
transposed copy too, TE would run its transpose kernel after the norm (C/normalization/rmsnorm/rmsnorm_api.cpp); instead, backward makes
that copy, as for other inputs. Backward is plain torch: Inductor fuses it with the addition of other gradients, whereas TE's kernel
would write its result for the kernel of the sum to read again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from te_dynamo.ir.norm import NormKind
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.limits import ALIGNMENT_ON_GPU
from te_dynamo.lowering.per_tensor import matrix
from te_dynamo.lowering.quantized import Quantized, ScaleOf
from te_dynamo.lowering.registry import PER_TENSOR, Case, Needs, Producer, Quantize, produces
from te_dynamo.lowering.te.library import api, running
from te_dynamo.lowering.te.linear import quantizer
from te_dynamo.recipe import DelayedScaling


@torch.library.custom_op("te_dynamo::te_norm", mutates_args=())
def te_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, dtype: torch.dtype, kind: str, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, H]; weight, bias [H] of x's dtype; scale f32, 0-d -> (FP8 [T, H], the mean f32 [T] (empty for "rms"), one over the
    deviation or the root mean square f32 [T], amax f32 [1])."""
    te = api()
    amax = x.new_zeros(1, dtype=torch.float32)
    with running():
        rest = (eps, None, quantizer(scale, amax, dtype, True, False), te.dtype[x.dtype], 0, zero_centered)
        if kind == "layer":
            y, mean, inverse = te.tex.layernorm_fwd(x.contiguous(), weight, bias, *rest)
        else:
            y, mean, inverse = te.tex.rmsnorm_fwd(x.contiguous(), weight, *rest)
    return y._data.view(dtype), inverse.new_empty(0) if mean is None else mean, inverse, amax


@te_norm.register_fake
def _(x, weight, bias, scale, dtype, kind, eps, zero_centered):
    f32 = {"dtype": torch.float32}
    mean = x.new_empty(x.shape[0] if kind == "layer" else 0, **f32)
    return x.new_empty(x.shape, dtype=dtype), mean, x.new_empty(x.shape[0], **f32), x.new_empty(1, **f32)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, kind: NormKind, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, x [..., H]; mean, inverse: as `te_norm` gave them -> (dx [..., H] in x's dtype, dweight f32 [H], dbias f32 [H]).

    It keeps x's shape, which the residual's gradient has too, so that Inductor fuses their sum into the same kernel.
    """
    each, tokens = (*x.shape[:-1], 1), tuple(range(x.dim() - 1))
    inverse, dy, normal = inverse.reshape(each), dy.float(), x.float()
    if kind == "layer":
        normal = normal - mean.reshape(each)
    normal = normal * inverse
    scaled = dy * (weight.float() + zero_centered)
    dx = scaled - normal * (scaled * normal).mean(-1, keepdim=True)
    if kind == "layer":
        dx = dx - scaled.mean(-1, keepdim=True)
    return (dx * inverse).to(x.dtype), (dy * normal).sum(tokens), dy.sum(tokens)


@produces("norm", provider="te", recipes=PER_TENSOR)
class TENorm(Producer):
    """A norm that writes FP8 by itself: only where its scale is known beforehand, which means delayed scaling.

    Elsewhere Inductor's kernel of the norm writes FP8 too, so TE's pays only where there is nothing to fuse the norm with.
    """

    kernel = "TE's kernel"
    calibrates = False

    def backward_reads(self, call: Call) -> tuple[str, ...]:
        return ("x", "weight")

    def saves(self, call: Call) -> int:
        return 1

    def unsupported(self, case: Case) -> str | None:
        if not case.trains:
            return "in inference Inductor's norm writes FP8 as well"
        if "input" in case.remakes:
            return "memory='saving': what Inductor generates can be made again in backward"
        if not case.only_operand:
            return "its result is wanted in high precision too"
        if not case.in_memory("x"):
            return "Inductor fuses it with what makes its input"
        if not isinstance(case.recipe, DelayedScaling):
            return "a norm writes FP8 by itself only where the scale is known before: in delayed scaling"
        x, weight, bias, kind = *(case.inputs[name] for name in ("x", "weight", "bias")), case.attributes["kind"]
        return unsupported(x, weight, bias, kind, ALIGNMENT_ON_GPU)

    def forward(self, call: Call, inputs: Sequence[Any], scale: ScaleOf, quantize: Quantize) -> tuple[Quantized, list[Quantized]]:
        x, weight, bias = inputs
        assert scale.known is not None
        value, inverse = scale.known
        attributes = (call["kind"], call["eps"], call["zero_centered"])
        h8, mean, deviation_inv, amax = torch.ops.te_dynamo.te_norm(matrix(x), weight, bias, value, scale.dtype, *attributes)
        return Quantized(h8, inverse, scale=value, amax=amax), [Quantized(mean, deviation_inv)]

    def backward(self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grad: Tensor, needs: Needs) -> list[Any]:
        (x, weight, _), (mean, deviation_inv, *_) = inputs, saved[0]
        dx, dw, db = backward(grad, x, weight, mean, deviation_inv, call["kind"], call["zero_centered"])
        x_dtype, weight_dtype, bias_dtype = call.inputs
        return [dx.to(x_dtype), dw.to(weight_dtype), None if bias_dtype is None else db.to(bias_dtype)]


def unsupported(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, multiple: int) -> str | None:
    """Why TE's kernel does not compute this norm over the last dimension of x [..., H], as a clause; None if it does."""
    if weight is None:
        return "TE's norms have a weight"
    if (kind == "layer") != (bias is not None):
        return "TE's LayerNorm has a bias" if kind == "layer" else "TE's RMSNorm has no bias"
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return f"TE's norms take weights of the dtype of what they normalize, {x.dtype}, not {weight.dtype}"
    sizes = x.shape[:-1]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return "the number of tokens is not known when it is compiled"
    tokens = math.prod(sizes)
    return f"{tokens} tokens are not a multiple of {multiple}" if tokens % multiple or not tokens else None
