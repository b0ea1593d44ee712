"""Which slots belong to a weight. A slot's owner is the module that holds the weight, under the attribute by which it does.

A compiled graph gets tensors only, so slots are looked up by the weight's id; at its first call the garbage collector is
asked which modules hold it. So a weight that replaces another takes over its slots, a deep copy gets slots of its own, and
modules that share a weight share its slots.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Place = tuple[int, str]  # (id of the module, attribute)
Slot = tuple[int, str]  # (ordinal of the visit in a call, role)
Holder = tuple[weakref.ref[nn.Module], str]  # (module, attribute)


class Home:
    """The slots of one weight: `slots[ordinal, role]` is (arena, direction, index).

    routes: by ordinal, the relative path from the weight's module to a site without weights whose slots are kept here too (an
    attention): how many names to strip from the module's path, and which to append.
    """

    def __init__(self) -> None:
        self.slots: dict[Slot, tuple[Any, int, int]] = {}
        self.weight: weakref.ref[Tensor] | None = None
        self.owners: dict[Place, weakref.ref[nn.Module]] = {}
        self.routes: dict[int, tuple[int, tuple[str, ...]]] = {}

    def current_weight(self) -> Tensor | None:
        return None if self.weight is None else self.weight()

    def occupied(self) -> bool:
        """Whether an owner still holds the weight."""
        weight = self.current_weight()
        owners = ((reference(), attribute) for (_, attribute), reference in self.owners.items())
        return weight is not None and any(owner is not None and owner._parameters.get(attribute) is weight for owner, attribute in owners)

    def modules(self) -> list[nn.Module]:
        return [m for reference in self.owners.values() if (m := reference()) is not None]


class Homes:
    """All homes, by weight and by the places that hold it."""

    def __init__(self, release: Callable[[Home], None], forget: Callable[[int], None]) -> None:
        """release: called with a home that has no owner left; forget: called with the id of a weight that died."""
        self.by_weight: dict[int, Home] = {}
        self.by_place: dict[Place, Home] = {}
        self.watched: dict[int, weakref.finalize] = {}
        self.watched_modules: dict[int, weakref.finalize] = {}
        self.holders: dict[int, list[Holder]] = {}  # by weight, as of the last search
        self.release, self.forget = release, forget

    def find(self, weight: Tensor) -> Home | None:
        return self.by_weight.get(id(weight)) or self._vacant(self._holders(weight))

    def find_or_create(self, weight: Tensor) -> Home:
        home = self.by_weight.get(id(weight))
        if home is not None:
            return home
        holders = self._holders(weight)
        home = self._vacant(holders) or Home()
        replaced = home.current_weight()
        if replaced is not None:
            self.by_weight.pop(id(replaced), None)
        home.weight = weakref.ref(weight)
        self.by_weight[id(weight)] = home
        for module, attribute in holders:
            self.by_place[id(module), attribute] = home
            home.owners[id(module), attribute] = weakref.ref(module)
            _watch(module, self.watched_modules, self._module_died)
        self.watch(weight)
        return home

    def _vacant(self, holders: list[tuple[nn.Module, str]]) -> Home | None:
        """The home in these places whose weight was replaced."""
        homes = (self.by_place.get((id(module), attribute)) for module, attribute in holders)
        return next((home for home in homes if home is not None and not home.occupied()), None)

    def watch(self, weight: Tensor) -> None:
        """Calls `forget` when this weight dies, since its id may then be another's."""
        _watch(weight, self.watched, self._weight_died)

    def detach(self) -> None:
        """Watches nothing any more."""
        for finalizer in (*self.watched.values(), *self.watched_modules.values()):
            finalizer.detach()

    def _weight_died(self, identity: int) -> None:
        self.watched.pop(identity, None)
        home = self.by_weight.pop(identity, None)
        if home is not None and not home.owners:
            self.release(home)
        self.forget(identity)

    def _module_died(self, identity: int) -> None:
        self.watched_modules.pop(identity, None)
        for place in [p for p in self.by_place if p[0] == identity]:
            home = self.by_place.pop(place)
            home.owners.pop(place, None)
            weight = home.current_weight()
            if not home.owners and (weight is None or id(weight) not in self.by_weight):
                self.release(home)

    def _holders(self, weight: Tensor) -> list[tuple[nn.Module, str]]:
        """The modules that hold this weight, each with the attribute; searches again if those of the last search do not."""
        for search in (False, True):
            if search:
                self.holders = _all_holders()
            places = [(reference(), attribute) for reference, attribute in self.holders.get(id(weight), ())]
            held = [(m, attribute) for m, attribute in places if m is not None and m._parameters.get(attribute) is weight]
            if held:
                return held
        return []


def _watch(thing: Any, table: dict[int, weakref.finalize], then: Callable[[int], None]) -> None:
    """Calls `then` with the id of `thing` when it dies."""
    if id(thing) not in table:
        table[id(thing)] = weakref.finalize(thing, then, id(thing))
        table[id(thing)].atexit = False


def _all_holders() -> dict[int, list[Holder]]:
    """Every module of this process that holds parameters, by the parameter's id."""
    found: dict[int, list[Holder]] = {}
    for candidate in gc.get_objects():
        if issubclass(type(candidate), nn.Module):
            for attribute, parameter in (candidate.__dict__.get("_parameters") or {}).items():
                if parameter is not None:
                    found.setdefault(id(parameter), []).append((weakref.ref(candidate), attribute))
    return found
