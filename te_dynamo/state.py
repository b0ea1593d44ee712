"""The scale state: one slot for each FP8 tensor of each site of each module instance.

A slot is found by the weight that a call passes in, never by the graph: one compiled graph serves many instances. Slots
live in one arena for each device, as two rows: forward tensors (E4M3) and gradients (E5M2). The contract is Transformer
Engine's delayed scaling: the scale used at step n comes from the amaxes before n; a roll moves what was recorded into the
history and makes new scales. A scale of 0 is one that was never set: the tensor then takes its own.

A roll happens lazily, at the first forward outside a backward after a backward was seen, or when a slot is visited again;
a recomputed forward inside a backward therefore reads the scales that the first one read.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from te_dynamo.lowering.fp8 import E4M3, E5M2, FLOAT32_MAX, FP8_MAX

FORWARD, GRADIENT = 0, 1
HISTORY = 1024
INITIAL_CAPACITY = 1024


@dataclass(frozen=True)
class SlotKey:
    """Which slots a site asks for: `argument` is the position of its weight among the graph's inputs, `ordinal` counts the
    visits of that weight in one call, the roles name its tensors."""

    argument: int
    ordinal: int
    forward: tuple[str, ...]
    gradient: tuple[str, ...]


class Arena:
    """All slots of one device. Tensors are [2, capacity]: a row for each direction; the history is a ring for each slot."""

    scale: Tensor
    amax: Tensor
    history: Tensor
    cursor: Tensor

    def __init__(self, device: torch.device, history: int = HISTORY) -> None:
        self.device, self.length = device, history
        self.used = [1, 1]  # index 0 stays unset: what has no slot reads it
        self.free: tuple[list[int], list[int]] = ([], [])  # given back
        self.outgrown: list[Tensor] = []  # earlier amaxes, which a backward that was pending when they grew still writes
        self.scattered: list[weakref.ref[Group]] = []
        self._allocate(INITIAL_CAPACITY)

    def _allocate(self, capacity: int) -> None:
        def grown(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            new = torch.zeros(2, capacity, *shape, dtype=dtype, device=self.device)
            old = getattr(self, name, None)
            if old is not None:
                new[:, : old.shape[1]] = old
            return new

        if hasattr(self, "amax"):
            self.outgrown.append(self.amax)
        with torch.inference_mode(False), torch.no_grad():
            self.scale = grown("scale")
            self.amax = grown("amax")  # recorded since the last roll
            self.history = grown("history", self.length)
            self.cursor = grown("cursor", dtype=torch.int64)
            self.fp8_max = torch.tensor([[FP8_MAX[E4M3]], [FP8_MAX[E5M2]]], device=self.device)

    def take(self, direction: int, count: int) -> range:
        """Unset slots, side by side."""
        free = sorted(self.free[direction])
        again = next((run for i in free if set(run := range(i, i + count)).issubset(free)), None)
        if again is not None:
            for i in again:
                self.free[direction].remove(i)
            for t in (self.scale, self.amax, self.history, self.cursor):
                t[direction, again.start : again.stop] = 0
            return again
        start = self.used[direction]
        self.used[direction] += count
        if self.used[direction] > self.scale.shape[1]:
            self._allocate(max(2 * self.scale.shape[1], self.used[direction]))
        return range(start, start + count)

    def give_back(self, direction: int, index: int) -> None:
        """The slot is nobody's now. No tensor is touched: this runs in finalizers, at any time."""
        self.free[direction].append(index)

    @torch.no_grad()
    def roll(self) -> None:
        """Recorded amaxes enter the histories, and new scales come out. A slot without a new amax does not move."""
        for reference in self.scattered:
            group = reference()
            if group is not None:
                group.flush()
        for old in self.outgrown:
            current = self.amax[:, : old.shape[1]]
            current.copy_(torch.maximum(current, old))
            old.zero_()
        n = max(self.used)
        amax, scale, history, cursor = (t[:, :n] for t in (self.amax, self.scale, self.history, self.cursor))
        moved = amax != 0
        here = cursor.unsqueeze(-1)
        history.scatter_(2, here, torch.where(moved, amax, history.gather(2, here).squeeze(-1)).unsqueeze(-1))
        largest = history.amax(-1)  # the oldest entry counts once more, then makes room
        cursor.copy_((cursor + moved) % self.length)
        here = cursor.unsqueeze(-1)
        history.scatter_(2, here, history.gather(2, here).masked_fill(moved.unsqueeze(-1), 0.0))
        fresh = (self.fp8_max.expand_as(largest) / largest).clamp(max=FLOAT32_MAX)
        scale.copy_(torch.where(moved & torch.isfinite(largest) & (largest > 0), fresh, scale))
        amax.zero_()


