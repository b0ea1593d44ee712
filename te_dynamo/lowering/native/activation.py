"""An activation as the producer of an FP8 operand on a GPU: in forward one kernel writes it and its transposed copy, in backward one
takes the gradient through it and writes that of the GEMM before it both ways.

Only where the transposed copy is wanted, so that a kernel is saved: without one Inductor fuses an activation and its cast as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import te_dynamo.lowering.kernels.activation  # noqa: F401  (declares the operators)
from te_dynamo.lowering.activation import gradients
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.limits import ALIGNMENT_ON_GPU
from te_dynamo.lowering.per_tensor import matrix
from te_dynamo.lowering.quantized import Quantized, ScaleOf
from te_dynamo.lowering.registry import Case, Needs, Producer, Quantize, produces
from te_dynamo.recipe import DelayedScaling


@produces("activation", provider="native", recipes=(DelayedScaling,), devices=("cuda",))
class FusedActivation(Producer):
    kernel = "one kernel with the cast and the transposed copy"
    calibrates = False
    hands_gradient = True
    backward_reads = ("x", "up")

    def unsupported(self, case: Case) -> str | None:
        if not case.trains or not case.transposed:
            return "Inductor fuses it with the cast: nothing reads the transposed copy"
        if "input" in case.remakes or case.keeps_fp8:
            return "memory='speed' has a kernel of its own: Inductor's leaves what backward reads in FP8 behind, or makes it again"
        return None if case.only_operand else "its result is wanted in high precision too"

    def forward(self, call: Call, inputs: Sequence[Any], scale: ScaleOf, quantize: Quantize) -> tuple[Quantized, list[Quantized]]:
        x, up = _matrices(inputs)
        assert scale.known is not None
        value, inverse = scale.known
        given = (value, scale.dtype, scale.casting.saturates_infinite, ALIGNMENT_ON_GPU)
        data, transposed, amaxes = torch.ops.te_dynamo.activation(call.key, x, up, *given)
        return Quantized(data, inverse, transposed, scale=value, amax=amaxes), []

    def backward(self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grad: Tensor, needs: Needs) -> list[Any]:
        x, up = inputs
        d_x, d_up = gradients(call, grad, x, up)
        return [d_x.to(x.dtype), None if d_up is None else d_up.to(up.dtype)]

    def quantized_gradient(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grad: Tensor, scale: Tensor, wanted: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        given = [scale, *(wanted[name] for name in ("dtype", "saturate", "multiple"))]
        kinds = [wanted[name] for name in ("data", "transposed", "sums")]
        return torch.ops.te_dynamo.activation_gradient(call.key, matrix(grad), *_matrices(inputs), *given, list(wanted["starts"]), *kinds)


def _matrices(inputs: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    x, up = inputs
    return matrix(x), None if up is None else matrix(up)
