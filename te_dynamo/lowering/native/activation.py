"""An activation as the producer of an FP8 operand on a GPU. In forward, one kernel writes the operand and its transposed copy; in backward,
one kernel takes the gradient through the activation and writes the gradient of the preceding GEMM, and its transposed copy.

Used only if the transposed copy is wanted, which saves a kernel: otherwise Inductor fuses an activation and its cast just as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from te_dynamo.lowering.activation import gradients
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.fp8 import Casting
from te_dynamo.lowering.kernels.activation import inputs_of
from te_dynamo.lowering.limits import ALIGNMENT_ON_GPU
from te_dynamo.lowering.per_tensor import matrix
from te_dynamo.lowering.quantized import Quantized, Scale, ScaleOf
from te_dynamo.lowering.registry import Case, Needs, Producer, Quantize, produces
from te_dynamo.recipe import DelayedScaling

_Read = tuple[list[Tensor | None], list[Tensor]]  # x and up, or what was kept of them in FP8


@produces("activation", provider="native", recipes=(DelayedScaling,), devices=("cuda",))
class FusedActivation(Producer):
    kernel = "one kernel with the cast and the transposed copy"
    calibrates = False
    hands_gradient = True

    def backward_reads(self, call: Call) -> tuple[str, ...]:
        return () if call.keeps_fp8 else ("x", "up")

    def saves(self, call: Call) -> int:
        return int(call.keeps_fp8)

    def unsupported(self, case: Case) -> str | None:
        if not case.trains or not case.transposed:
            return "Inductor fuses it with the cast: nothing reads the transposed copy"
        if "input" in case.remakes and not case.keeps_fp8:
            return "memory='saving': what Inductor generates can be made again in backward"
        if case.keeps_fp8 and not case.only_reader:
            return "Inductor's kernel leaves in FP8 behind what backward reads, of a GEMM's output that something else reads too"
        return None if case.only_operand else "its result is wanted in high precision too"

    def forward(self, call: Call, inputs: Sequence[Any], scale: ScaleOf, quantize: Quantize) -> tuple[Quantized, list[Quantized]]:
        keep, again = call.keeps_fp8, "input" in call.remakes
        assert scale.known is not None
        read = (list(_matrices(inputs)), list[Tensor]())
        made, kept = _made(call, read, scale.known, scale.casting, data=True, transposed=not again, keep=keep)
        return made, [kept] if keep else []

    def operand_again(self, call: Call, saved: Sequence[Quantized], scale: Scale, casting: Casting) -> Quantized:
        return _made(call, _read(call, (), saved), scale, casting, data=False, transposed=True, keep=False)[0]

    def backward(self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grad: Tensor, needs: Needs) -> list[Any]:
        x, up = inputs_of(*_read(call, inputs, saved))
        made = gradients(call, grad.reshape(x.shape), x, up)
        return [None if d is None else d.to(dtype).view(grad.shape) for d, dtype in zip(made, call.inputs, strict=True)]

    def quantized_gradient(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grad: Tensor, scale: Tensor, wanted: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        given = [scale, *(wanted[name] for name in ("dtype", "saturate", "multiple"))]
        kinds = [wanted[name] for name in ("data", "transposed", "sums")]
        read = _read(call, inputs, saved)
        return torch.ops.te_dynamo.activation_gradient(call.key, matrix(grad), *read, *given, list(wanted["starts"]), *kinds)


def _made(
    call: Call, read: _Read, scale: Scale, casting: Casting, *, data: bool, transposed: bool, keep: bool
) -> tuple[Quantized, Quantized]:
    """The copies of the operand that are wanted, and what is kept of the inputs."""
    given = (scale.value, casting.forward, casting.saturates_infinite, ALIGNMENT_ON_GPU)
    made, across, amaxes, *keeping = torch.ops.te_dynamo.activation(call.key, *read, *given, data, transposed, keep)
    operand = Quantized(made if data else None, scale.inverse, across if transposed else None, scale=scale.value, amax=amaxes)
    return operand, Quantized(*keeping)


def _read(call: Call, inputs: Sequence[Any], saved: Sequence[Quantized]) -> _Read:
    """What backward reads: the inputs, or what was kept of them."""
    if not call.keeps_fp8:
        return list(_matrices(inputs)), []
    assert saved[0].data is not None and saved[0].scale_inv is not None
    return [], [saved[0].data, saved[0].scale_inv]


def _matrices(inputs: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    x, up = inputs
    return matrix(x), None if up is None else matrix(up)