class Group:
    """The slots of one graph's sites for one set of weights, as the graph wants them packed."""

    fake = False
    complete = False  # whether every scale was seen to be set

    def __init__(self, arena: Arena, indices: tuple[Sequence[int], Sequence[int]], owners: Sequence[nn.Module | None]) -> None:
        self.arena = arena
        self.slots = frozenset(enumerate_slots(indices))
        self.where = tuple(_location(i, arena.device) for i in indices)
        self.owners = tuple({id(o): weakref.ref(o) for o in owners if o is not None}.values())
        with torch.inference_mode(False):
            self.sink = torch.zeros(len(indices[GRADIENT]), device=arena.device, requires_grad=True)
            self.scratch = torch.zeros(len(indices[GRADIENT]), device=arena.device)  # of calls that must not be recorded
            self.own_grad_amax = None if isinstance(self.where[GRADIENT], slice) else torch.zeros_like(self.scratch)
        if self.own_grad_amax is not None:
            arena.scattered.append(weakref.ref(self))

    @staticmethod
    def of_fake(weight: Tensor, forward: int, gradient: int) -> FakeGroup:
        """The stand-in for weights that are fake tensors (a trial run on shapes only)."""
        return FakeGroup(weight, forward, gradient)

    def start_at_one(self) -> None:
        """Gives unset scales the value with which TE starts."""
        for direction in (FORWARD, GRADIENT):
            where = self.where[direction]
            scale = self.arena.scale[direction]
            scale[where] = torch.where(scale[where] == 0, torch.ones_like(scale[where]), scale[where])

    def all_set(self, gradients: bool) -> bool:
        """Whether every scale was set; on a GPU this waits for the device."""
        directions = (FORWARD, GRADIENT) if gradients else (FORWARD,)
        return all(bool((self.arena.scale[d][self.where[d]] > 0).all()) for d in directions)

    def training(self) -> bool:
        """Whether the modules that own the weights are in training mode, as they are now (raw parameters always are)."""
        return all(owner.training for reference in self.owners if (owner := reference()) is not None)

    def scales(self, direction: int, snapshot: bool) -> Tensor:
        """[slots] f32; a snapshot is a copy that no later roll reaches."""
        where = self.where[direction]
        scale = self.arena.scale[direction]
        if isinstance(where, slice):
            return scale[where].clone() if snapshot else scale[where]
        return scale.index_select(0, where)

    def grad_amax(self, recording: bool) -> Tensor:
        """Where backward max-writes the gradients' amaxes."""
        if not recording:
            return self.scratch
        if self.own_grad_amax is not None:
            return self.own_grad_amax
        return self.arena.amax.data[GRADIENT][self.where[GRADIENT]]

    def record(self, amax: Tensor) -> None:
        """Max-writes the forward amaxes [slots] of a call."""
        self._record(FORWARD, amax)

    def flush(self) -> None:
        """Brings the gradients' amaxes of a scattered group into the arena."""
        if self.own_grad_amax is not None:
            self._record(GRADIENT, self.own_grad_amax)
            self.own_grad_amax.zero_()

    @torch.no_grad()
    def _record(self, direction: int, amax: Tensor) -> None:
        where, target = self.where[direction], self.arena.amax[direction]
        if isinstance(where, slice):
            torch.maximum(target[where], amax, out=target[where])
        else:
            target.scatter_reduce_(0, where, amax, "amax")


class FakeGroup(Group):
    """State of the right shapes, in the fake mode of the weights: nothing is recorded."""

    fake = True

    def __init__(self, weight: Tensor, forward: int, gradient: int) -> None:
        assert isinstance(weight, FakeTensor)
        with weight.fake_mode, torch.inference_mode(False):
            self._scales = [torch.zeros(n, device=weight.device) for n in (forward, gradient)]
            self.sink = torch.zeros(gradient, device=weight.device, requires_grad=True)
            self.scratch = torch.zeros(gradient, device=weight.device)

    def scales(self, direction: int, snapshot: bool) -> Tensor:
        return self._scales[direction]

    def grad_amax(self, recording: bool) -> Tensor:
        return self.scratch


def enumerate_slots(indices: tuple[Sequence[int], Sequence[int]]) -> Iterable[tuple[int, int]]:
    return ((direction, i) for direction in (FORWARD, GRADIENT) for i in indices[direction])


def _location(indices: Sequence[int], device: torch.device) -> slice | Tensor:
    """A slice where the slots stand side by side, else an index tensor."""
    start = indices[0] if indices else 0
    if list(indices) == list(range(start, start + len(indices))):
        return slice(start, start + len(indices))
    return torch.tensor(list(indices), device=device)


