"""Saving and loading scale state: plain tensors under readable names."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from te_dynamo.state.homes import Home, Slot
from te_dynamo.state.names import join, named_modules, roots_of, slots_of
from te_dynamo.state.registry import STATE
from te_dynamo.state.te_checkpoint import entries_of_te

SCALE, HISTORY = ".scale", ".amax_history"
ROLES = ("input", "weight", "grad_output", *(f"attention.{name}" for name in ("q", "k", "v", "s", "o", "do", "dp", "dqkv")))

Model = nn.Module | Mapping[str, Any]


class LoadResult(NamedTuple):
    """missing: entries that the model's sites wanted; unexpected: entries that belong to no site that can be there."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def scale_state(model: Model) -> ModelScaleState:
    """The FP8 scale state of a model: what `torch.save`, safetensors or `torch.distributed.checkpoint` are to keep beside its
    `state_dict()`.

    model: the module, wrapped or not (by `torch.compile`, DDP, FSDP, ...); or, for a compiled function that closes over
    them, a mapping of names to modules and parameters.

        torch.save({"model": model.state_dict(), "scales": te_dynamo.scale_state(model).state_dict()}, path)
        te_dynamo.scale_state(model).load_state_dict(torch.load(path)["scales"])    # before or after the first call
    """
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(f"te_fp8: scale_state takes a module, or a mapping of names to modules and parameters, not {type(model).__name__}")
    return ModelScaleState(model)


