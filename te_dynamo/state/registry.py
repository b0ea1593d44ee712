"""Every slot of this process: how a call finds its own, and when they roll.

The contract is Transformer Engine's delayed scaling: the scale used at step n comes from the amaxes before n; a roll moves
what was recorded into the histories and makes new scales. All slots of a device roll at once: when a backward of a call
that recorded has ended, or, for a forward whose backward never came, when one of its slots is visited again. A recomputed
forward runs inside a backward, reads the scales that the first one read and records the same amaxes: nothing moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from te_dynamo.recipe import DelayedScaling
from te_dynamo.state.arena import FORWARD, GRADIENT, Arena
from te_dynamo.state.group import Group
from te_dynamo.state.homes import Home, Homes
from te_dynamo.state.reduce import Reduction

DIRECTIONS = ("forward", "gradient")


@dataclass(frozen=True)
class SlotKey:
    """Which slots a site asks for.

    argument: the position of its weight among the graph's inputs; ordinal: counts the visits of that weight in one call;
    forward, gradient: the roles of its tensors; recipe: how they are scaled; attention: None, or the way from the weight's
    module to the attention whose slots these are (see `Home`).
    """

    argument: int
    ordinal: int
    forward: tuple[str, ...]
    gradient: tuple[str, ...]
    recipe: DelayedScaling
    attention: tuple[int, tuple[str, ...]] | None = None


class ScaleState:
    """The state itself; one for each process, `STATE`."""

    def __init__(self) -> None:
        self.arenas: dict[torch.device, Arena] = {}
        self.homes = Homes(self._vacate, self._forget)
        self.dependents: dict[int, list[tuple[dict[Any, Any], Any]]] = {}
        self.arrivals: list[Any] = []  # told of new slots: a scale state that was loaded before they were there
        self.reduction = Reduction()
        self.version = 0  # counts what makes a lookup stale
        self.visited: set[tuple[torch.device, int, int]] = set()
        self.backward_seen = False
        self.awaited = -1  # the backward at whose end a roll will happen

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """While open there is no scale state; what comes to be is gone afterwards."""
        before = dict(vars(self))
        self.__init__()  # type: ignore[misc]
        try:
            yield
        finally:
            self.homes.detach()
            vars(self).clear()
            vars(self).update(before)

    def arena(self, device: torch.device) -> Arena:
        if device not in self.arenas:
            self.arenas[device] = Arena(device)
        return self.arenas[device]

    # -- finding slots

    def group(
        self,
        keys: Sequence[SlotKey],
        unions: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
        args: Sequence[Any],
        device: torch.device,
        *,
        create: bool,
        process_group: Any = None,
    ) -> Group | None:
        """The group for the weights among `args`. Without `create`, None where none of its slots exists.

        unions: which of the slots, by their place in the graph's scales [F] and [G], move as one; process_group: the ranks
        whose amaxes count too.
        """
        arena = self.arena(device)
        weights = [args[k.argument] for k in keys]
        homes = [self.homes.of(w) if create else self.homes.find(w) for w in weights]
        wanted = tuple(
            [(home, (key.ordinal, role), key.recipe) for home, key in zip(homes, keys, strict=True) for role in getattr(key, direction)]
            for direction in DIRECTIONS
        )
        if not create and not any(home is not None and slot in home.slots for direction in wanted for home, slot, _ in direction):
            return None
        new: list[tuple[Home, Any]] = []
        indices: list[list[int]] = []
        for direction in (FORWARD, GRADIENT):
            if create:
                new += self._settle_in(arena, direction, wanted[direction])
            found = [home.slots.get(slot) if home is not None else None for home, slot, _ in wanted[direction]]
            indices.append([0 if entry is None else entry[2] for entry in found])
        if create:
            for key, home in zip(keys, homes, strict=True):
                if key.attention is not None:
                    home.attention[key.ordinal] = key.attention  # type: ignore[union-attr]
            self._configure(arena, wanted, indices, process_group)
            try:
                for arrival in list(self.arrivals):
                    arrival.slots_arrived(new)
            except RuntimeError:  # what was loaded does not fit: the next call is to say so again
                for home, slot in new:
                    _, direction, index = home.slots.pop(slot)
                    arena.give_back(direction, index)
                raise
            for direction in (FORWARD, GRADIENT):
                for union in unions[direction]:
                    arena.unite(direction, [indices[direction][i] for i in union])
        owners = [module for home in homes if home is not None for module in home.modules()]
        return Group(arena, (indices[FORWARD], indices[GRADIENT]), owners if create else ())

    def _settle_in(self, arena: Arena, direction: int, wanted: Iterable[tuple[Home | None, Any, Any]]) -> list[tuple[Home, Any]]:
        """Gives the slots that are not there yet their place, side by side."""
        missing = list(dict.fromkeys((home, slot) for home, slot, _ in wanted if home is not None and slot not in home.slots))
        if missing:
            for (home, slot), index in zip(missing, arena.take(direction, len(missing)), strict=True):
                home.slots[slot] = (arena, direction, index)
            self.version += 1
        return missing

    def _configure(
        self,
        arena: Arena,
        wanted: Sequence[Sequence[tuple[Any, Any, DelayedScaling]]],
        indices: Sequence[Sequence[int]],
        process_group: Any,
    ) -> None:
        for direction in (FORWARD, GRADIENT):
            by_recipe: dict[DelayedScaling, list[int]] = {}
            for (_, _, recipe), index in zip(wanted[direction], indices[direction], strict=True):
                by_recipe.setdefault(recipe, []).append(index)
            for recipe, where in by_recipe.items():
                arena.configure(direction, where, recipe)
                self.reduction.join(arena, direction, where, process_group if recipe.reduce_amax else None)

    def watch(self, weight: Tensor, table: dict[Any, Any], key: Any) -> None:
        """Removes `table[key]` when the weight dies, since its id may then name another."""
        self.dependents.setdefault(id(weight), []).append((table, key))
        self.homes.watch(weight)

    def _forget(self, identity: int) -> None:
        for table, key in self.dependents.pop(identity, ()):
            table.pop(key, None)
        self.version += 1

    def _vacate(self, home: Home) -> None:
        for arena, direction, index in home.slots.values():
            arena.give_back(direction, index)
            self.reduction.leave(arena, direction, index)
        home.slots.clear()
        self.version += 1

    # -- when slots roll

    def visit(self, group: Group | None) -> None:
        """A call is about to run that records in `group`, or not at all. Inside a backward it is a recomputed forward:
        nothing moves. One that does not record may be all that is seen outside (a reentrant checkpoint's first pass)."""
        if torch._C._current_graph_task_id() != -1:
            return
        slots = frozenset() if group is None else group.slots
        if self.backward_seen or not self.visited.isdisjoint(slots):
            self.roll()
        self.visited |= slots

    def roll(self) -> None:
        """Moves everything that was recorded into the histories."""
        for arena in self.arenas.values():
            arena.roll(self.reduction.of(arena))
        self.visited.clear()
        self.backward_seen = False

    def watch_backward(self, outputs: Sequence[Any], grad_amax: Tensor, recording: bool) -> None:
        """Notes when a backward reaches these outputs, in whichever form it is asked for, and rolls at its end.

        A forward that was recomputed inside a backward has a backward of its own within it, whose end is not the end: its
        roll waits for the next forward. Backward writes `grad_amax`, which autograd keeps as a saved tensor: its version
        is set back before each backward, so that a second one (`retain_graph=True`) is not taken for a use after a write.
        """
        version = (grad_amax._version,)
        recomputed = torch._C._current_graph_task_id() != -1

        def before_backward(*_: Any) -> None:
            torch._C._autograd._unsafe_set_version_counter((grad_amax,), version)
            if recording:
                self.backward_seen = True
                if not recomputed:
                    self._await_end()

        for function in {o.grad_fn for o in outputs if isinstance(o, Tensor) and o.grad_fn is not None}:
            function.register_prehook(before_backward)

    def _await_end(self) -> None:
        task = torch._C._current_graph_task_id()
        if task not in (-1, self.awaited):
            self.awaited = task
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self.awaited = -1
        if self.backward_seen:
            self.roll()


STATE = ScaleState()


def is_fake(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor)
