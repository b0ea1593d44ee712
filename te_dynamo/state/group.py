"""The slots of one graph's sites for one set of weights, packed as the graph wants them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from te_dynamo.state.arena import DIRECTIONS, FORWARD, GRADIENT, Arena


class Group:
    """Gives a call its scales, and takes the amaxes that it recorded."""

    fake = False

    def __init__(self, arena: Arena, indices: tuple[Sequence[int], Sequence[int]], owners: Iterable[nn.Module]) -> None:
        self.arena = arena
        self.slots = frozenset((arena.device, direction, i) for direction in DIRECTIONS for i in indices[direction])
        self.where = tuple(_location(i, arena.device) for i in indices)
        self.owners = tuple({id(o): weakref.ref(o) for o in owners}.values())
        self._complete = -1  # the arena's version at which all scales were set
        with torch.inference_mode(False):
            self.sink = torch.zeros(len(indices[GRADIENT]), device=arena.device, requires_grad=True)
            self.scratch = torch.zeros(len(indices[GRADIENT]), device=arena.device)  # for calls that must not record
            self.own_grad_amax = None if isinstance(self.where[GRADIENT], slice) else torch.zeros_like(self.scratch)
        if self.own_grad_amax is not None:
            arena.scattered_groups.append(weakref.ref(self))

    def complete(self, gradients: bool) -> bool:
        """Whether all scales are set. Looked up once for each version of the arena, since on a GPU it waits for the device."""
        if self._complete != self.arena.version:
            scales = (self.arena.scale[d][self.where[d]] for d in (DIRECTIONS if gradients else (FORWARD,)))
            if all(bool((scale > 0).all()) for scale in scales):
                self._complete = self.arena.version
        return self._complete == self.arena.version

    def training(self) -> bool:
        """Whether any module that owns a weight is in training mode now; raw parameters always are.

        Any: a frozen part in eval mode must not stop the scales of the rest.
        """
        owners = [owner for reference in self.owners if (owner := reference()) is not None]
        return not owners or any(owner.training for owner in owners)

    def scales(self, direction: int, snapshot: bool) -> Tensor:
        """[slots] f32; a snapshot is a copy that no later roll reaches."""
        where = self.where[direction]
        scale = self.arena.scale[direction]
        if isinstance(where, slice):
            return scale[where].clone() if snapshot else scale[where]
        return scale.index_select(0, where)

    def grad_amax(self, recording: bool) -> Tensor:
        """Where backward max-writes the gradients' amaxes [slots]."""
        if not recording:
            return self.scratch
        if self.own_grad_amax is not None:
            return self.own_grad_amax
        return self.arena.amax.data[GRADIENT][self.where[GRADIENT]]

    def record(self, amax: Tensor) -> None:
        """Max-writes the forward amaxes [slots] of a call."""
        self._record(FORWARD, amax)

    def flush(self) -> None:
        """Moves the gradients' amaxes into the arena, if the slots are scattered there."""
        if self.own_grad_amax is not None:
            self._record(GRADIENT, self.own_grad_amax)
            self.own_grad_amax.zero_()

    @torch.no_grad()
    def _record(self, direction: int, amax: Tensor) -> None:
        where, target = self.where[direction], self.arena.amax[direction]
        if isinstance(where, slice):
            torch.maximum(target[where], amax, out=target[where])
        else:
            target.scatter_reduce_(0, where, amax, "amax")


class FakeGroup(Group):
    """State of the right shapes in the fake mode of the weights, for a trial run on shapes only: nothing is recorded."""

    fake = True

    def __init__(self, weight: Tensor, forward: int, gradient: int) -> None:
        assert isinstance(weight, FakeTensor)
        with weight.fake_mode, torch.inference_mode(False):
            self._scales = [torch.zeros(n, device=weight.device) for n in (forward, gradient)]
            self.sink = torch.zeros(gradient, device=weight.device, requires_grad=True)
            self.scratch = torch.zeros(gradient, device=weight.device)

    def scales(self, direction: int, snapshot: bool) -> Tensor:
        return self._scales[direction]

    def grad_amax(self, recording: bool) -> Tensor:
        return self.scratch


def _location(indices: Sequence[int], device: torch.device) -> slice | Tensor:
    """A slice if the slots are side by side, else an index tensor."""
    start = indices[0] if indices else 0
    if list(indices) == list(range(start, start + len(indices))):
        return slice(start, start + len(indices))
    return torch.tensor(list(indices), device=device)
