"""The two operators behind every opaque implementation, one for forward and one for backward; a `Call` tells them what to do.

They are opaque because Inductor's C++ for every quantization, each reading its scale at a different offset, would make compile time grow
with the number of sites. An operator returns one list of tensors that share no memory with anything: Inductor's C++ wrapper supports no
other results. A tensor that is a view of another is copied.

    site_fwd   [amax, contents, *outputs, *fields of the saved tensors]
    site_bwd   [amax, *the gradients that are wanted]

`contents` has no elements. Its shape describes what follows: (0, the number of outputs, and for each saved `Quantized` a bit mask of the
fields that it has).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from te_dynamo.ir.graph import fake_like
from te_dynamo.lowering.call import Call, flattened
from te_dynamo.lowering.compute import WIDTH, compute_backward, compute_forward, scales_of, unflattened
from te_dynamo.lowering.quantized import Quantized, Scale
from te_dynamo.lowering.registry import Packed, implementation_of

# They take tensors of any strides, so that nothing is copied for them; gradients may be rounded stochastically.
FORWARD_TAGS = (torch.Tag.flexible_layout,)
BACKWARD_TAGS = (torch.Tag.flexible_layout, torch.Tag.nondeterministic_seeded)


@dataclass(frozen=True)
class PackedSlots(Sequence[Scale]):
    """The slots of a site within its graph's packed scales, from `start` on, each extracted on access."""

    packed: Tensor
    start: int

    def __getitem__(self, place: Any) -> Any:
        value = self.packed[self.start + place]
        return Scale(value, value.reciprocal())

    def __len__(self) -> int:
        return self.packed.shape[0] - self.start


def opaque_forward(
    call: Call, flat: Sequence[Any], scales: tuple[Tensor, int] | None, needs: Sequence[bool]
) -> tuple[list[Tensor], list[Quantized], Tensor | None]:
    """(outputs, saved, amax) of a site, by the operator."""
    packed, start = scales or (None, 0)
    outputs, saved, amax = forward_results(torch.ops.te_dynamo.site_fwd(call.key, list(flat), packed, start, list(needs)))
    return outputs, saved, amax if call.records else None


def forward_results(made: Sequence[Tensor]) -> tuple[list[Tensor], list[Quantized], Tensor]:
    """(outputs, saved, amax) from the results of `site_fwd`."""
    amax, contents, *rest = made
    _, outputs, *fields = contents.shape
    leaves = iter(rest[outputs:])
    return rest[:outputs], [Quantized(*[next(leaves) if has >> i & 1 else None for i in range(WIDTH)]) for has in fields], amax


def opaque_backward(
    call: Call,
    read: Sequence[Any],
    saved: Sequence[Quantized],
    grads: Sequence[Tensor],
    scales: tuple[Tensor, int] | None,
    needs: Sequence[bool],
) -> tuple[list[Tensor | None], Tensor | None]:
    """(a gradient for each flat input, None where it is not wanted; amax), by the operator."""
    packed, start = scales or (None, 0)
    amax, *made = torch.ops.te_dynamo.site_bwd(call.key, list(read), flattened(saved), list(grads), packed, start, list(needs))
    present = iter(made)
    return [next(present) if needed else None for needed in needs], amax if call.records else None


def forward(
    call: str, inputs: list[Tensor | None], scale: Tensor | None, start: int, needs: list[bool], fake: bool = False
) -> list[Tensor]:
    parsed = Call.parse(call)
    made = None if fake or parsed.producer is not None else implementation_of(parsed).packed_forward(parsed, inputs, scale, start, needs)
    if made is None:
        done = compute_forward(parsed, inputs, scales_of(parsed, None if scale is None else PackedSlots(scale, start)), needs, fake=fake)
        saved = done.saved if any(needs) or parsed.records else []
        apart = iter(_apart([*done.outputs, *_leaves(saved)], [*inputs, scale]))
        outputs = [next(apart) for _ in done.outputs]
        saved = [Quantized(*[None if t is None else next(apart) for t in q]) for q in saved]
        made = Packed(_amax(done.amaxes, parsed, outputs[0]), outputs, saved)
    fields = (sum([1 << i for i, t in enumerate(q) if t is not None]) for q in made.saved)
    return [made.amaxes, made.amaxes.new_empty((0, len(made.results), *fields)), *made.results, *_leaves(made.saved)]


def backward(
    call: str,
    inputs: list[Tensor | None],
    saved: list[Tensor | None],
    grads: list[Tensor],
    scale: Tensor | None,
    start: int,
    needs: list[bool],
    fake: bool = False,
) -> list[Tensor]:
    parsed = Call.parse(call)
    made = None
    if not fake and parsed.producer is None:
        made = implementation_of(parsed).packed_backward(parsed, inputs, saved, grads, scale, start, needs)
    if made is None:
        scales = scales_of(parsed, None if scale is None else PackedSlots(scale, start))
        done = compute_backward(parsed, inputs, unflattened(saved), grads, scales, needs, fake=fake)
        wanted = [g for g, needed in zip(flattened(done.gradients), needs, strict=True) if needed]
        made = Packed(_amax(done.amaxes, parsed, grads[0]), _apart(wanted, [*inputs, *saved, *grads, scale]))
    return [made.amaxes, *made.results]


