"""Computes a site: its producer, if it has one, then its implementation; in backward, the other way round."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from te_dynamo.lowering.call import Call, flattened
from te_dynamo.lowering.fp8 import Casting, casting_of
from te_dynamo.lowering.quantized import MadeOperand, Quantized, Scale, Scales
from te_dynamo.lowering.registry import Backward, Forward, implementation_of, producer_of

WIDTH = len(Quantized._fields)


def scales_of(call: Call, slots: Sequence[Scale] | None) -> Scales:
    """The scales of a site in one direction, from its slots' scales."""
    casting = casting_of(call.recipe, call.amax_group) if call.recipe else Casting()
    return Scales(slots, call.operation.roles, casting, call.calibrating)


def in_full_precision(device: str) -> AbstractContextManager[Any]:
    """Turns off the user's autocast: a site computes in the dtypes that its call says."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def compute_forward(call: Call, flat: Sequence[Any], scales: Scales, needs: Sequence[bool], *, fake: bool = False) -> Forward:
    """flat: the inputs, then the fields of the cached weights; needs: for each input, whether its gradient is wanted."""
    implementation = implementation_of(call)
    run = implementation.fake_forward if fake else implementation.forward
    inputs, wanted = call.nested(flat[: call.count]), call.nested(needs)
    made: list[Quantized] = []
    with in_full_precision(call.device):
        if call.producer is not None:
            scale, lead = scales.at(call.operation.roles.forward[0]), inputs[0][0].shape[:-1]
            quantize = partial(implementation.quantize_operand, call, scale=scale)
            operand, made = producer_of(call.producer).forward(call.producer, inputs[0], scale, quantize)
            inputs[0], wanted[0] = MadeOperand(operand, lead), any(flattened(wanted[0]))
        if call.cached:
            weights = unflattened(flat[call.count :])
            inputs = [inputs[0], weights, *inputs[2:]] if call.cached == "inference" else [*inputs, weights]
        outputs, saved, amaxes = run(call, inputs, scales, wanted)
    return Forward(outputs, [*made, *saved], amaxes)


def compute_backward(
    call: Call,
    read: Sequence[Any],
    saved: Sequence[Quantized],
    grads: Sequence[Tensor],
    scales: Scales,
    needs: Sequence[bool],
    *,
    ahead: Tensor | None = None,
    fake: bool = False,
) -> Backward:
    """read: the inputs, None for those that backward does not read; then the outputs, if it reads them. ahead: the scale of the gradient
    that the site hands over."""
    implementation = implementation_of(call)
    run = implementation.fake_backward if fake else implementation.backward
    inputs, wanted = call.nested(read[: call.count]), call.nested(needs)
    if len(read) > call.count:
        inputs.append(list(read[call.count :]))
    with in_full_precision(call.device):
        handed: Sequence[Tensor] = ()
        if call.producer is None and call.hands_gradient:
            return implementation.quantized_gradient(call, inputs, saved, grads, _given(ahead))
        if call.producer is None:
            return run(call, inputs, saved, grads, scales, wanted)
        producer, (given, *rest), needs_of_producer = producer_of(call.producer), inputs, wanted[0]
        wanted[0], count = any(flattened(needs_of_producer)), producer.saves(call.producer)
        if "input" in call.remakes and saved[count].scale is not None:
            again = producer.operand_again(call.producer, saved[:count], saved[count].scales, scales.casting)
            saved = [*saved[:count], again, *saved[count + 1 :]]
        done = run(call, [None, *rest], saved[count:], grads, scales, wanted)
        grad, *others = done.gradients
        through: list[Any] = [None] * len(given)
        if call.hands_gradient:
            made = saved[:count]
            handed = producer.quantized_gradient(call.producer, given, made, grad, _given(ahead), call.hands_gradient)
        elif grad is not None:
            through = producer.backward(call.producer, given, saved[:count], grad, needs_of_producer)
    return Backward([through, *others], done.amaxes, handed)


def _given(scale: Tensor | None) -> Tensor:
    assert scale is not None, "a site that hands over a gradient is given its scale"
    return scale


def unflattened(fields: Sequence[Tensor | None]) -> list[Quantized]:
    return [Quantized(*fields[i : i + WIDTH]) for i in range(0, len(fields), WIDTH)]


@cache
def read_in_backward(call: Call, needs: tuple[bool, ...]) -> tuple[bool, ...]:
    """For each of a call's flat inputs, whether backward reads it; the last element says whether it reads the outputs."""
    reads = implementation_of(call).backward_reads(call, call.nested(needs))
    read = _leaves_among(call, reads)
    if call.producer is not None:
        read[0] = _leaves_among(call.producer, producer_of(call.producer).backward_reads(call.producer))
    return (*flattened(read), "outputs" in reads)


def _leaves_among(call: Call, names: Collection[str]) -> list[Any]:
    """For each of an operation's inputs, whether its name is in `names`, repeated for each of its tensors."""
    parameters = call.operation.parameters[0]
    return [[name in names] * len(flattened(spec)) for name, spec in zip(parameters, call.inputs, strict=False)]
