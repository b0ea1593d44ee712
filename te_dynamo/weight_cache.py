"""FP8 copies of weights, kept until the weights change."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from te_dynamo.fp8_weight import FP8Weight
from te_dynamo.lowering.kernels.refresh import Refresh, by_device
from te_dynamo.passes.lower import CachedWeights
from te_dynamo.state import STATE, is_fake
from te_dynamo.state.sharded import gathered

SAMPLED = 64  # elements of each weight that are compared
# What CUDA graphs were captured with: they hold only addresses, and nothing tells when they are gone.
_IN_CUDA_GRAPHS: list[tuple[list[SharedCopies], list[Refresh]]] = []
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size; as integers, NaN equals itself


class WeightCache:
    """FP8 copies of weights, kept until the weights change. Changes are detected by version counter, by address and by some of the
    elements: on a CPU these are read here (`SAMPLED`), on a GPU by a kernel that also requantizes what changed
    (`lowering.kernels.refresh`).

    So every write that autograd sees is detected, and every change of a whole tensor, however it is made: a collective, `.data`, numpy,
    memory that a weight is a view of. An optimizer's step is detected by a hook, since fused ones leave no trace in a version.
    `te_dynamo.weights_changed(model)` reports the rest: a few elements written without autograd, and on a GPU any such write to a weight
    whose copy that kernel cannot make (`Implementation.kept_as`), or that the model casts first. A tensor without a version counter (made
    in inference mode), or that FSDP gathers, is quantized at every call.

    Graphs that quantize the same weights in the same way share the copies: those for a prompt and for a token, or for several lengths.
    """

    everyone: weakref.WeakSet[WeightCache] = weakref.WeakSet()

    def __init__(self) -> None:
        self.entries: dict[tuple[int, ...], _Copies] = {}  # by the ids of all weights of a call
        _watch_optimizers()
        WeightCache.everyone.add(self)

    def inputs(self, wanted: Sequence[CachedWeights], args: Sequence[Any]) -> list[Tensor]:
        """The FP8 weights of each GEMM, in the order of the graph's inputs."""
        if not wanted:
            return []
        tensors = [args[i] for weights in wanted for i in weights.arguments]
        if is_fake(tensors[0]) or (_capturing(tensors) and any(weights.trains for weights in wanted)):
            return [t for copies in _made(wanted, tensors) for t in copies]  # kept across a replay, those of training would be stale
        key = tuple(map(id, tensors))
        copies = self.entries.get(key)
        if copies is None or copies.wanted is not wanted:  # another form of the graph may need other copies
            for replaced in [k for k, c in self.entries.items() if not c.held(k)]:
                del self.entries[replaced]
            copies = self.entries[key] = _Copies(wanted, tensors)
            for t in tensors:
                STATE.watch(t, self.entries, key)
        return copies.current(tensors)

    def forget(self, tensors: set[int]) -> None:
        """Copies of any of these tensors, given by id, are made again when they are next needed."""
        for key, copies in self.entries.items():
            if not tensors.isdisjoint(key):
                copies.states = [None] * len(key)

    def drop(self, tensors: set[int]) -> None:
        """Drops everything that refers to any of these tensors, given by id."""
        for key in [key for key in self.entries if not tensors.isdisjoint(key)]:
            del self.entries[key]


class SharedCopies:
    """The copies of one site's weights, shared by all graphs that need the same ones."""

    def __init__(self, weights: CachedWeights, tensors: Sequence[Tensor], states: list[Any], seen: Tensor) -> None:
        self.weights, self.states, self.seen = weights, states, seen
        (self.copies,) = _made([weights], tensors)
        self.gemms = [] if None in states else weights.made_again(tensors, self.copies)

    def made_of(self, states: list[Any], seen: Tensor) -> bool:
        """Whether these are copies of weights in this state, with these samples."""
        return None not in states and states == self.states and torch.equal(seen, self.seen)


SHARED: weakref.WeakValueDictionary[tuple[Any, ...], SharedCopies] = weakref.WeakValueDictionary()  # by `key_of`