class ScaleState:
    """Every slot of this process, and when they roll."""

    def __init__(self) -> None:
        self.arenas: dict[torch.device, Arena] = {}
        self.slots: dict[tuple[int, int, str], int] = {}  # (id of the weight, ordinal, role) -> index in its arena
        self.taken: dict[int, list[tuple[tuple[int, int, str], Arena, int]]] = {}  # id of the weight -> name, arena, direction
        self.watched: dict[int, weakref.finalize] = {}
        self.dependents: dict[int, list[tuple[dict[Any, Any], Any]]] = {}
        self.version = 0  # counts what makes a lookup stale
        self.visited: set[tuple[torch.device, tuple[int, int]]] = set()
        self.backward_seen = False

    def arena(self, device: torch.device) -> Arena:
        if device not in self.arenas:
            self.arenas[device] = Arena(device)
        return self.arenas[device]

    # -- finding slots

    def group(self, keys: Sequence[SlotKey], args: Sequence[Any], device: torch.device, create: bool) -> Group | None:
        """The group for the weights among `args`. Without `create`, None where none of its slots exists."""
        arena = self.arena(device)
        names = (self._names(keys, args, "forward"), self._names(keys, args, "gradient"))
        known = any(name in self.slots for direction in names for name in direction)
        if not create and not known:
            return None
        indices = tuple(self._indices(arena, d, names[d], create) for d in (FORWARD, GRADIENT))
        weights = [args[k.argument] for k in keys]
        return Group(arena, indices, find_owners(weights) if create else [])  # type: ignore[arg-type]

    def _names(self, keys: Sequence[SlotKey], args: Sequence[Any], direction: str) -> list[tuple[int, int, str]]:
        return [(id(args[k.argument]), k.ordinal, role) for k in keys for role in getattr(k, direction)]

    def _indices(self, arena: Arena, direction: int, names: Sequence[tuple[int, int, str]], create: bool) -> list[int]:
        missing = [name for name in dict.fromkeys(names) if name not in self.slots]
        if create and missing:
            self.slots.update(zip(missing, arena.take(direction, len(missing)), strict=True))
            for name in missing:
                self.taken.setdefault(name[0], []).append((name, arena, direction))
            self.version += 1
        return [self.slots.get(name, 0) for name in names]

    def watch(self, weight: Tensor, table: dict[Any, Any], key: Any) -> None:
        """Removes `table[key]` and gives the weight's slots back when the weight dies, since its id may then name another."""
        identity = id(weight)
        self.dependents.setdefault(identity, []).append((table, key))
        if identity not in self.watched:
            self.watched[identity] = weakref.finalize(weight, self._forget, identity)
            self.watched[identity].atexit = False

    def _forget(self, identity: int) -> None:
        self.watched.pop(identity, None)
        for table, key in self.dependents.pop(identity, ()):
            table.pop(key, None)
        for name, arena, direction in self.taken.pop(identity, ()):
            arena.give_back(direction, self.slots.pop(name))
        self.version += 1

    # -- when slots roll

    def visit(self, group: Group | None) -> None:
        """A call is about to run that records in `group`, or not at all. Inside a backward it is a recomputed forward:
        nothing moves. One that does not record may be all that is seen outside (a reentrant checkpoint's first pass)."""
        if torch._C._current_graph_task_id() != -1:
            return
        slots = set() if group is None else {(group.arena.device, s) for s in group.slots}
        if self.backward_seen or not self.visited.isdisjoint(slots):
            self.roll()
        self.visited |= slots

    def roll(self) -> None:
        """Moves everything that was recorded into the histories."""
        for arena in self.arenas.values():
            arena.roll()
        self.visited.clear()
        self.backward_seen = False

    def watch_backward(self, outputs: Sequence[Any], grad_amax: Tensor, recording: bool) -> None:
        """Notes when a backward reaches these outputs, in whichever form it is asked for.

        Backward writes `grad_amax`, which autograd keeps as a saved tensor: its version is set back before each backward, so
        that a second one (`retain_graph=True`) is not taken for a use after a write.
        """
        version = (grad_amax._version,)

        def before_backward(*_: Any) -> None:
            self.backward_seen = self.backward_seen or recording
            torch._C._autograd._unsafe_set_version_counter((grad_amax,), version)

        for function in {o.grad_fn for o in outputs if isinstance(o, Tensor) and o.grad_fn is not None}:
            function.register_prehook(before_backward)


STATE = ScaleState()


def find_owners(tensors: Sequence[Tensor]) -> list[nn.Module | None]:
    """The modules that hold these parameters, None for a parameter that no module holds.

    A compiled graph is handed tensors only; whose they are is asked of the garbage collector, once for each new group.
    """
    wanted = {id(t) for t in tensors}
    owners: dict[int, nn.Module] = {}
    for candidate in gc.get_objects():
        if issubclass(type(candidate), nn.Module):
            for parameter in candidate.__dict__.get("_parameters", {}).values():
                if id(parameter) in wanted:
                    owners.setdefault(id(parameter), candidate)
    return [owners.get(id(t)) for t in tensors]


def is_fake(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor)
