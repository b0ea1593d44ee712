"""Releases the high-precision values of frozen weights whose FP8 copies are kept."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from te_dynamo.fp8_weight import FP8Weight
from te_dynamo.ir.linear import GemmRows
from te_dynamo.lowering.fp8 import FP8_MAX
from te_dynamo.lowering.registry import implementation_of
from te_dynamo.passes.lower import View
from te_dynamo.state import STATE
from te_dynamo.weight_cache import SHARED, SharedCopies, WeightCache, key_of, sample_of, state_of


@dataclass
class Released:
    """What `release_high_precision` did. names: of the released parameters; left: why each other one was not released, by name; freed:
    bytes."""

    names: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    freed: int = 0

    def __str__(self) -> str:
        lines = [f"{len(self.names)} weights released, {self.freed / 2**20:.1f} MiB; {len(self.left)} parameters left"]
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.left.items())])


class _Copy(NamedTuple):
    """One of the weights that some kept copies were made from. identities: the ids of all of them."""

    kept: SharedCopies
    identities: tuple[int, ...]
    member: int

    def is_current(self, parameters: Mapping[int, Tensor]) -> bool:
        """Whether the weights are what the copies were made from."""
        weights = [parameters[i] for i in self.identities if i in parameters]
        seen = torch.cat([sample_of(w) for w in weights]) if weights else torch.empty(0)
        return len(weights) == len(self.identities) and self.kept.made_of([state_of(w) for w in weights], seen)

    def of(self, p: Tensor) -> FP8Weight | str:
        """What replaces the weight from now on; or why nothing can."""
        cached = self.kept.weights
        how, across = implementation_of(cached.call).kept_as(cached.call), _across(cached.views[self.member], p)
        if how is None:
            return "its FP8 copy has other scales than one for the weight or for each row"
        if across is None:
            return "a part of it is the weight of a linear, or another form of it"
        number, gemm = next((i, gemm) for i, gemm in enumerate(how.gemms) if self.member in gemm)
        quantized = cached.quantized(self.kept.copies)[number]
        assert quantized.data is not None and quantized.scale_inv is not None
        data, inverse = quantized.data, quantized.scale_inv
        if inverse.numel() > 1:
            inverse = inverse.reshape(*data.shape[:-1], 1)
        if len(gemm) > 1:
            rows, at = GemmRows.of(cached.call.attributes), (gemm.index(self.member), len(gemm))
            data, inverse = rows.rows_in_place(data, *at), rows.rows_in_place(inverse, *at) if inverse.dim() else inverse
        top = None if how.power_2_scale else (how.top, float(torch.tensor(min(how.top, FP8_MAX[data.dtype])).to(data.dtype)))
        return FP8Weight(data, inverse, p.shape, p.stride(), p.dtype, across, top)


def release_high_precision(model: nn.Module) -> Released:
    """Releases the high-precision values of frozen weights whose FP8 copies a compiled graph keeps, which halves the memory of weights.

    Freeze the parameters (`requires_grad_(False)`), call the compiled model once (in training twice: the first step only measures), then
    call this with the model that was compiled, or with the result of `torch.compile`. Graphs are compiled once more at the next call. From
    then on a weight's value is that of its FP8 copy: anything else that reads the weight (a call of the uncompiled model, a graph that
    quantizes it differently) gets that, in the weight's dtype. Writing or saving it raises RuntimeError; the adapters of a LoRA can be
    written and saved. `load_state_dict` restores high precision.

    A weight is released if one module holds it, and if graphs read it only in FP8, with one scale for the tensor or for each row.
    Returns what was released, and for each other parameter why not.
    """
    result, found = Released(), dict[int, list[_Copy]]()
    parameters, changed = {id(p): p for p in model.parameters()}, set[int]()
    for copy in _copies():
        identity = copy.identities[copy.member]
        if copy.is_current(parameters):
            found.setdefault(identity, []).append(copy)
        else:
            changed.add(identity)
    names = {id(p): name.removeprefix("_orig_mod.") for name, p in model.named_parameters()}
    made = {i: _reason(p, found.get(i, []), changed=i in changed) or found[i][0].of(p) for i, p in parameters.items()}

    def alone(identity: int) -> bool:
        """Whether a weight that would be released shares a GEMM, and so a copy, with one that would not."""
        others = {other for copy in found.get(identity, ()) for other in copy.identities}
        return isinstance(made[identity], FP8Weight) and not all(isinstance(made.get(other), FP8Weight) for other in others)

    while left := [identity for identity in made if alone(identity)]:
        made |= dict.fromkeys(left, "it shares one FP8 copy with a weight that is left")
    replaced: dict[int, nn.Parameter] = {}
    for p in parameters.values():
        name, weight = names[id(p)], made[id(p)]
        if isinstance(weight, str):
            result.left[name] = weight
            continue
        weight.kept = [copy.kept for copy in found[id(p)]]
        replaced[id(p)] = nn.Parameter(weight, requires_grad=False)
        result.names.append(name)
        result.freed += p.numel() * p.element_size()
    _replace(model, replaced)
    for cache in list(WeightCache.everyone):  # they refer to what was replaced
        cache.drop(set(replaced))
    for copy in (copy for i in replaced for copy in found[i]):
        weights = [replaced[i] for i in copy.identities]
        SHARED[key_of(copy.kept.weights, weights)] = copy.kept
        copy.kept.states, copy.kept.seen, copy.kept.gemms = [state_of(w) for w in weights], torch.empty(0, dtype=torch.uint8), []
    return result


def _copies() -> Iterator[_Copy]:
    """The copies of every compiled graph whose weights are still those that it was called with."""
    for weight_cache in list(WeightCache.everyone):
        for key, copies in weight_cache.entries.items():
            if not copies.held(key):
                continue
            start = 0
            for kept in copies.kept:
                identities = key[start : (start := start + len(kept.weights.arguments))]
                yield from (_Copy(kept, identities, member) for member in range(len(identities)))


def _reason(p: nn.Parameter, copies: Sequence[_Copy], *, changed: bool) -> str | None:
    """Why a parameter cannot be released, for reasons other than the copy's form; None if it can."""
    if isinstance(p, FP8Weight):
        return "it was released before"
    if p.requires_grad:
        return "it learns (requires_grad)"
    if not copies and changed:
        return "it, or a weight of its GEMM, changed since the compiled model was called, or cannot be watched"
    if not copies:
        return "no compiled graph keeps an FP8 copy of it"
    if any(copy.kept.weights.read[copy.member] for copy in copies):
        return "a graph reads it in high precision too"
    if len(STATE.homes.holders(p).modules) != 1:
        return "not one module holds it, but several, or none"
    if p.untyped_storage().nbytes() != p.numel() * p.element_size():
        return "it is a view of a larger tensor, which would stay"
    return None


def _across(view: View, p: Tensor) -> bool | None:
    """Whether a view of a parameter is the parameter with its last two dimensions exchanged (True), or itself (False); None if neither."""
    whole = torch.empty_strided(p.shape, p.stride(), device="meta")
    seen = view.without_casts()(whole)
    for across, same in ((False, whole), (True, whole.mT)):
        if seen.shape == same.shape and seen.stride() == same.stride():
            return across
    return None


def _replace(model: nn.Module, replaced: Mapping[int, nn.Parameter]) -> None:
    for module in model.modules():
        places = [name for name, p in module._parameters.items() if id(p) in replaced]
        for name in places:
            module._parameters[name] = replaced[id(module._parameters[name])]
        if places and module not in _WATCHED:
            _WATCHED.add(module)
            module.register_load_state_dict_pre_hook(_make_room)


_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _make_room(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before a module loads: makes a high-precision parameter for each released weight that is loaded."""
    for name, p in list[tuple[str, Any]](module._parameters.items()):
        if isinstance(p, FP8Weight) and prefix + name in state_dict:
            room = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device)
            module._parameters[name] = nn.Parameter(room, requires_grad=False)
