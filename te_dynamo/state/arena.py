"""Where scales live: all slots of one device in a few tensors, so that one update moves all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from te_dynamo.lowering.fp8 import FLOAT32_MAX, FP8_MAX, scale_of
from te_dynamo.lowering.kernels import roll
from te_dynamo.recipe import DelayedScaling, Format, margin_of

FORWARD, GRADIENT = DIRECTIONS = (0, 1)
INITIAL_CAPACITY = 1024
# The tensors [2, capacity] of an arena: what an unused slot holds, and the dtype.
COLUMNS = {
    "scale": (0.0, torch.float32),
    "amax": (0.0, torch.float32),
    "history": (0.0, torch.float32),
    "cursor": (0, torch.int64),
    "top": (1.0, torch.float32),
    "limit": (float("inf"), torch.float32),
    "length": (1, torch.int64),
    "most_recent": (False, torch.bool),
    "keeps_infinite": (False, torch.bool),
    "initial_scale": (0.0, torch.float32),
}


class Arena:
    """Slots are columns of [2, capacity] tensors: a row for each direction. A scale of 0 was never set.

    scale, amax (recorded since the last roll), history [2, capacity, longest] (a ring buffer for each slot; `cursor` points
    to its newest entry), union (slots with the same number share a scale), and what a slot's recipe says: top
    (fp8_max / 2**margin), limit (the scaled amax above which growth is extrapolated), length of the history, most_recent (the
    last amax alone decides), keeps_infinite (amaxes), initial_scale.
    """

    scale: Tensor
    amax: Tensor
    history: Tensor
    cursor: Tensor
    top: Tensor
    limit: Tensor
    length: Tensor
    most_recent: Tensor
    keeps_infinite: Tensor
    initial_scale: Tensor
    union: Tensor

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.capacity, self.longest = INITIAL_CAPACITY, 1
        self.used = [1, 1]  # slot 0 stays unset: whatever has no slot reads it
        self.free: tuple[list[int], list[int]] = ([], [])  # slots that were given back
        self.recipes: tuple[dict[int, DelayedScaling], dict[int, DelayedScaling]] = ({}, {})
        self.has_unions = False
        self.special = False  # whether any slot's recipe is like_te, or has an algorithm other than "max"
        self.version = 0  # changes whenever a slot is set up, written or given back
        self._custom: tuple[int, list[tuple[DelayedScaling, int, Tensor]]] = (-1, [])
        self._allocate()

    def _allocate(self) -> None:
        """Makes the tensors, or makes them larger."""
        with torch.inference_mode(False), torch.no_grad():
            for name, (fill, dtype) in COLUMNS.items():
                shape = (2, self.capacity, self.longest) if name == "history" else (2, self.capacity)
                self._replace(name, torch.full(shape, fill, dtype=dtype, device=self.device))
            self._replace("union", torch.arange(self.capacity, device=self.device).repeat(2, 1))

    def _replace(self, name: str, new: Tensor) -> None:
        old = getattr(self, name, None)
        if old is not None:
            new[tuple(slice(n) for n in old.shape)] = old
        setattr(self, name, new)

    # -- slots

    def take(self, direction: int, count: int) -> range:
        """Takes `count` unset slots with consecutive numbers."""
        free = self.free[direction]
        reused = next((run for i in sorted(free) if set(run := range(i, i + count)).issubset(free)), None)
        if reused is not None:
            for i in reused:
                free.remove(i)
                self._leave_union(direction, i)
            self.initial_scale[direction, list(reused)] = 0
            self.clear(direction, reused)
            return reused
        start = self.used[direction]
        self.used[direction] += count
        if self.used[direction] > self.capacity:
            self.capacity = max(2 * self.capacity, self.used[direction])
            self._allocate()
        return range(start, start + count)

    def give_back(self, direction: int, index: int) -> None:
        """Frees a slot. No tensor is touched: this runs in finalizers, at any time."""
        self.free[direction].append(index)
        self.recipes[direction].pop(index, None)
        self.version += 1

    @torch.no_grad()
    def clear(self, direction: int, indices: Sequence[int]) -> None:
        """Makes slots unset."""
        where = list(indices)
        for t in (self.amax, self.history, self.cursor):
            t[direction, where] = 0
        self.scale[direction, where] = self.initial_scale[direction, where]
        self.version += 1

    @torch.no_grad()
    def configure(self, direction: int, indices: Sequence[int], recipe: DelayedScaling, roles: Sequence[str] = ()) -> None:
        """Gives slots their recipe. A history keeps the entries that fit its new length; a scale is adapted to the new range.

        roles: one for each slot, which decides its margin; without them the recipe's own margin, or 0.
        """
        role = dict(zip(indices, roles, strict=True)) if roles else {}
        where = [i for i in indices if self.recipes[direction].get(i) != recipe]
        if not where:
            return
        histories = {i: self.ordered_history(direction, i) for i in where if i in self.recipes[direction]}
        if recipe.amax_history_len > self.longest:
            self.longest = recipe.amax_history_len
            self._allocate()
        limit = FP8_MAX[_dtype(recipe, direction)]
        margins = [margin_of(recipe.margin, role[i], gradient=direction == GRADIENT) if role else recipe.margin or 0 for i in where]
        top = torch.tensor([limit * 2.0**-margin for margin in margins], dtype=torch.float32, device=self.device)
        old_top = self.top[direction, where]
        self.scale[direction, where] *= torch.where(old_top == top, 1.0, top / old_top)
        values = {
            "top": top,
            "limit": limit if recipe.extrapolates else float("inf"),
            "length": recipe.amax_history_len,
            "most_recent": recipe.amax_compute_algo == "most_recent",
            "keeps_infinite": recipe.like_te,
            "initial_scale": 1.0 if recipe.like_te else 0.0,
        }
        for name, value in values.items():
            getattr(self, name)[direction, where] = value
        self.special |= recipe.like_te or recipe.amax_compute_algo != "max"
        self.recipes[direction].update(dict.fromkeys(where, recipe))
        for i, history in histories.items():
            self.write(direction, i, self.scale[direction, i], _resized(history, recipe.amax_history_len))
        scale = self.scale[direction, where]
        self.scale[direction, where] = torch.where(scale == 0, self.initial_scale[direction, where], scale)
        self.version += 1

    def ordered_history(self, direction: int, index: int) -> Tensor:
        """A slot's history [length] in TE's order: entry 0 is being written, entry 1 is the oldest."""
        return ordered(self.history[direction, index], self.cursor[direction, index], int(self.length[direction, index]))

    @torch.no_grad()
    def write(self, direction: int, index: int, scale: Tensor, history: Tensor) -> None:
        """Sets a slot's scale, and its history [length] in TE's order. Entry 0 becomes the recorded amax."""
        self.scale[direction, index] = scale
        self.cursor[direction, index] = 0
        self.history[direction, index] = 0
        self.history[direction, index, 1 : len(history)] = history[1:]
        self.amax[direction, index] = history[0]
        self.version += 1

    # -- slots that share a scale

    @torch.no_grad()
    def unite(self, direction: int, indices: Sequence[int]) -> None:
        """Makes these slots share one scale from now on, that of the largest amax, as the tensors of one GEMM do."""
        union, where = self.union[direction], list(indices)
        if bool((union[where] == union[where[:1]]).all()):
            return
        self.has_unions = True
        members = torch.isin(union, union[where]).nonzero().flatten().tolist()
        union[members] = members[0]
        scales = self.scale[direction, members]
        if bool((scales > 0).any()):
            smallest = scales[scales > 0].min()
            history = torch.stack([self.ordered_history(direction, i) for i in members]).amax(0)
            for i in members:
                self.write(direction, i, smallest, history)

    def _leave_union(self, direction: int, index: int) -> None:
        """Takes a slot out of its union, which may have that slot's number."""
        union = self.union[direction]
        others = (union == union[index]).nonzero().flatten().tolist()
        others.remove(index)
        if others:
            union[others] = others[0]
        union[index] = index

    # -- the update

    @torch.no_grad()
    def roll(
        self, reduce: Callable[[Tensor], None] | None = None, held: Sequence[Sequence[Any]] = (), *, first_stays_unset: bool = False
    ) -> None:
        """Moves the recorded amaxes into the histories and computes new scales. A slot without a new amax does not move.

        A fixed number of kernels, however many slots there are; on a GPU one for the update itself. reduce: max-reduces the
        amaxes [2, n] over a group's ranks. first_stays_unset: a slot that rolls for the first time gets no scale yet.
        """
        n = max(self.used)
        amax = self.amax[:, :n]
        self.drop_infinite(amax)
        if reduce is not None:
            reduce(amax)
        waiting = [(amax[direction], where, amax[direction][where].clone()) for both in held for direction, where in enumerate(both)]
        for of_direction, where, _ in waiting:
            of_direction[where] = 0.0
        first = (self.scale[:, :n] == 0) & (self.cursor[:, :n] == 0) if first_stays_unset else None
        self.advance(amax, self.scale[:, :n], self.history[:, :n], self.cursor[:, :n])
        if first is not None:
            self.scale[:, :n].masked_fill_(first, 0.0)
        amax.zero_()
        for of_direction, where, recorded in waiting:
            of_direction[where] = recorded

    def drop_infinite(self, amax: Tensor) -> None:
        """Zeroes infinite amaxes [2, n], except where the slot's recipe keeps them."""
        if self.special:
            amax.masked_fill_(torch.isinf(amax) & ~self.keeps_infinite[:, : amax.shape[1]], 0.0)
        else:
            torch.nan_to_num_(amax, posinf=0.0)

    def advance(self, amax: Tensor, scale: Tensor, history: Tensor, cursor: Tensor) -> None:
        """The update itself, in place on `scale`, `history` and `cursor` of the first n slots, from `amax` [2, n]."""
        n = amax.shape[1]
        if self.has_unions:
            union = self.union[:, :n]
            amax = torch.zeros_like(amax).scatter_reduce(1, union, amax, "amax").gather(1, union)
        if self.device.type == "cuda" and self.longest <= roll.LONGEST and not self._custom_slots():
            roll.launch(amax, scale, history, cursor, self.top, self.limit, self.length, self.most_recent)
            return
        moved = amax != 0
        # The cursor's entry is 0, so writing the 0 of a slot that does not move changes nothing.
        history.scatter_(2, cursor.unsqueeze(-1), amax.unsqueeze(-1))
        deciding = history.amax(-1)  # the oldest entry counts once more, then makes room
        if self.special:
            deciding = torch.where(self.most_recent[:, :n], amax, deciding)
        top, scaled = self.top[:, :n], amax * scale
        growth = torch.where(scaled > self.limit[:, :n], scaled / top, 1.0).clamp_(max=roll.MOST_GROWTH)
        fresh = (top / deciding / growth).clamp_(max=FLOAT32_MAX)
        new = torch.where(moved & torch.isfinite(deciding) if self.special else moved, fresh, scale)
        for recipe, direction, where in self._custom_slots():
            at = (direction, where)
            custom = _custom_scale(recipe, direction, ordered(history[at], cursor[at], recipe.amax_history_len), scale[at])
            new[at] = torch.where(moved[at], custom, new[at])
        scale.copy_(new)
        cursor.add_(moved).remainder_(self.length[:, :n])
        history.scatter_(2, cursor.unsqueeze(-1), 0.0)

    def _custom_slots(self) -> list[tuple[DelayedScaling, int, Tensor]]:
        """The slots whose recipe has functions of its own, by recipe and direction."""
        if self._custom[0] != self.version:
            found: dict[tuple[DelayedScaling, int], list[int]] = {}
            for direction, recipes in enumerate(self.recipes):
                for index, recipe in recipes.items():
                    if callable(recipe.amax_compute_algo) or recipe.scaling_factor_compute_algo is not None:
                        found.setdefault((recipe, direction), []).append(index)
            slots = [
                (recipe, direction, torch.tensor(where, dtype=torch.int64, device=self.device))
                for (recipe, direction), where in found.items()
            ]
            self._custom = (self.version, slots)
        return self._custom[1]


