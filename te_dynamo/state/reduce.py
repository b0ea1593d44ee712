"""Data parallel: the amaxes of all ranks count, so that all have the same scales. One collective at each roll.

Ranks agree on the order of slots by the order in which they were made, which is the program's. A slot that is given back
keeps its place in that order, since when a rank collects its garbage is its own business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from te_dynamo.state.arena import Arena


def ranks(process_group: Any) -> Any:
    """The process group whose ranks count, None where there is no other rank. `process_group` None is the world."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = process_group if process_group is not None else dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class Reduction:
    """Which slots of which arena are reduced over which process group."""

    def __init__(self) -> None:
        self.places: dict[tuple[Arena, Any], dict[tuple[int, int], int]] = {}  # (arena, group) -> (direction, index) -> place
        self.counts: dict[tuple[Arena, Any], int] = {}  # the places that were ever given
        self.packed: dict[tuple[Arena, Any], tuple[Tensor, Tensor]] = {}  # (position in amax [2, n], place) of each slot

    def join(self, arena: Arena, direction: int, indices: list[int], process_group: Any) -> None:
        """These slots are reduced over `process_group` from now on; None: over no ranks."""
        for key, places in self.places.items():
            if key[0] is arena and key[1] is not process_group and any(places.pop((direction, i), None) is not None for i in indices):
                self.packed.pop(key, None)
        if process_group is None:
            return
        key = (arena, process_group)
        places = self.places.setdefault(key, {})
        for i in indices:
            if (direction, i) not in places:
                places[direction, i] = self.counts[key] = self.counts.get(key, 0) + 1
                self.packed.pop(key, None)

    def leave(self, arena: Arena, direction: int, index: int) -> None:
        for key, places in self.places.items():
            if key[0] is arena and places.pop((direction, index), None) is not None:
                self.packed.pop(key, None)

    def of(self, arena: Arena) -> Callable[[Tensor], None] | None:
        """What reduces the amaxes [2, n] of an arena, None where no other rank counts."""
        keys = [key for key, places in self.places.items() if key[0] is arena and self.counts.get(key)]
        if not keys:
            return None

        def reduce(amax: Tensor) -> None:
            for key in keys:
                self._reduce(key, amax)

        return reduce

    def _reduce(self, key: tuple[Arena, Any], amax: Tensor) -> None:
        if key not in self.packed:
            slots = self.places[key]
            positions = torch.tensor([[direction, index] for direction, index in slots], device=amax.device).reshape(-1, 2)
            self.packed[key] = (positions, torch.tensor(list(slots.values()), device=amax.device))
        positions, places = self.packed[key]
        row, column = positions.unbind(1)
        buffer = amax.new_zeros(self.counts[key] + 1)
        buffer[places] = amax[row, column]
        dist.all_reduce(buffer, op=dist.ReduceOp.MAX, group=key[1])
        amax[row, column] = buffer[places]
