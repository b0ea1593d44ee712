"""Saving and loading scale state: plain tensors under readable names."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from te_dynamo.state.arena import Arena, ordered
from te_dynamo.state.homes import Home, Slot
from te_dynamo.state.names import Model, join, kind_of, modules_of, slots_of, split, weight_name
from te_dynamo.state.registry import STATE
from te_dynamo.state.te_checkpoint import entries_of_te

SCALE, HISTORY = ".scale", ".amax_history"
Entry = tuple[Tensor, Tensor]  # scale, history


class LoadResult(NamedTuple):
    """missing: entries that the model's sites need; unexpected: entries of no site that the model can have."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def scale_state(model: Model) -> ModelScaleState:
    """The FP8 scale state of a model: what to save along with its `state_dict()`, by `torch.save`, safetensors or
    `torch.distributed.checkpoint`.

    model: the module, wrapped (by `torch.compile`, DDP, FSDP, ...) or not; for a compiled function that closes over modules
    and parameters, a mapping of names to them.

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
        return list(dict.fromkeys(_site(name) for name in [*slots_of(STATE, self.model), *_pending(self.model)]))

    def state_dict(self) -> dict[str, Tensor]:
        """`<site>.<role>.scale` (f32, 0-d) and `<site>.<role>.amax_history` (f32 [amax_history_len]) of every FP8 tensor.

        The history is in Transformer Engine's order: entry 0 is the step that is being recorded, entry 1 the oldest. Entries
        that were loaded for sites not seen yet are included. No tensor shares memory with the state or with another.
        It changes nothing and waits for no other rank, so one rank may call it alone.
        """
        result: dict[str, Tensor] = {}
        snapshots: dict[Arena, _Snapshot] = {}
        for name, (home, slot) in slots_of(STATE, self.model).items():
            arena, direction, index = home.slots[slot]
            if arena not in snapshots:
                snapshots[arena] = _Snapshot(arena)
            result[name + SCALE], result[name + HISTORY] = snapshots[arena].entry(direction, index)
        for name, (scale, history) in _pending(self.model).items():
            result.setdefault(name + SCALE, scale.clone())
            result.setdefault(name + HISTORY, history.clone())
        return result

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
        """Sets the scales and histories. Entries of sites that have not been called yet are set when they are.

        Raises RuntimeError, listing every entry that has a wrong shape or lacks its counterpart; with `strict` also every entry that a
        site of this model needs and does not find, and every one that belongs to no module of this model. Nothing is loaded then.
        """
        entries, problems = _paired(state_dict)
        slots = slots_of(STATE, self.model)
        paths = _paths(self.model)
        unexpected = [name for name in entries if name not in slots and not _may_appear(name, paths)]
        missing = [name for name in slots if name not in entries]
        found = [name for name in entries if name in slots]
        for name in found:
            problems += _mismatches(name, entries[name], *slots[name])
        result = LoadResult(*([name + ending for name in names for ending in (SCALE, HISTORY)] for names in (missing, unexpected)))
        if strict:
            problems += [f"missing: {key}" for key in result.missing_keys] + [f"unexpected: {key}" for key in result.unexpected_keys]
        if problems:
            listed = "\n  ".join(problems)
            raise RuntimeError(f"te_fp8: the scale state does not fit this model:\n  {listed}\nRemedy: {_remedy(strict)}")
        _discard_pending(self.model)
        for name in found:
            _write(*slots[name], *entries[name])
        later = {name: entry for name, entry in entries.items() if name not in slots and name not in unexpected}
        if later:
            STATE.pending_loads.append(_PendingLoad(self.model, later))
            STATE.version += 1  # inference has no slots of its own, and looks again
        return result

    def load_te(self, state_dict: Mapping[str, Any], names: Mapping[str, Any] | Callable[[str], Any] | None = None) -> LoadResult:
        """Sets the scales and histories from a Transformer Engine model's `state_dict()` (its `_extra_state` entries).

        names: a mapping or a function from the path of a TE module to the path of the linear here, or to a tuple of paths,
        one for each GEMM of the module in its order (a LayerNormMLP has two). Paths that a mapping lacks stay the same
        here; None leaves a module out. The entries are read by an unpickler that admits only tensors and plain containers.

        Raises ValueError for an entry that holds anything else, and RuntimeError as does `load_state_dict(strict=False)`; entries
        without a counterpart are returned as unexpected.
        """
        return self.load_state_dict(entries_of_te(state_dict, names), strict=False)

    def reset(self) -> None:
        """Forgets every scale and history: the next call is like a first one."""
        _discard_pending(self.model)
        for home, slot in slots_of(STATE, self.model).values():
            arena, direction, index = home.slots[slot]
            arena.clear(direction, [index])


class _Snapshot:
    """A copy of an arena as the next roll will leave it; as it is now, if that roll needs other ranks."""

    def __init__(self, arena: Arena) -> None:
        n = max(arena.used)
        self.length = arena.length
        self.amax, self.scale, self.history, self.cursor = (
            t[:, :n].clone() for t in (arena.amax, arena.scale, arena.history, arena.cursor)
        )
        if STATE.reduction.of(arena) is None:
            arena.drop_infinite(self.amax)
            arena.advance(self.amax, self.scale, self.history, self.cursor)
            self.amax.zero_()

    def entry(self, direction: int, index: int) -> Entry:
        at = (direction, index)
        history = ordered(self.history[at], self.cursor[at], int(self.length[at]))
        history[0] = torch.maximum(history[0], self.amax[at])
        return self.scale[at].clone(), history


class _PendingLoad:
    """A scale state that was loaded before its slots existed."""

    def __init__(self, model: Model, entries: dict[str, Entry]) -> None:
        self.model = weakref.ref(model) if isinstance(model, nn.Module) else (lambda: model)
        self.entries = {name: (scale.clone(), history.clone()) for name, (scale, history) in entries.items()}

    def apply(self, new: list[tuple[Home, Slot]]) -> None:
        """Sets those of the new slots that it has entries for."""
        model = self.model()
        if model is None or not self.entries:
            STATE.pending_loads.remove(self)
            return
        new_slots = {(id(home), slot) for home, slot in new}
        for name, (home, slot) in slots_of(STATE, model).items():
            if name in self.entries and (id(home), slot) in new_slots:
                problems = _mismatches(name, self.entries[name], home, slot)
                if problems:
                    raise RuntimeError(f"te_fp8: the scale state that was loaded does not fit: {problems[0]}\nRemedy: {_remedy(False)}")
                _write(home, slot, *self.entries.pop(name))


def _pending(model: Model) -> dict[str, Entry]:
    return {name: entry for load in STATE.pending_loads if load.model() is model for name, entry in load.entries.items()}


def _discard_pending(model: Model) -> None:
    STATE.pending_loads[:] = [load for load in STATE.pending_loads if load.model() is not model]


def _paired(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Entry], list[str]]:
    """The entries by slot, and what is wrong with the keys."""
    problems = [f"unexpected: {key} (keys end in {SCALE} or {HISTORY})" for key in state_dict if not key.endswith((SCALE, HISTORY))]
    names = dict.fromkeys(key.removesuffix(SCALE).removesuffix(HISTORY) for key in state_dict if key.endswith((SCALE, HISTORY)))
    entries = {}
    for name in names:
        absent = [name + ending for ending in (SCALE, HISTORY) if state_dict.get(name + ending) is None]
        problems += [f"missing: {key}, whose counterpart is there" for key in absent]
        if not absent:
            entries[name] = (state_dict[name + SCALE].detach().float(), state_dict[name + HISTORY].detach().float())
    return entries, problems


def _mismatches(name: str, entry: Entry, home: Home, slot: Slot) -> list[str]:
    arena, direction, index = home.slots[slot]
    scale, history = entry
    length = int(arena.length[direction, index])
    problems = []
    if scale.numel() != 1:
        problems.append(f"wrong shape: {name}{SCALE} has {list(scale.shape)}, the site needs one number")
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
    """The site that a slot of this name belongs to."""
    path, role = split(name) or (name, "")
    return join(path, kind_of(role)) if path else path


def _paths(model: Model) -> dict[str, bool]:
    """The names that a site of this model may have, and whether each is a weight's."""
    paths: dict[str, bool] = {}
    for path, owner in modules_of(model):
        paths[path] = isinstance(owner, Tensor)
        if isinstance(owner, nn.Module):
            paths |= dict.fromkeys((weight_name(path, attribute) for attribute in owner._parameters), True)
    return paths


def _may_appear(name: str, paths: Mapping[str, bool]) -> bool:
    """Whether a slot of this name could belong to a site that was not called yet."""
    path, role = split(name) or ("", "")
    head, _, last = path.rpartition(".")
    is_later_visit = last.isdigit() and int(last) > 0 and paths.get(head, False)
    return bool(role) and (is_later_visit or (path in paths and (paths[path] or bool(kind_of(role)))))