class ModelScaleState:
    """See `scale_state`."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def sites(self) -> list[str]:
        """The names of the sites that have state: `state_dict()` has `<site>.<role>.scale` for each of their tensors."""
        return list(dict.fromkeys(_site(name) for name in [*slots_of(STATE, self.model), *_waiting(self.model)]))

    def state_dict(self) -> dict[str, Tensor]:
        """`<site>.<role>.scale` (f32, 0-d) and `<site>.<role>.amax_history` (f32 [amax_history_len]) of every FP8 tensor.

        The history is as Transformer Engine keeps it: entry 0 is the step that is being recorded, entry 1 the oldest. What
        was loaded for sites that were not seen yet is among them. No tensor shares memory with the state or another.
        It changes nothing and waits for no other rank, so one rank may call it alone.
        """
        result: dict[str, Tensor] = {}
        arenas: dict[int, Any] = {}
        for name, (home, slot) in slots_of(STATE, self.model).items():
            arena, direction, index = home.slots[slot]
            if id(arena) not in arenas:
                arenas[id(arena)] = _Settled(arena)
            result[name + SCALE], result[name + HISTORY] = arenas[id(arena)].slot(direction, index)
        for name, values in _waiting(self.model).items():
            for ending, value in zip((SCALE, HISTORY), values, strict=True):
                result.setdefault(name + ending, value.clone())
        return result

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
        """Sets the scales and histories. What belongs to sites that were not called yet is set when they are.

        Raises RuntimeError, naming every entry, for one of a wrong shape or without its counterpart; with `strict` also
        for one that a site of this model wants and does not find, and for one that belongs to no module of this model.
        Nothing is loaded then.
        """
        entries, problems = _paired(state_dict)
        slots = slots_of(STATE, self.model)
        known = _paths(self.model)
        unexpected = [name for name in entries if name not in slots and not _may_appear(name, known)]
        missing = [name for name in slots if name not in entries]
        for name in entries.keys() & slots.keys():
            problems += _misfits(name, entries[name], *slots[name])
        if strict:
            problems += [f"missing: {name}{ending}" for name in missing for ending in (SCALE, HISTORY)]
            problems += [f"unexpected: {name}{ending}" for name in unexpected for ending in (SCALE, HISTORY)]
        if problems:
            listed = "\n  ".join(problems)
            raise RuntimeError(f"te_fp8: the scale state does not fit this model:\n  {listed}\nRemedy: {_remedy(strict)}")
        _discard_waiting(self.model)
        for name in [n for n in entries if n in slots]:
            _write(*slots[name], *entries[name])
        later = {n: v for n, v in entries.items() if n not in slots and n not in unexpected}
        if later:
            STATE.arrivals.append(_Arrival(self.model, later))
        return LoadResult([n + e for n in missing for e in (SCALE, HISTORY)], [n + e for n in unexpected for e in (SCALE, HISTORY)])

    def load_te(self, state_dict: Mapping[str, Any], names: Mapping[str, Any] | Callable[[str], Any] | None = None) -> LoadResult:
        """Takes the scales and histories out of a Transformer Engine model's `state_dict()` (its `_extra_state` entries).

        names: how a TE module's path is called here: a mapping or a function from its path to that of the linear here, or
        to a tuple of paths, one for each GEMM of the module in its order (a LayerNormMLP has two); paths that it does not
        name keep theirs, and None leaves a module out. The entries are read by an unpickler that admits tensors and plain
        containers only.

        Raises ValueError for an entry that holds anything else, and as `load_state_dict(strict=False)`; entries without a
        counterpart are returned as unexpected.
        """
        return self.load_state_dict(entries_of_te(state_dict, names), strict=False)

    def reset(self) -> None:
        """Forgets every scale and history: the next call begins as a first one does."""
        _discard_waiting(self.model)
        for home, slot in slots_of(STATE, self.model).values():
            arena, direction, index = home.slots[slot]
            arena.clear(direction, [index])


class _Settled:
    """A copy of an arena as the next roll will leave it, or as it stands where that roll takes other ranks."""

    def __init__(self, arena: Any) -> None:
        self.arena = arena
        arena.settle()
        n = max(arena.used)
        self.amax, self.scale, self.history, self.cursor = (
            t[:, :n].clone() for t in (arena.amax, arena.scale, arena.history, arena.cursor)
        )
        if STATE.reduction.of(arena) is None:
            arena.drop_infinite(self.amax)
            arena.advance(self.amax, self.scale, self.history, self.cursor)
            self.amax.zero_()

    def slot(self, direction: int, index: int) -> tuple[Tensor, Tensor]:
        length = int(self.arena.length[direction, index])
        order = (self.cursor[direction, index] + torch.arange(length, device=self.cursor.device)) % length
        history = self.history[direction, index, order]
        history[0] = torch.maximum(history[0], self.amax[direction, index])
        return self.scale[direction, index].clone(), history


class _Arrival:
    """Scale state that waits for its sites."""

    def __init__(self, model: Model, entries: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.reference = weakref.ref(model) if isinstance(model, nn.Module) else (lambda: model)
        self.entries = {name: (scale.clone(), history.clone()) for name, (scale, history) in entries.items()}

    def slots_arrived(self, new: list[tuple[Home, Slot]]) -> None:
        """Sets those of the new slots that it has entries for."""
        model = self.reference()
        if model is None or not self.entries:
            STATE.arrivals.remove(self)
            return
        arrived = {(id(home), slot) for home, slot in new}
        for name, (home, slot) in slots_of(STATE, model).items():
            if name in self.entries and (id(home), slot) in arrived:
                problems = _misfits(name, self.entries[name], home, slot)
                if problems:
                    raise RuntimeError(f"te_fp8: the scale state that was loaded does not fit: {problems[0]}\nRemedy: {_remedy(False)}")
                _write(home, slot, *self.entries.pop(name))


def _waiting(model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: value for arrival in STATE.arrivals if arrival.reference() is model for name, value in arrival.entries.items()}


def _discard_waiting(model: Model) -> None:
    STATE.arrivals[:] = [a for a in STATE.arrivals if a.reference() is not model]


def _paired(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """(scale, history) by slot, and what is wrong with the entries themselves."""
    problems = [f"unexpected: {key} (keys end in {SCALE} or {HISTORY})" for key in state_dict if not key.endswith((SCALE, HISTORY))]
    names = dict.fromkeys(key.removesuffix(SCALE).removesuffix(HISTORY) for key in state_dict if key.endswith((SCALE, HISTORY)))
    entries = {}
    for name in names:
        pair = state_dict.get(name + SCALE), state_dict.get(name + HISTORY)
        absent = [name + ending for ending, value in zip((SCALE, HISTORY), pair, strict=True) if value is None]
        problems += [f"missing: {key}, whose counterpart is there" for key in absent]
        if not absent:
            entries[name] = (pair[0].detach().float(), pair[1].detach().float())  # type: ignore[union-attr]
    return entries, problems


def _misfits(name: str, entry: tuple[Tensor, Tensor], home: Home, slot: Slot) -> list[str]:
    arena, direction, index = home.slots[slot]
    scale, history = entry
    length = int(arena.length[direction, index])
    problems = []
    if scale.numel() != 1:
        problems.append(f"wrong shape: {name}{SCALE} has {list(scale.shape)}, the site wants one number")
    if history.shape != (length,):
        problems.append(f"wrong shape: {name}{HISTORY} has {list(history.shape)}, the site's recipe has amax_history_len={length}")
    return problems


def _write(home: Home, slot: Slot, scale: Tensor, history: Tensor) -> None:
    arena, direction, index = home.slots[slot]
    arena.write(direction, index, scale.reshape(()).to(arena.device), history.to(arena.device))


def _remedy(strict: bool) -> str:
    remedy = "load what was saved from the same model under the same recipe"
    return f"{remedy}, or pass strict=False to leave the other sites as they are." if strict else f"{remedy}."


def _site(name: str) -> str:
    """The site's part of a slot's name."""
    for role in ROLES:
        if name == role or name.endswith("." + role):
            end = len(name) - len(role) - 1
            return name[: max(0, end)] + (".attention" if role.startswith("attention.") and end > 0 else "")
    return name


def _paths(model: Model) -> dict[str, bool]:
    """The names that a site of this model may have, and whether each is a weight's."""
    found: dict[str, bool] = {}
    for prefix, root in roots_of(model):
        if isinstance(root, Tensor):
            found[prefix] = True
            continue
        for path, module in named_modules(root):
            base = join(prefix, path)
            found[base] = "weight" in module._parameters
            found |= dict.fromkeys((join(base, attribute) for attribute in module._parameters if attribute != "weight"), True)
    return found


def _may_appear(name: str, paths: Mapping[str, bool]) -> bool:
    """Whether a slot of this name could be one of a site that was not called yet."""
    for role in ROLES:
        if name == role or name.endswith("." + role):
            path = name[: max(0, len(name) - len(role) - 1)]
            head, _, last = path.rpartition(".")
            is_later_visit = last.isdigit() and int(last) > 0 and paths.get(head, False)
            return is_later_visit or (path in paths and (paths[path] or role.startswith("attention.")))
    return False
