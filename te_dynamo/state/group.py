"""The slots of one graph's sites for one set of weights, packed as the graph takes them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from te_dynamo.state.arena import DIRECTIONS, FORWARD, GRADIENT, Arena


class Checkpoint:
    """A non-reentrant checkpoint around one call, which it may recompute as long as its hook on saved tensors is alive. It recomputes what
    forward computed unless the weights are written before, as by an optimizer."""

    def __init__(self, hook: Any, weights: Iterable[Tensor]) -> None:
        self.hook = weakref.ref(hook)
        self.weights = [(weakref.ref(w), w._version) for w in weights if not w.is_inference()]

    def is_alive(self) -> bool:
        return self.hook() is not None

    def is_as_before(self) -> bool:
        return all((w := of()) is None or w._version == version for of, version in self.weights)


class Group:
    """Gives a call its scales, and takes the amaxes that it recorded."""

    fake = False

    def __init__(self, arena: Arena, indices: tuple[Sequence[int], Sequence[int]], owners: Iterable[nn.Module]) -> None:
        self.arena = arena
        self.slots = frozenset((arena.device, direction, i) for direction in DIRECTIONS for i in indices[direction])
        self.where = tuple(_location(i, arena.device) for i in indices)
        self.owners = tuple({id(o): weakref.ref(o) for o in owners}.values())
        self._sink_places: dict[type, int | None] = {}
        self._checkpoints: list[Checkpoint] = []  # those that may recompute a call
        self._complete = -1  # the arena's version at which all scales were set
        with torch.inference_mode(False):
            self.sink = torch.zeros(len(indices[GRADIENT]), dtype=torch.float32, device=arena.device, requires_grad=True)
            self.sink.register_post_accumulate_grad_hook(_drop_gradient)

    def complete(self, gradients: bool) -> bool:
        """Whether all scales are set. Checked once for each version of the arena, since on a GPU the check waits for the device."""
        if self._complete != self.arena.version:
            scales = (self.arena.scale[d][self.where[d]] for d in (DIRECTIONS if gradients else (FORWARD,)))
            if all(bool((scale > 0).all()) for scale in scales):
                self._complete = self.arena.version
        return self._complete == self.arena.version

    def unset(self, gradients: bool) -> list[list[int]]:
        """The places of unset scales in each direction; on a GPU it waits for the device."""
        found = [(self.arena.scale[d][self.where[d]] == 0).nonzero().flatten().tolist() for d in DIRECTIONS]
        return found if gradients else [found[FORWARD], []]

    def await_recomputation(self, hook: Any, weights: Iterable[Tensor]) -> None:
        """Notes that a checkpoint may recompute the call that is being made."""
        self._checkpoints = [c for c in self._checkpoints if c.is_alive()] + [Checkpoint(hook, weights)]

    def awaits_recomputation(self, *, with_other_weights: bool = False) -> bool:
        """Whether a checkpoint may recompute what a call computed; with_other_weights: or something else."""
        self._checkpoints = [c for c in self._checkpoints if c.is_alive()]
        return any(with_other_weights or c.is_as_before() for c in self._checkpoints)

    def training(self) -> bool:
        """Whether any module that owns a weight is in training mode now; raw parameters always are.

        Any: a frozen part in eval mode must not stop the scales of the rest.
        """
        owners = [owner for reference in self.owners if (owner := reference()) is not None]
        return not owners or any(owner.training for owner in owners)

    def scales(self, direction: int, snapshot: bool, alone: bool = False) -> Tensor:
        """[slots] f32; a snapshot is a copy that later rolls do not change. alone: other ranks may not make this call, so unset scales are
        -0: the first scale is not agreed on with them."""
        where = self.where[direction]
        scale = self.arena.scale[direction]
        if isinstance(where, slice):
            result = scale[where].clone() if snapshot else scale[where]
        else:
            result = scale.index_select(0, where)
        return torch.where(result == 0, -0.0, result) if alone else result

    def sink_place(self, node: Any) -> int | None:
        """The position of the sink among the inputs of an autograd function; None if it is not one. Looked up once for each compiled graph,
        which has its own class of autograd function: the lookup has autograd make an object for every input."""
        if type(node) not in self._sink_places:
            edges = [getattr(function, "variable", None) is self.sink for function, _ in node.next_functions]
            self._sink_places[type(node)] = edges.index(True) if any(edges) else None
        return self._sink_places[type(node)]

    @torch.no_grad()
    def record(self, direction: int, amax: Tensor) -> None:
        """Records the amaxes [slots] of a call or of a backward: the maximum with what was recorded before."""
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
            self._scales = [torch.zeros(n, dtype=torch.float32, device=weight.device) for n in (forward, gradient)]
            self.sink = torch.zeros(gradient, dtype=torch.float32, device=weight.device, requires_grad=True)

    def scales(self, direction: int, snapshot: bool, alone: bool = False) -> Tensor:
        return self._scales[direction]


@torch.compiler.disable
def _drop_gradient(sink: Tensor) -> None:
    """The gradient that arrives at a sink was already taken on the way (`ScaleState.watch_backward`)."""
    sink.grad = None


def _location(indices: Sequence[int], device: torch.device) -> slice | Tensor:
    """A slice if the slots are side by side, else an index tensor."""
    start = indices[0] if indices else 0
    if list(indices) == list(range(start, start + len(indices))):
        return slice(start, start + len(indices))
    return torch.tensor(list(indices), dtype=torch.int64, device=device)
