"""Which slots belong to a weight. A slot's owner is the module that holds the weight, with the attribute that holds it.

A compiled graph gets only tensors, so slots are looked up by the weight's id; at its first call the garbage collector is asked which
modules hold it. So a weight that replaces another takes over its slots, a deep copy gets its own slots, and modules that share a weight
share its slots.

An id may be reused for another tensor, so whatever is found by id must still hold the weight (`Holders.has`). No weight that a module
holds is referenced weakly, since `torch.utils.swap_tensors` refuses such tensors.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

Place = tuple[int, str]  # (id of the module, attribute)
Slot = tuple[int, str]  # (ordinal of the visit in a call, role)


class Holders:
    """What holds a weight: modules, each under an attribute. If no module does, this object refers to the weight, weakly."""

    def __init__(self, places: Sequence[tuple[nn.Module, str]], weight: Tensor | None = None) -> None:
        self.modules: dict[Place, weakref.ref[nn.Module]] = {(id(m), attribute): weakref.ref(m) for m, attribute in places}
        self.weight = None if places or weight is None else weakref.ref(weight)

    def has(self, identity: int) -> bool:
        """Whether the tensor with this id is held."""
        if self.weight is not None and id(self.weight()) == identity:
            return True
        for (_, attribute), reference in self.modules.items():
            module = reference()
            if module is not None and id(module._parameters.get(attribute)) == identity:
                return True
        return False

    def alive(self) -> list[Any]:
        """The modules that still exist; the weight itself, if no module holds it."""
        references = self.modules.values() if self.weight is None else [self.weight]
        return [thing for reference in references if (thing := reference()) is not None]


class Location(NamedTuple):
    """Where a slot is. direction, number: its position in the tensors of its arena."""

    arena: Any
    direction: int
    number: int


class Home:
    """The slots of one weight: `slots[ordinal, role]`.

    identity: the id of the weight. routes: by ordinal, for a site without weights (an attention) whose slots are kept here too, the
    relative path from the weight's module to it: how many names to strip from the module's path, and which to append.
    """

    def __init__(self) -> None:
        self.slots: dict[Slot, Location] = {}
        self.identity = 0
        self.holders = Holders(())
        self.routes: dict[int, tuple[int, tuple[str, ...]]] = {}

    def owners(self) -> list[nn.Module]:
        return [thing for thing in self.holders.alive() if isinstance(thing, nn.Module)]


class Homes:
    """All homes, by weight and by the places that hold it."""

    def __init__(self, release: Callable[[Home], None], forget: Callable[[int], None]) -> None:
        """release: called with a home that has no owner left; forget: called with the id of a module or weight that is gone, or of a weight
        that was replaced."""
        self.by_weight: dict[int, Home] = {}
        self.by_place: dict[Place, Home] = {}
        self.watched: dict[int, weakref.finalize] = {}
        self.known: dict[int, Holders] = {}  # by weight, as of the last search
        self.release, self.forget = release, forget

    def find(self, weight: Tensor) -> Home | None:
        home = self.by_weight.get(id(weight))
        return home if home is not None and home.holders.has(id(weight)) else self._vacant(self.holders(weight))

    def find_or_create(self, weight: Tensor) -> Home:
        home = self.by_weight.get(id(weight))
        if home is not None and home.holders.has(id(weight)):
            return home
        holders = self.holders(weight)
        home = self._vacant(holders) or Home()
        if home.identity:
            self.by_weight.pop(home.identity, None)
            self.forget(home.identity)
        home.identity, home.holders = id(weight), holders
        self.by_weight[id(weight)] = home
        for place in holders.modules:
            self.by_place[place] = home
        self.watch(weight)
        return home

    def _vacant(self, holders: Holders) -> Home | None:
        """The home at these places, if its weight was replaced."""
        homes = (self.by_place.get(place) for place in holders.modules)
        return next((home for home in homes if home is not None and not home.holders.has(home.identity)), None)

    def holders(self, weight: Tensor) -> Holders:
        """What holds a weight."""
        return self.all_holders([weight])[0]

    def all_holders(self, weights: Sequence[Tensor]) -> list[Holders]:
        """What holds each weight; searches again, once, if the last search does not answer that."""
        if not all(map(self._is_known, weights)):
            self.known = {i: holders for i, holders in self.known.items() if holders.weight is not None} | _all_holders()
        for weight in weights:
            if not self._is_known(weight):
                self.known[id(weight)] = Holders((), weight)
        return [self.known[id(weight)] for weight in weights]

    def _is_known(self, weight: Tensor) -> bool:
        return id(weight) in self.known and self.known[id(weight)].has(id(weight))

    def watch(self, weight: Tensor) -> list[int]:
        """Calls `forget` with the id of any holder of this weight that is gone; returns these ids."""
        things = self.holders(weight).alive()
        for thing in things:
            if id(thing) not in self.watched:
                self.watched[id(thing)] = weakref.finalize(thing, self._gone, id(thing))
                self.watched[id(thing)].atexit = False
        return [id(thing) for thing in things]

    def detach(self) -> None:
        """Watches nothing any more."""
        for finalizer in self.watched.values():
            finalizer.detach()

    def _gone(self, identity: int) -> None:
        """A module, or a weight that no module held, is gone."""
        del self.watched[identity]
        homes = [home for place, home in self.by_place.items() if place[0] == identity]
        raw = self.by_weight.get(identity)
        for home in [*homes, *([raw] if raw is not None and raw.holders.weight is not None else [])]:
            if not home.holders.alive():
                self.by_weight.pop(home.identity, None)
                self.release(home)
        self.by_place = {place: home for place, home in self.by_place.items() if place[0] != identity}
        self.known.pop(identity, None)
        self.forget(identity)


def _all_holders() -> dict[int, Holders]:
    """What holds each parameter, by the parameter's id: over every module of this process."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in MODULES.all():
        for attribute, parameter in (module.__dict__.get("_parameters") or {}).items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, attribute))
    return {identity: Holders(places) for identity, places in found.items()}


