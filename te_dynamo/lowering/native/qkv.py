"""`ops.qkv` on a GPU: one kernel in forward. Backward is plain torch, which Inductor fuses with the cast of its result; or, if nothing is
normalized and q, k and v come from one GEMM, one kernel that writes that GEMM's FP8 gradient and its transposed copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import te_dynamo.lowering.kernels.qkv
import te_dynamo.lowering.kernels.qkv_gradient  # noqa: F401  (they declare the operators)
from te_dynamo.ir.graph import same_size
from te_dynamo.ir.qkv import rotate, rotate_gradient, views
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.quantized import Quantized, Scales
from te_dynamo.lowering.registry import HIGH_PRECISION, Backward, Case, Forward, Implementation, Needs, implements

INPUTS = ("q", "k", "v", "cos", "sin", "q_weight", "k_weight", "q_bias", "k_bias")


@implements("qkv", provider=("native", "te"), recipes=(HIGH_PRECISION,), devices=("cuda",))
class QKV(Implementation):
    def unsupported(self, case: Case) -> str | None:
        given = case.inputs
        q, k, tables = given["q"], given["k"], [t for t in (given["cos"], given["sin"]) if t is not None]
        if q.shape[2] is not k.shape[2] and q.shape[2] != k.shape[2]:
            return "q and k have different lengths"
        if any(t.shape[1] != 1 for t in tables):
            return "each head has angles of its own"
        if any(t.requires_grad for t in tables) or any(case.learns(name) for name in ("cos", "sin")):
            return "the angles are learned"
        rounds = case.attributes["round_before_weight"]
        return "its norm rounds to another dtype" if rounds not in (None, q.dtype) else None

    def backward_reads(self, call: Call, needs: Needs) -> tuple[str, ...]:
        return INPUTS if call["normalized"] else ("cos", "sin")

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        if call["in_place"]:
            return Forward([t for t in inputs[:3] if t is not None], [], [])
        buffers = torch.ops.te_dynamo.qkv(call.key, list(inputs))
        return Forward(views(buffers, call["form"], call["packing"]), [], [])

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        q, k, _, cos, sin, *vectors = inputs
        dq, dq_weight, dq_bias = _through(call, q, grads[0], cos, sin, *vectors[0::2])
        dk, dk_weight, dk_bias = _through(call, k, grads[1], cos, sin, *vectors[1::2])
        dv = grads[2].to(call.inputs[2]) if call["packing"] else None
        return Backward([dq, dk, dv, None, None, dq_weight, dk_weight, dq_bias, dk_bias], [])

    def hands_gradient_of(self, case: Case) -> bool:
        """If nothing is normalized and the GEMM's rows are the tokens of one sequence after the other."""
        q = case.inputs["q"]
        b, _, s, d = q.shape
        by_sequence = same_size(b, 1) or same_size(q.stride(0), s * q.stride(2))
        return not case.attributes["normalized"] and by_sequence and same_size(q.stride(1), d) and same_size(q.stride(3), 1)

    def quantized_gradient(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scale: Tensor
    ) -> Sequence[Tensor]:
        wanted, tables = call.hands_gradient, [inputs[INPUTS.index(name)] for name in ("cos", "sin")]
        given = [scale, *(wanted[name] for name in ("dtype", "saturate", "multiple"))]
        kinds = [wanted[name] for name in ("data", "transposed", "sums")]
        return torch.ops.te_dynamo.qkv_gradient(call.key, list(grads), tables, *given, list(wanted["starts"]), *kinds)


def _through(
    call: Call, x: Tensor | None, grad: Tensor, cos: Tensor | None, sin: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x [B, H, S, D], which is read only for a norm, and of its norm's weight and bias [D]."""
    dtype = call.inputs[0]
    computed_in = torch.promote_types(dtype, torch.float32)
    g, d_weight, d_bias = grad.to(computed_in), None, None

    def unrotated(g: Tensor) -> Tensor:
        return g if cos is None or sin is None else rotate_gradient(g, cos, sin, call["rotary"], call["width"])

    if not call["normalized"] or x is None:
        return unrotated(g).to(dtype), None, None
    x = x.to(computed_in)
    if call["norm_last"]:
        x = x if cos is None or sin is None else rotate(x, cos, sin, call["rotary"], call["width"])
    else:
        g = unrotated(g)
    centered = x - x.mean(-1, keepdim=True) if call["normalized"] == "layer" else x
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + call["eps"])
    normalized = centered * rstd
    if weight is not None:
        d_weight = (g * normalized).sum((0, 1, 2)).to(weight.dtype)
        d_bias = None if bias is None else g.sum((0, 1, 2)).to(bias.dtype)
        g = g * (1 + weight.to(computed_in) if call["zero_centered"] else weight.to(computed_in))
    dx = g - normalized * (g * normalized).mean(-1, keepdim=True)
    if call["normalized"] == "layer":
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * rstd
    return (unrotated(dx) if call["norm_last"] else dx).to(dtype), d_weight, d_bias