def _custom_scale(recipe: DelayedScaling, direction: int, history: Tensor, old: Tensor) -> Tensor:
    """The scales [n] by a recipe's own functions. history: [n, length] in TE's order; old: the scales [n] so far."""
    dtype, history = _dtype(recipe, direction), history.t().contiguous()
    # A scale that was never set: the first batch was scaled by its own amax.
    margin = recipe.margin or 0
    old = torch.where((old == 0) & (history[0] != 0), scale_of(history[0], dtype, margin), old)
    if callable(recipe.amax_compute_algo):
        amax = recipe.amax_compute_algo(history)
    else:
        amax = history[0] if recipe.amax_compute_algo == "most_recent" else history.amax(0)
    if recipe.scaling_factor_compute_algo is not None:
        return recipe.scaling_factor_compute_algo(
            amax, old.clone(), torch.tensor(FP8_MAX[dtype], dtype=torch.float32, device=old.device), recipe
        )
    return torch.where(torch.isfinite(amax) & (amax > 0), scale_of(amax, dtype, margin), old)


def _indices(where: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(where, dtype=torch.int64, device=device)


def _dtype(recipe: DelayedScaling, direction: int) -> torch.dtype:
    fp8_format: Format = recipe.fp8_format
    return fp8_format.forward if direction == FORWARD else fp8_format.gradient


def ordered(history: Tensor, cursor: Tensor, length: int) -> Tensor:
    """Histories [..., longest] with their cursors [...] -> [..., length] in TE's order: entry 0 is being written, 1 the oldest."""
    places = (cursor.unsqueeze(-1) + torch.arange(length, device=cursor.device)) % length
    return history.gather(-1, places)


def _resized(history: Tensor, length: int) -> Tensor:
    """A history in TE's order, made shorter (the oldest entries go) or longer."""
    newest = history[1:][max(0, len(history) - length) :]
    return torch.cat([history[:1], history.new_zeros(length - 1 - len(newest)), newest])
