"""Where the rows of each group are, as tensors on the device: the host reads no offsets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from te_dynamo.lowering.limits import ALIGNMENT_ON_GPU


@dataclass(frozen=True)
class Groups:
    """offsets: int32 [E], where the rows of each group end; tokens: T, the number of all rows."""

    offsets: Tensor
    tokens: Any

    @cached_property
    def count(self) -> int:
        return self.offsets.shape[0]

    @cached_property
    def of_row(self) -> Tensor:
        """int64 [T], the group of each row; rows after the last group get its number."""
        rows = torch.arange(self.tokens, device=self.offsets.device, dtype=torch.int32)
        return torch.searchsorted(self.offsets, rows, right=True).clamp(max=self.count - 1)

    @cached_property
    def inside(self) -> Tensor:
        """bool [T, 1], whether a row is in a group: the contents of rows after the last group are undefined."""
        return (torch.arange(self.tokens, device=self.offsets.device) < self.offsets[-1]).unsqueeze(1)

    def only(self, t: Tensor) -> Tensor:
        """t [T, any], with zeros in the rows outside of all groups."""
        return torch.where(self.inside, t, torch.zeros((), dtype=t.dtype, device=t.device))

    @cached_property
    def spread(self) -> tuple[Tensor, Tensor, Tensor]:
        """The groups with gaps in between, so that each begins at a multiple of 16 and none is empty: their ends, int32 [E]; the row at
        each position, int32 [P], -1 in a gap; and the group of each position, int64 [P]."""
        multiple, zero = ALIGNMENT_ON_GPU, self.offsets.new_zeros(1)
        sizes = torch.diff(self.offsets, prepend=zero)
        room = ((sizes + (multiple - 1)) // multiple).clamp(min=1) * multiple
        ends = room.cumsum(0).to(torch.int32)
        places = (self.tokens + multiple - 1) // multiple * multiple + multiple * self.count
        place = torch.arange(places, device=zero.device, dtype=torch.int32)
        group = torch.searchsorted(ends, place, right=True).clamp(max=self.count - 1)
        row = place - (ends - room)[group] + (self.offsets - sizes)[group]
        return ends, torch.where(row < self.offsets[group], row, -1), group

    @cached_property
    def place_of_row(self) -> Tensor:
        """int64 [T], the position of each row in `spread`; any position for rows outside of all groups."""
        ends, _, _ = self.spread
        zero = self.offsets.new_zeros(1)
        ahead = (torch.cat([zero, ends]) - torch.cat([zero, self.offsets]))[:-1]  # gaps before each group
        rows = torch.arange(self.tokens, device=ends.device)
        return (rows + ahead[self.of_row]).clamp(max=self.spread[1].shape[0] - 1)

    def spread_out(self, t: Tensor) -> Tensor:
        """t [T, any] -> [P, any], its rows placed as in `spread`, with zeros in the gaps."""
        _, rows, _ = self.spread
        if t.shape[0] == 0:
            return t.new_zeros(rows.shape[0], t.shape[1])
        return torch.where(rows.unsqueeze(1) < 0, torch.zeros((), dtype=t.dtype, device=t.device), t[rows.clamp(min=0)])

    def largest(self, t: Tensor) -> Tensor:
        """t: f32 [T], not negative -> [E], the largest element of each group, 0 for an empty group."""
        if t.numel() == 0:
            return t.new_zeros(self.count)
        group = torch.arange(self.count, device=t.device).unsqueeze(1)
        return torch.where((self.of_row == group) & self.inside.t(), t, 0.0).amax(1)
