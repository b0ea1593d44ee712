"""Whose a slot is: the module that holds the weight, under the attribute by which it holds it.

A compiled graph is handed tensors only. A weight's slots are found by its identity; the first time, whose it is is asked
of the garbage collector. So a weight that is put in another's place takes over its slots, a deep copy begins with its
own, and modules that share a weight share its slots.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Place = tuple[int, str]  # (id of the module, attribute)
Slot = tuple[int, str]  # (ordinal of the visit in a call, role)


class Home:
    """The slots of one weight: `slots[ordinal, role]` is (direction, index in the arena).

    attention: for each ordinal, the way from the weight's module to the attention whose slots stand here too: how many
    names of the path to take off, and which to put on.
    """

    def __init__(self) -> None:
        self.slots: dict[Slot, tuple[Any, int, int]] = {}
        self.weight: weakref.ref[Tensor] | None = None
        self.owners: dict[Place, weakref.ref[nn.Module]] = {}
        self.attention: dict[int, tuple[int, tuple[str, ...]]] = {}

    def held(self) -> bool:
        """Whether the weight that lived here last is still held by a module that it is known to belong to."""
        weight = self.weight() if self.weight is not None else None
        if weight is None:
            return False
        owners = ((reference(), attribute) for (_, attribute), reference in self.owners.items())
        return any(owner is not None and owner._parameters.get(attribute) is weight for owner, attribute in owners)

    def modules(self) -> list[nn.Module]:
        return [m for reference in self.owners.values() if (m := reference()) is not None]


class Homes:
    """Every home, by the weight that lives there and by the modules that hold it."""

    def __init__(self, vacate: Callable[[Home], None], forget: Callable[[int], None]) -> None:
        """vacate: told of a home that nobody owns any more; forget: told of the id of a weight that died."""
        self.by_weight: dict[int, Home] = {}
        self.by_place: dict[Place, Home] = {}
        self.watched: dict[int, weakref.finalize] = {}
        self.watched_modules: dict[int, weakref.finalize] = {}
        self.holders: dict[int, list[tuple[weakref.ref[nn.Module], str]]] = {}  # as of the last walk
        self.vacate, self.forget = vacate, forget

    def find(self, weight: Tensor) -> Home | None:
        """The home of a weight, None where it has none."""
        return self.by_weight.get(id(weight)) or self._left(self._holders(weight))

    def of(self, weight: Tensor) -> Home:
        """The home of a weight; a new one where it has none."""
        home = self.by_weight.get(id(weight))
        if home is not None:
            return home
        holders = self._holders(weight)
        home = self._left(holders) or Home()
        last = home.weight() if home.weight is not None else None
        if last is not None:
            self.by_weight.pop(id(last), None)
        home.weight = weakref.ref(weight)
        self.by_weight[id(weight)] = home
        for module, attribute in holders:
            self.by_place[id(module), attribute] = home
            home.owners[id(module), attribute] = weakref.ref(module)
            if id(module) not in self.watched_modules:
                self._watch(module, self.watched_modules, self._module_died)
        self.watch(weight)
        return home

    def _left(self, holders: list[tuple[nn.Module, str]]) -> Home | None:
        """The home in these places whose weight is gone from them: what now stands there takes it over."""
        homes = (self.by_place.get((id(module), attribute)) for module, attribute in holders)
        return next((home for home in homes if home is not None and not home.held()), None)

    def watch(self, weight: Tensor) -> None:
        """Has `forget` told when this weight dies, since its id may then name another."""
        if id(weight) not in self.watched:
            self._watch(weight, self.watched, self._weight_died)

    @staticmethod
    def _watch(thing: Any, table: dict[int, weakref.finalize], then: Callable[[int], None]) -> None:
        table[id(thing)] = weakref.finalize(thing, then, id(thing))
        table[id(thing)].atexit = False

    def detach(self) -> None:
        """Watches nothing any more."""
        for finalizer in (*self.watched.values(), *self.watched_modules.values()):
            finalizer.detach()

    def _weight_died(self, identity: int) -> None:
        self.watched.pop(identity, None)
        home = self.by_weight.pop(identity, None)
        if home is not None and not home.owners:
            self.vacate(home)
        self.forget(identity)

    def _module_died(self, identity: int) -> None:
        self.watched_modules.pop(identity, None)
        for place in [p for p in self.by_place if p[0] == identity]:
            home = self.by_place.pop(place)
            home.owners.pop(place, None)
            weight = home.weight() if home.weight is not None else None
            if not home.owners and (weight is None or id(weight) not in self.by_weight):
                self.vacate(home)

    def _holders(self, weight: Tensor) -> list[tuple[nn.Module, str]]:
        """The modules that hold this weight, each with the attribute."""
        for walk in (False, True):
            if walk:
                self.holders = all_holders()
            places = [(reference(), attribute) for reference, attribute in self.holders.get(id(weight), ())]
            held = [(m, attribute) for m, attribute in places if m is not None and m._parameters.get(attribute) is weight]
            if held:
                return held
        return []


def all_holders() -> dict[int, list[tuple[weakref.ref[nn.Module], str]]]:
    """Every module of this process that holds parameters, by the parameter's id."""
    found: dict[int, list[tuple[weakref.ref[nn.Module], str]]] = {}
    for candidate in gc.get_objects():
        if issubclass(type(candidate), nn.Module):
            for attribute, parameter in (candidate.__dict__.get("_parameters") or {}).items():
                if parameter is not None:
                    found.setdefault(id(parameter), []).append((weakref.ref(candidate), attribute))
    return found
