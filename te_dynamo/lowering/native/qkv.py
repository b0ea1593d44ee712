"""`ops.qkv` on a GPU: one kernel in forward. Backward is one kernel too if q, k and v come from one GEMM: it writes that GEMM's FP8
gradient and its transposed copy. Otherwise it is plain torch, which Inductor fuses with the cast of its result."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

import te_dynamo.lowering.kernels.qkv  # noqa: F401  (it declares its operator)
from te_dynamo.ir.graph import same_size
from te_dynamo.ir.qkv import views
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.kernels.qkv_gradient import through
from te_dynamo.lowering.kernels.tiles import BLOCK_COLUMNS
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

    def backward_reads(self, call: Call, needs: Needs) -> Collection[str]:
        return [name for name in INPUTS if name != "v"] if call["normalized"] else ("cos", "sin")

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        if call["in_place"]:
            return Forward([t for t in inputs[:3] if t is not None], [], [])
        buffers = torch.ops.te_dynamo.qkv(call.key, list(inputs))
        return Forward(views(buffers, call["form"], call["packing"]), [], [])

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        q, k, _, cos, sin, *vectors = inputs
        dq, *of_q = through(call, q, grads[0], cos, sin, *vectors[0::2])
        dk, *of_k = through(call, k, grads[1], cos, sin, *vectors[1::2])
        summed = [None if t is None else t.sum((0, 1, 2)) for pair in zip(of_q, of_k, strict=True) for t in pair]
        gradients = [dq, dk, grads[2] if call["packing"] else None, None, None, *summed]
        return Backward([None if t is None else t.to(dtype) for t, dtype in zip(gradients, call.inputs, strict=True)], [])

    def hands_gradient_of(self, case: Case) -> bool:
        """If the GEMM's rows are the tokens of one sequence after the other, and a norm, which comes first, has whole tiles for a head."""
        q = case.inputs["q"]
        b, _, s, d = q.shape
        by_sequence = same_size(b, 1) or same_size(q.stride(0), s * q.stride(2))
        if not (by_sequence and same_size(q.stride(1), d) and same_size(q.stride(3), 1)):
            return False
        vectors = [case.inputs[name] is not None for name in INPUTS[5:]]
        alike = vectors[0::2] == vectors[1::2] and vectors[0] >= vectors[2]  # q as k, and no bias without a weight
        return not case.attributes["normalized"] or (not case.attributes["norm_last"] and alike and same_size(d % BLOCK_COLUMNS, 0))

    def quantized_gradient(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scale: Tensor
    ) -> Backward:
        wanted = call.hands_gradient
        given = [scale, *(wanted[name] for name in ("dtype", "saturate", "multiple"))]
        kinds = [wanted[name] for name in ("data", "transposed", "sums")]
        *made, sums = torch.ops.te_dynamo.qkv_gradient(call.key, list(grads), list(inputs), *given, list(wanted["starts"]), *kinds)
        of_q = grads[0].shape[1]
        summed = [t.sum((0, 1)) for vector in sums for t in (vector[:, :of_q], vector[:, of_q:])]
        gradients = [t.to(dtype) for t, dtype in zip(summed, call.inputs[5:], strict=False)]
        return Backward([*[None] * 5, *gradients, *[None] * (4 - len(gradients))], [], made)