class Marker(nn.Module):
    """Is listed by the garbage collector until `gc.freeze()` hides it too."""


def _modules_among(objects: Iterable[Any]) -> list[nn.Module]:
    return [thing for thing in objects if issubclass(type(thing), nn.Module)]


class Modules:
    """Every module of this process; of those that `gc.freeze()` hid from the garbage collector's list, only the ones that can be reached.

    Reaching them takes seconds, so it is done once after each freeze, which a marker detects.
    """

    def __init__(self) -> None:
        self.marker: Marker | None = None
        self.hidden: list[weakref.ref[nn.Module]] = []

    def all(self) -> list[nn.Module]:
        objects = gc.get_objects()
        visible = _modules_among(objects)
        if not any(module is self.marker for module in visible):  # the first search, or the first one after a freeze
            frozen = gc.get_freeze_count() > 0  # asked only here, since it takes as long as half of the search
            self.hidden = [weakref.ref(module) for module in _modules_among(_hidden(objects))] if frozen else []
            self.marker = Marker()
        return visible + [module for reference in self.hidden if (module := reference()) is not None]


MODULES = Modules()


def _hidden(visible: Sequence[Any]) -> list[Any]:
    """Every reachable object that the garbage collector does not list."""
    reached = {id(thing): thing for thing in visible}
    hidden: list[Any] = []
    layer: list[Any] = [*visible, _variables()]
    while layer:
        new = {id(thing): thing for thing in gc.get_referents(*layer) if id(thing) not in reached and gc.is_tracked(thing)}
        reached |= new
        layer = list(new.values())
        hidden += layer
    return hidden


def _variables() -> list[Any]:
    """Where the search for reachable objects begins: what Python's modules and the running functions hold."""
    found: list[Any] = [sys.modules]
    for thread, frame in sys._current_frames().items():
        step: Any = frame.f_back if thread == threading.get_ident() else frame  # not this function's own, which would hold itself
        while step is not None:
            found += [step.f_globals, *step.f_locals.values()]
            step = step.f_back
    del frame
    return found
