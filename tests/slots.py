"""Access to the internals of the scale state."""

from __future__ import annotations

import torch
from torch import Tensor

from te_dynamo.state import FORWARD, GRADIENT, STATE, Arena

CPU = torch.device("cpu")
ROLES = {"input": FORWARD, "weight": FORWARD, "grad_output": GRADIENT}


def index_of(weight: Tensor, role: str, ordinal: int = 0) -> int:
    """The slot index, in its arena, of one of a weight's tensors."""
    return STATE.homes.by_weight[id(weight)].slots[ordinal, role].number


def history_of(arena: Arena, direction: int, index: int) -> Tensor:
    """A slot's history [length], entry 0 being written, entry 1 the oldest."""
    return arena.ordered_history(direction, index)


def all_slots() -> dict[tuple[int, int, str], int]:
    """Every slot of the process: (id of the weight, ordinal, role) -> its index."""
    homes = STATE.homes.by_weight.items()
    return {(identity, *slot): at.number for identity, home in homes for slot, at in home.slots.items()}
