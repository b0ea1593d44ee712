"""Data parallel: amaxes are reduced over all ranks, so that all have the same scales. One collective for each roll.

Ranks agree on the order of slots because they create them in the order of the program. A slot that is given back keeps its place in that
order, since each rank collects its garbage in its own time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from te_dynamo.state.arena import Arena


def ranks(process_group: Any) -> Any:
    """The process group whose ranks count, None if there is no other rank. `process_group` None is the world."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = process_group if process_group is not None else dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class _ReducedSlots:
    """The slots of one arena that are reduced over one process group, each with its place in the collective's buffer."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, int], int] = {}  # by (direction, index)
        self.count = 0  # places that were ever given
        self.indices: tuple[Tensor, Tensor] | None = None  # of each slot: (direction, index) [n, 2], and place [n]

    def add(self, slots: Sequence[tuple[int, int]]) -> None:
        for slot in slots:
            if slot not in self.places:
                self.count += 1
                self.places[slot], self.indices = self.count, None

    def remove(self, slots: Sequence[tuple[int, int]]) -> None:
        for slot in slots:
            if self.places.pop(slot, None) is not None:
                self.indices = None

    def reduce(self, amax: Tensor, process_group: Any) -> None:
        if self.indices is None:
            slots = torch.tensor(list(self.places), dtype=torch.int64, device=amax.device).reshape(-1, 2)
            self.indices = (slots, torch.tensor(list(self.places.values()), dtype=torch.int64, device=amax.device))
        slots, places = self.indices
        row, column = slots.unbind(1)
        buffer = amax.new_zeros(self.count + 1)
        buffer[places] = amax[row, column]
        dist.all_reduce(buffer, op=dist.ReduceOp.MAX, group=process_group)
        amax[row, column] = buffer[places]


class Reduction:
    """Which slots of which arena are reduced over which process group."""

    def __init__(self) -> None:
        self.slots: dict[tuple[Arena, Any], _ReducedSlots] = {}

    def join(self, arena: Arena, direction: int, indices: Sequence[int], process_group: Any) -> None:
        """These slots are reduced over `process_group` from now on; None: over no ranks."""
        slots = [(direction, index) for index in indices]
        for (owner, group), reduced in self.slots.items():
            if owner is arena and group is not process_group:
                reduced.remove(slots)
        if process_group is not None:
            self.slots.setdefault((arena, process_group), _ReducedSlots()).add(slots)

    def of(self, arena: Arena) -> Callable[[Tensor], None] | None:
        """A function that reduces the amaxes [2, n] of an arena, None if no other rank counts."""
        reduced = [(slots, process_group) for (owner, process_group), slots in self.slots.items() if owner is arena]

        def reduce(amax: Tensor) -> None:
            for slots, process_group in reduced:
                slots.reduce(amax, process_group)

        return reduce if reduced else None