class _Copies:
    """The copies of the weights of one call."""

    def __init__(self, wanted: Sequence[CachedWeights], tensors: Sequence[Tensor]) -> None:
        self.wanted = wanted
        self.holders = STATE.homes.all_holders(tensors)
        self.gathered = gathered(tensors)
        self.states: list[Any] = [None] * len(tensors)
        self.samples: list[Tensor] = []
        self.seen = torch.empty(0)
        self.kept: list[SharedCopies] = []
        self.refreshes: list[Refresh] = []  # of those on a GPU

    def held(self, identities: Sequence[int]) -> bool:
        """Whether the weights are still where they were."""
        return all(holders.has(identity) for holders, identity in zip(self.holders, identities, strict=True))

    def current(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The copies of the weights as they are now."""
        states = [None if self.gathered else state_of(t) for t in tensors]
        # In this order: samples are read at the address that is part of the state.
        current = None not in states and states == self.states and torch.equal(torch.cat(self.samples), self.seen)
        if _capturing(tensors):
            if not current:  # quantized at each replay
                return [t for copies in _made(self.wanted, tensors) for t in copies]
            if not any(self.refreshes is refreshes for _, refreshes in _IN_CUDA_GRAPHS):
                _IN_CUDA_GRAPHS.append((self.kept, self.refreshes))
        if not current:
            self._make(tensors, states)
            self.refreshes = by_device(gemm for kept in self.kept for gemm in kept.gemms)
        else:
            for refresh in self.refreshes:
                refresh()
        return [t for kept in self.kept for t in kept.copies]

    def _make(self, tensors: Sequence[Tensor], states: list[Any]) -> None:
        """Makes the copies that no other graph has."""
        start, kept = 0, list[SharedCopies]()
        self.samples = [sample_of(t) for t in tensors]
        for weights in self.wanted:
            of = slice(start, start := start + len(weights.arguments))
            key, seen = key_of(weights, tensors[of]), torch.cat(self.samples[of])
            known = SHARED.get(key)
            if known is None or not known.made_of(states[of], seen):
                known = SHARED[key] = SharedCopies(weights, tensors[of], states[of], seen)
            kept.append(known)
        self.states, self.kept = states, kept
        self.seen = torch.cat(self.samples)


def key_of(weights: CachedWeights, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """The key of shared copies: how they are made, and from which tensors."""
    return weights.key, *map(id, tensors)


def _made(wanted: Sequence[CachedWeights], tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    given = iter(tensors)
    with torch.no_grad():
        return [weights.make([next(given) for _ in weights.arguments]) for weights in wanted]


def state_of(t: Tensor) -> tuple[int, int] | None:
    """A value that changes whenever a tensor is written in a way that autograd sees; None if that cannot be told."""
    if isinstance(t, FP8Weight):
        return 0, t.fp8.data_ptr()
    try:
        return t._version, t.data_ptr()
    except RuntimeError:  # of inference mode
        return None


def sample_of(t: Tensor) -> Tensor:
    """Elements spread over a tensor on a CPU, as integers: a view that owns no memory, to be read only while `t` has this address."""
    if t.device.type != "cpu" or type(t) not in (Tensor, nn.Parameter) or not t.numel() or t.element_size() not in _BITS:
        return torch.empty(0, dtype=torch.uint8)
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    step = max(1, (span // SAMPLED - 1) | 1)  # odd, so that they are not all of one column
    memory = (ctypes.c_char * (span * t.element_size())).from_address(t.data_ptr())
    return torch.frombuffer(memory, dtype=_BITS[t.element_size()])[::step][:SAMPLED]


def _capturing(tensors: Sequence[Tensor]) -> bool:
    """Whether a CUDA graph that uses these tensors is being captured."""
    return tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()


@cache
def _watch_optimizers() -> None:
    """From now on, the copies of whatever a torch optimizer steps are forgotten."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    @torch.compiler.disable
    def stepped(optimizer: Any, *_: Any) -> None:
        _forget(id(p) for group in optimizer.param_groups for p in group["params"])

    register_optimizer_step_post_hook(stepped)


def _forget(tensors: Any) -> None:
    identities = set(tensors)
    for key in [key for key in list(SHARED) if not identities.isdisjoint(key)]:
        SHARED.pop(key, None)
    for weight_cache in list(WeightCache.everyone):
        weight_cache.forget(identities)


def weights_changed(model: nn.Module) -> None:
    """Tells te_dynamo that parameters of `model` were written in a way that leaves no trace (see `WeightCache`): their FP8 copies are made
    again at the next call."""
    _forget(id(p) for p in model.parameters())
