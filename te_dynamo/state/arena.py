"""Where scales live: all slots of one device in a few tensors, so that one update moves all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from te_dynamo.lowering.fp8 import FLOAT32_MAX
from te_dynamo.lowering.kernels import roll
from te_dynamo.recipe import DelayedScaling, Format

FORWARD, GRADIENT = 0, 1
INITIAL_CAPACITY = 1024


class Arena:
    """Slots are columns of [2, capacity] tensors: a row for each direction. A scale of 0 was never set.

    scale, amax (recorded since the last roll), history [2, capacity, longest] (a ring for each slot: its newest entry at
    `cursor`), and what a slot's recipe says: top (fp8_max / 2**margin), length, newest (whether the last amax alone
    decides), keeps_infinite, start (the scale of a slot that was never set).
    """

    scale: Tensor
    amax: Tensor
    history: Tensor
    cursor: Tensor
    top: Tensor
    length: Tensor
    newest: Tensor
    keeps_infinite: Tensor
    start: Tensor
    union: Tensor

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.capacity, self.longest = INITIAL_CAPACITY, 1
        self.used = [1, 1]  # index 0 stays unset: what has no slot reads it
        self.free: tuple[list[int], list[int]] = ([], [])  # given back
        self.recipes: tuple[dict[int, DelayedScaling], dict[int, DelayedScaling]] = ({}, {})
        self.united = False  # whether any slots share a scale
        self.special = False  # whether any slot's recipe is like_te, or has another algorithm than the maximum
        self.outgrown: list[Tensor] = []  # earlier amaxes, which a backward that was pending when they grew still writes
        self.flushers: list[weakref.ref[Any]] = []  # of gradients' amaxes that do not stand side by side here
        self.version = 0  # counts the changes of what the slots are
        self._custom: tuple[int, list[tuple[DelayedScaling, int, Tensor]]] = (-1, [])
        self._allocate()

    def _allocate(self) -> None:
        """The tensors, with what they held."""

        def grown(name: str, fill: float, *shape: int, dtype: torch.dtype = torch.float32) -> None:
            new = torch.full((2, self.capacity, *shape), fill, dtype=dtype, device=self.device)
            old = getattr(self, name, None)
            if old is not None:
                new[tuple(slice(0, n) for n in old.shape)] = old
            setattr(self, name, new)

        if hasattr(self, "amax"):
            self.outgrown.append(self.amax)
        with torch.inference_mode(False), torch.no_grad():
            for name in ("scale", "amax", "start"):
                grown(name, 0.0)
            grown("top", 1.0)
            grown("history", 0.0, self.longest)
            grown("cursor", 0, dtype=torch.int64)
            grown("length", 1, dtype=torch.int64)
            for name in ("newest", "keeps_infinite"):
                grown(name, False, dtype=torch.bool)
            unions = getattr(self, "union", None)
            self.union = torch.arange(self.capacity, device=self.device).repeat(2, 1)
            if unions is not None:
                self.union[:, : unions.shape[1]] = unions

    # -- slots

    def take(self, direction: int, count: int) -> range:
        """Unset slots, side by side."""
        free = sorted(self.free[direction])
        again = next((run for i in free if set(run := range(i, i + count)).issubset(free)), None)
        if again is not None:
            for i in again:
                self.free[direction].remove(i)
                self._part(direction, i)
            self.start[direction, list(again)] = 0
            self.clear(direction, list(again))
            return again
        start = self.used[direction]
        self.used[direction] += count
        if self.used[direction] > self.capacity:
            self.capacity = max(2 * self.capacity, self.used[direction])
            self._allocate()
        return range(start, start + count)

    def give_back(self, direction: int, index: int) -> None:
        """The slot is nobody's now. No tensor is touched: this runs in finalizers, at any time."""
        self.free[direction].append(index)
        self.recipes[direction].pop(index, None)
        self.version += 1

    @torch.no_grad()
    def clear(self, direction: int, indices: Sequence[int]) -> None:
        """Makes slots unset."""
        where = list(indices)
        for t in (self.amax, self.history, self.cursor):
            t[direction, where] = 0
        self.scale[direction, where] = self.start[direction, where]
        self.version += 1

    @torch.no_grad()
    def configure(self, direction: int, indices: Sequence[int], recipe: DelayedScaling) -> None:
        """Gives slots their recipe; of the history, what fits is kept."""
        where = [i for i in indices if self.recipes[direction].get(i) != recipe]
        if not where:
            return
        kept = {i: self.in_order(direction, i) for i in where if i in self.recipes[direction]}
        if recipe.amax_history_len > self.longest:
            self.longest = recipe.amax_history_len
            self._allocate()
        fp8_format: Format = recipe.fp8_format
        dtype = fp8_format.forward if direction == FORWARD else fp8_format.gradient
        top = torch.finfo(dtype).max * 2.0**-recipe.margin
        # What was scaled for another range is scaled for this one.
        self.scale[direction, where] *= torch.where(self.top[direction, where] == top, 1.0, top / self.top[direction, where])
        values = {
            "top": top,
            "length": recipe.amax_history_len,
            "newest": recipe.amax_compute_algo == "most_recent",
            "keeps_infinite": recipe.like_te,
            "start": 1.0 if recipe.like_te else 0.0,
        }
        for name, value in values.items():
            getattr(self, name)[direction, where] = value
        self.special |= recipe.like_te or recipe.amax_compute_algo != "max"
        for i in where:
            self.recipes[direction][i] = recipe
            if i in kept:
                self.write(direction, i, self.scale[direction, i], _resized(kept[i], recipe.amax_history_len))
        scale = self.scale[direction, where]
        self.scale[direction, where] = torch.where(scale == 0, self.start[direction, where], scale)
        self.version += 1

    def in_order(self, direction: int, index: int) -> Tensor:
        """A slot's history [length], as TE keeps it: entry 0 is being written, entry 1 is the oldest."""
        length = int(self.length[direction, index])
        order = (self.cursor[direction, index] + torch.arange(length, device=self.device)) % length
        return self.history[direction, index, order]

    @torch.no_grad()
    def write(self, direction: int, index: int, scale: Tensor, history: Tensor) -> None:
        """Sets a slot: its scale, and its history [length] in TE's order. What entry 0 holds is recorded again."""
        self.scale[direction, index] = scale
        self.cursor[direction, index] = 0
        self.history[direction, index] = 0
        self.history[direction, index, 1 : len(history)] = history[1:]
        self.amax[direction, index] = history[0]
        self.version += 1

    # -- slots that share a scale

    def unite(self, direction: int, indices: Sequence[int]) -> None:
        """These slots move as one from now on: the tensors of one GEMM have one scale, that of the largest amax."""
        first = self.union[direction, indices[0]]
        if len(indices) < 2 or bool((self.union[direction, list(indices)] == first).all()):
            return
        self.united = True
        everyone = torch.isin(self.union[direction], self.union[direction, list(indices)])
        members = everyone.nonzero().flatten().tolist()
        self.union[direction, members] = members[0]
        self._agree(direction, members)

    @torch.no_grad()
    def _agree(self, direction: int, members: Sequence[int]) -> None:
        scales = self.scale[direction, list(members)]
        if not bool((scales > 0).any()):
            return
        scale = scales[scales > 0].min()
        history = torch.stack([self.in_order(direction, i) for i in members]).amax(0)
        for i in members:
            self.write(direction, i, scale, history)

    def _part(self, direction: int, index: int) -> None:
        """Takes a slot out of its union; the others are called by another of them."""
        others = (self.union[direction] == self.union[direction, index]).nonzero().flatten().tolist()
        others.remove(index)
        if others:
            self.union[direction, others] = others[0]
        self.union[direction, index] = index

    # -- the update

    def settle(self) -> None:
        """Brings every amax that was recorded into `amax`."""
        for reference in self.flushers:
            flusher = reference()
            if flusher is not None:
                flusher.flush()
        for old in self.outgrown:
            current = self.amax[:, : old.shape[1]]
            current.copy_(torch.maximum(current, old))
            old.zero_()

    @torch.no_grad()
    def roll(self, reduce: Callable[[Tensor], None] | None = None) -> None:
        """Recorded amaxes enter the histories, and new scales come out. A slot without a new amax does not move.

        A fixed number of kernels, however many slots there are; on a GPU one for the update itself. reduce: max-reduces the
        amaxes [2, n] over a group's ranks.
        """
        self.settle()
        n = max(self.used)
        amax = self.amax[:, :n]
        self.drop_infinite(amax)
        if reduce is not None:
            reduce(amax)
        self.advance(amax, self.scale[:, :n], self.history[:, :n], self.cursor[:, :n])
        amax.zero_()

    def drop_infinite(self, amax: Tensor) -> None:
        """An infinite amax [2, n] does not count, unless the slot's recipe says so."""
        if self.special:
            amax.masked_fill_(torch.isinf(amax) & ~self.keeps_infinite[:, : amax.shape[1]], 0.0)
        else:
            torch.nan_to_num_(amax, posinf=0.0)

    def advance(self, amax: Tensor, scale: Tensor, history: Tensor, cursor: Tensor) -> None:
        """The update itself, in place on `scale`, `history` and `cursor` of the first n slots, out of `amax` [2, n]."""
        n = amax.shape[1]
        if self.united:
            union = self.union[:, :n]
            amax = torch.zeros_like(amax).scatter_reduce(1, union, amax, "amax").gather(1, union)
        if self.device.type == "cuda" and self.longest <= roll.LONGEST and not self._custom_slots():
            roll.launch(amax, scale, history, cursor, self.top, self.length, self.newest)
            return
        moved = amax != 0
        # What the cursor stands at is 0: writing the 0 of a slot that does not move changes nothing.
        history.scatter_(2, cursor.unsqueeze(-1), amax.unsqueeze(-1))
        deciding = history.amax(-1)  # the oldest entry counts once more, then makes room
        if self.special:
            deciding = torch.where(self.newest[:, :n], amax, deciding)
        fresh = (self.top[:, :n] / deciding).clamp_(max=FLOAT32_MAX)
        new = torch.where(moved & torch.isfinite(deciding) if self.special else moved, fresh, scale)
        for recipe, direction, where in self._custom_slots():
            new[direction, where] = self._custom_scale(recipe, direction, where, moved, new, scale, history, cursor)
        scale.copy_(new)
        cursor.add_(moved).remainder_(self.length[:, :n])
        history.scatter_(2, cursor.unsqueeze(-1), 0.0)

    def _custom_slots(self) -> list[tuple[DelayedScaling, int, Tensor]]:
        """The slots whose recipe brings functions of its own, by recipe and direction."""
        if self._custom[0] != self.version:
            found: dict[tuple[DelayedScaling, int], list[int]] = {}
            for direction, recipes in enumerate(self.recipes):
                for index, recipe in recipes.items():
                    if callable(recipe.amax_compute_algo) or recipe.scaling_factor_compute_algo is not None:
                        found.setdefault((recipe, direction), []).append(index)
            slots = [(recipe, direction, torch.tensor(where, device=self.device)) for (recipe, direction), where in found.items()]
            self._custom = (self.version, slots)
        return self._custom[1]

    def _custom_scale(
        self,
        recipe: DelayedScaling,
        direction: int,
        where: Tensor,
        moved: Tensor,
        new: Tensor,
        old: Tensor,
        history: Tensor,
        cursor: Tensor,
    ) -> Tensor:
        order = (cursor[direction, where] + torch.arange(recipe.amax_history_len, device=self.device)[:, None]) % recipe.amax_history_len
        ordered = history[direction, where].t().gather(0, order)  # [length, n]
        if callable(recipe.amax_compute_algo):
            amax = recipe.amax_compute_algo(ordered)
        else:
            amax = ordered[0] if recipe.amax_compute_algo == "most_recent" else ordered.amax(0)
        fp8_format: Format = recipe.fp8_format
        top = torch.finfo(fp8_format.forward if direction == FORWARD else fp8_format.gradient).max
        before = old[direction, where]
        # A scale that was never set was the batch's own: what it was used with.
        own = (torch.full_like(ordered[0], top * 2.0**-recipe.margin) / ordered[0]).clamp(max=FLOAT32_MAX)
        before = torch.where((before == 0) & moved[direction, where], own, before)
        if recipe.scaling_factor_compute_algo is not None:
            scale = recipe.scaling_factor_compute_algo(amax, before.clone(), torch.tensor(top, device=self.device), recipe)
        else:
            scale = (torch.full_like(amax, top * 2.0**-recipe.margin) / amax).clamp(max=FLOAT32_MAX)
            scale = torch.where(torch.isfinite(amax) & (amax > 0), scale, before)
        return torch.where(moved[direction, where], scale, before)


def _resized(history: Tensor, length: int) -> Tensor:
    """A history in TE's order, made shorter (the oldest go) or longer."""
    if length <= len(history):
        return torch.cat([history[:1], history[len(history) - length + 1 :]]) if length > 1 else history[:1]
    return torch.cat([history[:1], history.new_zeros(length - len(history)), history[1:]])