def _leaves(saved: Sequence[Quantized]) -> list[Tensor]:
    return [t for q in saved for t in q if t is not None]


def _amax(amaxes: Sequence[Tensor], call: Call, like: Tensor) -> Tensor:
    if not call.records or not amaxes:
        return like.new_empty(0, dtype=torch.float32)
    return torch.stack([a.amax() if a.numel() else a.sum() for a in amaxes])


def _apart(made: Sequence[Tensor], given: Sequence[Tensor | None]) -> list[Tensor]:
    """`made`, with a copy of each tensor that shares memory with one of `given` or with an earlier result."""
    seen = {t.untyped_storage()._cdata for t in given if t is not None}
    result = []
    for t in made:
        storage = t.untyped_storage()._cdata
        result.append(t.clone() if storage in seen else t)
        seen.add(storage)
    return result


def _remembered(run: Callable[..., Any]) -> Callable[..., Any]:
    """A fake implementation that runs once for each call and input shapes, whatever the offset of its slots: the layers of a model repeat.
    Results for symbolic shapes are not cached."""
    known: dict[Any, Any] = {}

    def fake(call: str, *args: Any) -> Any:
        key = (call, *(_described(a) for a in args if not isinstance(a, int)))
        if _is_symbolic(key):
            return run(call, *args, fake=True)
        like = next(t for t in flattened(args) if isinstance(t, Tensor))
        if key not in known:
            results = run(call, *args, fake=True)
            known[key] = _described(results)
            return results
        return _made(known[key], like)

    return fake


class _Like(NamedTuple):
    """What must be known about a tensor to create another like it."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Like(tuple(value.shape), value.stride(), value.dtype)
    return tuple(map(_described, value)) if isinstance(value, (list, tuple)) else value


def _is_symbolic(description: Any) -> bool:
    return any(map(_is_symbolic, description)) if isinstance(description, tuple) else isinstance(description, torch.SymInt)


def _made(description: Any, like: Tensor) -> Any:
    if not isinstance(description, _Like):
        return [_made(d, like) for d in description]
    return fake_like(like, description.shape, description.dtype, description.stride)


def _define(name: str, schema: str, tags: Sequence[torch.Tag], run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Not with `custom_op`, whose Python wrapper takes longer per call than a small GEMM: tests make the checks that it would make."""
    torch.library.define(f"te_dynamo::{name}", schema, tags=(*tags, torch.Tag.pt2_compliant_tag))
    torch.library.impl(f"te_dynamo::{name}", "default", run)
    torch.library.register_fake(f"te_dynamo::{name}", _remembered(fake))


def _without_views(*args: Any) -> list[Tensor]:
    """`forward`. A result that was reshaped is no view to autograd, which would forbid a user to write it where other views of it are
    returned."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return forward(*args)


_define(
    "site_fwd",
    "(str call, Tensor?[] inputs, Tensor? scale, int start, bool[] needs) -> Tensor[]",
    FORWARD_TAGS,
    lambda call, inputs, scale, start, needs: _without_views(call, inputs, scale, start, needs),
    forward,
)
_define(
    "site_bwd",
    "(str call, Tensor?[] inputs, Tensor?[] saved, Tensor[] grads, Tensor? scale, int start, bool[] needs) -> Tensor[]",
    BACKWARD_TAGS,
    lambda call, inputs, saved, grads, scale, start, needs: backward(call, inputs, saved, grads, scale, start, needs),
    backward,
)


@register_flop_formula(torch.ops.te_dynamo.site_fwd)
def _forward_flops(key: str, inputs: Any, *_: Any, **__: Any) -> int:
    call = Call.parse(key)
    shapes = call.nested(inputs[: call.count])
    if call.producer is not None:  # the operand has the leading sizes of its producer's first input
        shapes[0] = (*shapes[0][0][:-1], call["in_features"])
    return implementation_of(call).flops(call, shapes)


@register_flop_formula(torch.ops.te_dynamo.site_bwd)
def _backward_flops(key: str, inputs: Any, saved: Any, grads: Any, scale: Any, start: int, needs: Any, **_: Any) -> int:
    call = Call.parse(key)
    wanted = call.nested(needs)
    if call.producer is not None:
        wanted[0] = any(flattened(wanted[0]))
    return implementation_of(call).backward_flops(call, call.nested(inputs), unflattened(saved), grads, wanted)
