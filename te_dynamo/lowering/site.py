"""The functions that a lowered graph calls: plain Python over tensors, which AOTAutograd traces through.

`site` computes every site, whatever its provider: one autograd function, which also carries the amaxes of the site's gradients. It takes
a slice of `sink`, a tensor that requires grad and is used for nothing else; the slice's "gradient" is the amaxes measured in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from te_dynamo.lowering.call import Call, flattened
from te_dynamo.lowering.compute import compute_backward, compute_forward, in_full_precision, read_in_backward, scales_of, unflattened
from te_dynamo.lowering.handed import CARRIERS, carriers
from te_dynamo.lowering.kept_inputs import kept_in_fp8
from te_dynamo.lowering.opaque import opaque_backward, opaque_forward
from te_dynamo.lowering.quantized import MadeGradient, Scale
from te_dynamo.lowering.registry import implementation_of
from te_dynamo.lowering.scalars import largest_of

# The scales of a site in one direction; None where it has no slots. An opaque implementation takes its graph's packed scales [F] and the
# offset of its own; any other takes its own scales and their reciprocals, each a 0-d tensor: a kernel that Inductor generates reads a
# pointer, so repeated layers share a kernel. All float32.
SiteScales = tuple[Tensor, int] | tuple[list[Tensor], list[Tensor]] | None


def record(amaxes: Sequence[Tensor]) -> Tensor:
    """The forward amaxes of a graph as one tensor [F], detached."""
    return torch.cat([torch.detach(a) for a in amaxes])


def unpack(packed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The scales [F] of a graph as F 0-d tensors, and their reciprocals."""
    made = torch.ops.te_dynamo.unpack(packed)
    return made[: len(made) // 2], made[len(made) // 2 :]


GIVEN = 5  # arguments of the autograd function before `*flat`


class _Site(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, scales: SiteScales, grad_scales: SiteScales, sink: Tensor | None, ahead: Tensor | None, *flat: Any
    ) -> Any:
        needs = list(ctx.needs_input_grad[GIVEN : GIVEN + call.count])
        implementation = implementation_of(call)
        flat = flat[: len(flat) - CARRIERS] if call.hands_gradient else flat
        if implementation.opaque:
            outputs, saved, amax = opaque_forward(call, flat, scales, needs)
        else:
            done = compute_forward(call, flat, scales_of(call, _pairs(scales)), needs)
            outputs, saved, amax = done.outputs, done.saved, largest_of(done.amaxes) if call.records else None
        read = _for_backward(call, flat, outputs, needs)
        leaves = flattened(saved) if any(needs) or call.records else []
        ctx.save_for_backward(*read, *leaves)
        ctx.call, ctx.needs, ctx.grad_scales, ctx.saves, ctx.ahead = call, needs, grad_scales, len(read), ahead
        if call.takes_gradient:
            ctx.lead = outputs[0].shape[:-1]
            ctx.set_materialize_grads(False)
            outputs = [*outputs, *carriers(outputs[0], call.takes_gradient)]
        if amax is None:
            return tuple(outputs)
        ctx.mark_non_differentiable(amax)
        return (*outputs, amax)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        call, needs, grad_scales = ctx.call, ctx.needs, ctx.grad_scales
        tensors = ctx.saved_tensors
        read, leaves = tensors[: ctx.saves], tensors[ctx.saves :]
        saved = unflattened(leaves)
        outputs: Sequence[Any] = grads[: len(grads) - call.records]
        if call.takes_gradient:
            outputs = [MadeGradient._make((*outputs[-CARRIERS:], ctx.lead))]
        if implementation_of(call).opaque:
            handed: Sequence[Tensor] = ()
            gradients, amax = opaque_backward(call, read, saved, outputs, grad_scales, needs)
        else:
            done = compute_backward(call, read, saved, outputs, scales_of(call, _pairs(grad_scales)), needs, ahead=ctx.ahead)
            handed = done.handed
            gradients, amax = flattened(done.gradients), largest_of(done.amaxes) if call.records and done.amaxes else None
        wanted = ctx.needs_input_grad
        missing = len(wanted) - GIVEN - len(gradients) - len(handed)  # cached weights
        return (None, None, None, amax if wanted[3] else None, None, *gradients, *[None] * missing, *handed)


def site(
    key: str,
    inputs: Sequence[Any],
    scales: SiteScales = None,
    grad_scales: SiteScales = None,
    sink: Tensor | None = None,
    cached: Sequence[Sequence[Tensor | None]] = (),
    handing: tuple[Tensor, Sequence[Tensor]] | None = None,
) -> list[Tensor]:
    """A site: returns `[*the operation's outputs, *carriers, amax]`; carriers only if its output's gradient comes quantized, `amax` only if
    the call records.

    key: its `Call`; inputs: the operation's, with the producer's inputs in place of the operand that it makes.
    scales, grad_scales: see `SiteScales`; sink: f32 [gradient scales], the site's slice of the sink, or None.
    cached: the fields of each GEMM's quantized weight, where the call says that weights are cached.
    handing: for a site that hands over a quantized gradient: its scale, f32, 0-d, and the carriers of the site that takes it.
    amax: f32 [scales], one for each forward tensor.
    """
    call = Call.parse(key)
    if implementation_of(call).generated:
        with in_full_precision(call.device):
            return implementation_of(call).forward(call, list(inputs), scales_of(call, None), None).outputs
    ahead, carrying = handing or (None, ())
    flat = [*flattened(inputs), *flattened(cached), *carrying]
    results = list(_Site.apply(call, scales, grad_scales, sink, ahead, *flat))
    amax = [results.pop()] if call.records else []
    carried = [results.pop() for _ in range(CARRIERS)][::-1] if call.takes_gradient else []
    outputs = call.operation.outputs(call.attributes, results)
    return [*(map(kept_in_fp8, outputs) if call.keeps_fp8 else outputs), *carried, *amax]


def _pairs(scales: SiteScales) -> list[Scale] | None:
    return None if scales is None else [Scale(*pair) for pair in zip(*scales, strict=True)]


def _for_backward(call: Call, flat: Sequence[Any], outputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Any]:
    """The inputs that backward reads, each at its position, None for the others; then the outputs, if it reads them."""
    *inputs, reads_outputs = read_in_backward(call, tuple(needs))
    read = [value if kept else None for value, kept in zip(flat[: call.count], inputs, strict=True)]
    return [*read, *outputs] if reads_outputs else read
