"""All slots of this process: how a call finds its own, and when they roll.

The contract is Transformer Engine's delayed scaling: the scale used at step n comes from the amaxes before n; a roll moves the recorded
amaxes into the histories and computes new scales. All slots of a device roll at once: when the backward of a call that recorded has
ended or, if a forward's backward never came, when one of its slots is visited again. A recomputed forward runs inside a backward, reads
the same scales as the first one and records the same amaxes, so nothing moves; and slots of a checkpointed forward do not move, whoever's
backward ends, as long as it may be recomputed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from te_dynamo.recipe import DelayedScaling
from te_dynamo.state.arena import DIRECTIONS, GRADIENT, Arena
from te_dynamo.state.group import Group
from te_dynamo.state.homes import Home, Homes, Location, Slot
from te_dynamo.state.reduce import Reduction


@dataclass(frozen=True)
class SlotKey:
    """Which slots a site asks for.

    argument: the position of its weight among the graph's inputs; ordinal: counts the visits of that weight in one call;
    forward, gradient: the roles of its tensors; recipe: how they are scaled; route: None, or the relative path from the
    weight's module to the site without weights whose slots these are (see `Home`).
    """

    argument: int
    ordinal: int
    forward: tuple[str, ...]
    gradient: tuple[str, ...]
    recipe: DelayedScaling
    route: tuple[int, tuple[str, ...]] | None = None


class _Wanted(NamedTuple):
    """A slot that a graph asks for. home: None if the weight has no slots."""

    home: Home | None
    slot: Slot
    recipe: DelayedScaling

    def position(self) -> int:
        """Its index in the arena; 0, where nothing is ever set, if it does not exist."""
        entry = None if self.home is None else self.home.slots.get(self.slot)
        return 0 if entry is None else entry[2]


class ScaleState:
    """The state itself; one for each process, `STATE`."""

    def __init__(self) -> None:
        self.arenas: dict[torch.device, Arena] = {}
        self.homes = Homes(self._release, self._forget)
        # By the id of a weight or of its holder: the table entries to drop when that is gone, as (id of the table, key) -> the table.
        self.cache_entries: dict[int, dict[tuple[int, Any], dict[Any, Any]]] = {}
        self.pending_loads: list[Any] = []  # scale states that were loaded before their slots existed
        self.reduction = Reduction()
        self.version = 0  # changes whenever a lookup may have become stale
        self.checkpointed: weakref.WeakSet[Group] = weakref.WeakSet()  # may await a recomputation, whose scales must not move
        self.visited: set[tuple[torch.device, int, int]] = set()
        self.backward_seen = False
        self.backward_task = -1  # the backward that a roll will follow

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """While open, this state is empty; what is recorded meanwhile is dropped at the end."""
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
        """The group for the weights among `args`. Without `create`, None if none of its slots exists.

        unions: which of the slots share a scale, by their place in the graph's scales [F] and [G]; process_group: the ranks
        whose amaxes count too.
        """
        arena = self.arena(device)
        find = self.homes.find_or_create if create or self.pending_loads else self.homes.find
        homes = [find(args[key.argument]) for key in keys]

        def wanted(roles: str) -> list[_Wanted]:
            pairs = zip(homes, keys, strict=True)
            return [_Wanted(home, (key.ordinal, role), key.recipe) for home, key in pairs for role in getattr(key, roles)]

        slots = (wanted("forward"), wanted("gradient"))
        if not create and not self.pending_loads:
            return _existing(arena, slots)
        version = self.version
        new = [made for direction in DIRECTIONS for made in self._create(arena, direction, slots[direction])]
        for key, home in zip(keys, homes, strict=True):
            if key.route is not None:
                home.routes[key.ordinal] = key.route  # type: ignore[union-attr]
        indices = _indices(slots)
        for direction in DIRECTIONS:
            self._configure(arena, direction, slots[direction], indices[direction], process_group)
        try:
            for load in list(self.pending_loads):
                load.apply(new)
        except RuntimeError:  # it does not fit: without the slots, the next call says so again
            _remove(new)
            raise
        if not create and not any(bool(arena.scale[at.direction, at.number]) for at in (home.slots[slot] for home, slot in new)):
            _remove(new)  # nothing was loaded for them
            self.version = version
            return _existing(arena, slots)
        for direction in DIRECTIONS:
            for union in unions[direction]:
                arena.unite(direction, [indices[direction][i] for i in union])
        return Group(arena, indices, [module for home in homes for module in home.owners()])  # type: ignore[union-attr]

    def _create(self, arena: Arena, direction: int, wanted: Iterable[_Wanted]) -> list[tuple[Home, Slot]]:
        """Makes the slots that do not exist yet, side by side."""
        missing = list(dict.fromkeys((w.home, w.slot) for w in wanted if w.home is not None and not w.position()))
        if missing:
            for (home, slot), index in zip(missing, arena.take(direction, len(missing)), strict=True):
                home.slots[slot] = Location(arena, direction, index)
            self.version += 1
        return missing

    def _configure(self, arena: Arena, direction: int, wanted: Sequence[_Wanted], indices: Sequence[int], process_group: Any) -> None:
        for recipe in dict.fromkeys(w.recipe for w in wanted):
            of_recipe = [(index, w.slot[1]) for index, w in zip(indices, wanted, strict=True) if w.recipe == recipe]
            where, roles = zip(*of_recipe, strict=True)
            arena.configure(direction, where, recipe, roles)
            self.reduction.join(arena, direction, where, process_group if recipe.reduce_amax else None)

    def watch(self, weight: Tensor, table: dict[Any, Any], key: Any) -> None:
        """Removes `table[key]` when a holder of the weight is gone, or the weight is replaced."""
        for identity in (id(weight), *self.homes.watch(weight)):
            self.cache_entries.setdefault(identity, {})[id(table), key] = table

    def _forget(self, identity: int) -> None:
        for (_, key), table in self.cache_entries.pop(identity, {}).items():
            table.pop(key, None)
        self.version += 1

    def _release(self, home: Home) -> None:
        for arena, direction, index in home.slots.values():
            arena.give_back(direction, index)
            self.reduction.join(arena, direction, [index], None)
        home.slots.clear()
        self.version += 1

    # -- when slots roll

    def visit(self, group: Group | None) -> None:
        """Announces a call that will record in `group`; None: in nothing. Inside a backward it is a recomputed forward: nothing moves. A
        call that does not record may be the only one outside of a backward (a reentrant checkpoint's first pass)."""
        if torch._C._current_graph_task_id() != -1:
            return
        slots = frozenset() if group is None else group.slots
        if self.backward_seen or not self.visited.isdisjoint(slots):
            self.roll(within_step=not self.backward_seen)
        elif not self.visited:
            self._roll_released()
        self.visited |= slots

    def note_checkpoint(self, group: Group, weights: Iterable[Tensor]) -> None:
        """Announces a call with `group` and its weights, which a checkpoint may recompute."""
        if (hook := checkpoint_around()) is not None:
            self.checkpointed.add(group)
            group.await_recomputation(hook, weights)

    def roll(self, *, within_step: bool = False) -> None:
        """Moves all recorded amaxes into the histories.

        within_step: a weight is used again before any backward. In its first step a slot then stays unset, so that each use is scaled by
        its own batch: the uses may differ (DoRA multiplies an adapter with the identity matrix before the activations).
        """
        for arena in self.arenas.values():
            arena.roll(self.reduction.of(arena), self._held(arena), first_stays_unset=within_step)
        self.visited.clear()
        self.backward_seen = False

    def _roll_released(self) -> None:
        """Moves what the last roll held and no checkpoint will recompute: a result that no loss reached, or that was kept for another
        backward, is gone, or its weights changed. No rank waits for others: the last roll reduced these amaxes, and none came since."""
        if not all(group.awaits_recomputation() for group in self.checkpointed):
            for arena in self.arenas.values():
                arena.roll(held=self._held(arena))

    def _held(self, arena: Arena) -> list[Sequence[Any]]:
        """The slots of calls that a checkpoint may recompute, whose scales must not move."""
        self.checkpointed = weakref.WeakSet(group for group in self.checkpointed if group.awaits_recomputation())
        return [group.where for group in self.checkpointed if group.arena is arena]

    def watch_backward(self, outputs: Sequence[Any], group: Group) -> None:
        """Takes the gradients' amaxes out of every backward of these outputs, and rolls when it ends.

        The compiled backward returns them as the gradient of the group's sink: under `backward()`, `autograd.grad` and
        `backward(inputs=...)` alike. A forward that was recomputed inside a backward has a nested backward of its own, whose end is not
        the end of the outer one: its roll waits for the next forward.
        """
        recomputed = torch._C._current_graph_task_id() != -1
        for node in _backwards(outputs):
            place = group.sink_place(node)
            if place is not None:
                node.te_watched = True
                node.register_hook(partial(_after_backward, self, recomputed, group, place))

    def _roll_after_backward(self) -> None:
        task = torch._C._current_graph_task_id()
        if task not in (-1, self.backward_task):
            self.backward_task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    @torch.compiler.disable
    def _backward_ended(self) -> None:
        self.backward_task = -1
        if self.backward_seen:
            self.roll()


STATE = ScaleState()


def _backwards(outputs: Sequence[Any]) -> set[Any]:
    """The autograd functions that made these outputs, or the tensors that these are views of: one of them is the compiled call's."""
    found: set[Any] = set()
    for output in outputs:
        node: Any = output.grad_fn if isinstance(output, Tensor) else None
        while node is not None and not isinstance(node, torch.autograd.function.BackwardCFunction):
            node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
        if node is not None and not hasattr(node, "te_watched"):  # else it belongs to another call: the output is a view of an input
            found.add(node)
    return found


@torch.compiler.disable
def _after_backward(state: ScaleState, recomputed: bool, group: Group, place: int, gradients: Sequence[Tensor | None], _: Any) -> None:
    """A hook after the backward of a call. gradients: of the call's inputs; place: the sink's position among them."""
    if (amax := gradients[place]) is not None:
        group.record(GRADIENT, amax)
    state.backward_seen = True
    if not recomputed:
        state._roll_after_backward()


def _existing(arena: Arena, slots: tuple[list[_Wanted], list[_Wanted]]) -> Group | None:
    forward, gradient = indices = _indices(slots)
    return Group(arena, indices, ()) if any(forward) or any(gradient) else None


def _remove(slots: Iterable[tuple[Home, Slot]]) -> None:
    for home, slot in slots:
        arena, direction, index = home.slots.pop(slot)
        arena.give_back(direction, index)


def _indices(slots: tuple[list[_Wanted], list[_Wanted]]) -> tuple[list[int], list[int]]:
    forward, gradient = slots
    return [slot.position() for slot in forward], [slot.position() for slot in gradient]


def checkpoint_around() -> Any:
    """The hook of the non-reentrant checkpoint whose forward is running, alive as long as that may be recomputed; None elsewhere, and in a
    recomputation."""
    if torch._C._current_graph_task_id() != -1 or (hooks := torch._C._autograd._top_saved_tensors_default_hooks(False)) is None:
        return None
    return hooks[1] if getattr(hooks[1], "__qualname__", "").startswith("_checkpoint_hook.") else None


def is_fake(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor)
