"""What runs at every call: the scale state of the weights that are passed in goes into the compiled graph, and back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from te_dynamo.cache_key import sources_key
from te_dynamo.config import Options
from te_dynamo.ir.state_inputs import StateInput
from te_dynamo.lowering.graph_passes import joint_graph_passes
from te_dynamo.lowering.partition import inputs_recomputed
from te_dynamo.lowering.registry import functions_in_graphs, modules
from te_dynamo.passes.attach import Attached
from te_dynamo.passes.lower import CachedWeights, Lowered
from te_dynamo.state import FORWARD, GRADIENT, STATE, FakeGroup, Group, is_fake
from te_dynamo.state.reduce import ranks
from te_dynamo.state.sharded import gathered

Compiler = Callable[[GraphModule, Sequence[Any], Options], Callable[..., Any]]


def compile_inductor(gm: GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Inductor, with the user's mode and settings."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import get_custom_graph_passes

    # A custom operator is keyed by its name only: what our sources and options are must be part of the caches' key.
    sources = sources_key(modules())
    marked = dict(config.unsafe_marked_cacheable_functions) | dict.fromkeys(functions_in_graphs(), f"{sources} {options.cache_key()}")
    with ExitStack() as stack:
        stack.enter_context(config.patch(unsafe_marked_cacheable_functions=marked))
        passes = [*get_custom_graph_passes(config.joint_custom_pre_pass), *joint_graph_passes(sources)]
        stack.enter_context(config.patch(joint_custom_pre_pass=passes))
        stack.enter_context(inputs_recomputed(options.recompute_inputs))
        return compile_fx(gm, list(inputs), config_patches=options.inductor_config())  # type: ignore[return-value]


def compile_without_codegen(gm: GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """AOTAutograd alone: for the graph that calibrates, which is run once or twice."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.compilers import nop

    return aot_autograd(fw_compiler=nop, bw_compiler=nop)(gm, list(inputs))


@dataclass(frozen=True)
class Variant:
    """One compiled form of a graph."""

    run: Callable[..., Any]
    lowered: Lowered


class CompiledGraph:
    """The callable that Dynamo gets: takes the graph's inputs, adds the state's, and takes the recorded amaxes off.

    `calibrating` is the form for calls that meet a scale which was never set; None where `steady` serves those too. `check` is told
    of the inputs of each call before it runs (the option `verify`).
    """

    def __init__(
        self,
        steady: Variant,
        calibrating: Variant | None,
        attached: Attached,
        device: torch.device,
        options: Options,
        *,
        trains: bool,
        check: Callable[[Sequence[Any]], None] | None = None,
    ) -> None:
        self.check = check
        self.steady, self.calibrating, self.attached = steady, calibrating, attached
        self.device, self.options, self.trains = device, options, trains
        self.weight_positions = tuple(dict.fromkeys(k.argument for k in attached.keys))
        self.groups: dict[tuple[int, ...], tuple[int, Group | None]] = {}
        self.weights = WeightCache()

    def __call__(self, *args: Any) -> Any:
        if self.check is not None:
            self.check(args)
        group = self._group(args) if self.attached.keys else None
        recording = self.trains and group is not None and torch.is_grad_enabled() and not group.fake and group.training()
        if group is None or not group.fake:
            STATE.visit(group if recording else None)
        variant = self._variant(group)
        state = self._state_inputs(group, args, recording)
        weights = self.weights.inputs(variant.lowered.weights, args)
        outputs = variant.run(*args, *state, *weights)
        if not variant.lowered.records:
            return outputs
        *outputs, amax = outputs
        if recording:
            group.record(amax)  # type: ignore[union-attr]
        if self.trains and self.attached.gradient and not group.fake:  # type: ignore[union-attr]
            STATE.watch_backward(outputs, state[StateInput.GRAD_AMAX], recording)
        return outputs

    def _group(self, args: Sequence[Any]) -> Group | None:
        key = tuple([id(args[i]) for i in self.weight_positions])
        entry = self.groups.get(key)
        # Without slots of its own yet (inference), what is found depends on what other graphs have made since.
        if entry is not None and (self.trains or entry[0] == STATE.version):
            return entry[1]
        group = self._new_group(args)
        if entry is None:
            for i in self.weight_positions:
                if not is_fake(args[i]):
                    STATE.watch(args[i], self.groups, key)
        self.groups[key] = (STATE.version, group)
        return group

    def _new_group(self, args: Sequence[Any]) -> Group | None:
        if any(is_fake(args[i]) for i in self.weight_positions):
            return FakeGroup(args[self.weight_positions[0]], self.attached.forward, self.attached.gradient)
        attached, process_group = self.attached, ranks(self.options.amax_group)
        return STATE.group(attached.keys, attached.unions, args, self.device, create=self.trains, process_group=process_group)

    def _variant(self, group: Group | None) -> Variant:
        if self.calibrating is None or (group is not None and (group.fake or group.complete(gradients=self.trains))):
            return self.steady
        return self.calibrating

    def _state_inputs(self, group: Group | None, args: Sequence[Any], recording: bool) -> list[Tensor]:
        if not self.attached.keys:
            return []
        if group is None:
            return [torch.zeros(self.attached.forward, device=self.device)]
        inputs = [group.scales(FORWARD, snapshot=self.trains)]
        if self.trains and self.attached.gradient:
            inputs += [group.scales(GRADIENT, snapshot=True), group.grad_amax(recording), group.sink]
        return inputs


class WeightCache:
    """FP8 copies of weights that did not change: by identity, version counter and address.

    An optimizer's step tells by itself: fused ones leave no trace in a version. Nor does a write through `.data`, or through other
    memory that a weight is a view of: `te_dynamo.weights_changed(model)` tells of it. A tensor without a version
    counter (made in inference mode), or that FSDP gathers, is quantized at every call.
    """

    everyone: weakref.WeakSet[WeightCache] = weakref.WeakSet()

    def __init__(self) -> None:
        self.entries: dict[tuple[int, tuple[int, ...]], tuple[tuple[Any, ...], list[Tensor]]] = {}
        self.changing: dict[tuple[int, tuple[int, ...]], bool] = {}  # whether a version tells nothing of these weights
        _watch_optimizers()
        WeightCache.everyone.add(self)

    def inputs(self, wanted: Sequence[CachedWeights], args: Sequence[Any]) -> list[Tensor]:
        """The FP8 weights of each GEMM, in the order of the graph's inputs."""
        return [t for number, weights in enumerate(wanted) for t in self._one(number, weights, args)]

    def _one(self, number: int, wanted: CachedWeights, args: Sequence[Any]) -> list[Tensor]:
        tensors = [args[i] for i in wanted.arguments]
        key = (number, tuple([id(t) for t in tensors]))
        state = None if self._changes(key, tensors) or _captured(wanted, tensors) else _fingerprint(tensors)
        entry = self.entries.get(key)
        if entry is not None and state is not None and entry[0] == state:
            return entry[1]
        with torch.no_grad():
            made = wanted.make(tensors)
        if state is not None:
            if entry is None:
                for t in tensors:
                    STATE.watch(t, self.entries, key)
            self.entries[key] = (state, made)
        return made

    def _changes(self, key: tuple[int, tuple[int, ...]], tensors: Sequence[Tensor]) -> bool:
        """Whether these weights are filled anew for each call."""
        if key not in self.changing:
            self.changing[key] = gathered(tensors)
            for t in tensors if _fingerprint(tensors) is not None else ():
                STATE.watch(t, self.changing, key)
        return self.changing[key]

    def forget(self, tensors: set[int]) -> None:
        """Drops what was made of any of these tensors, by id."""
        for key in [k for k in self.entries if not tensors.isdisjoint(k[1])]:
            del self.entries[key]


@cache
def _watch_optimizers() -> None:
    """From now on, whatever an optimizer of torch's kind has stepped is forgotten."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def stepped(optimizer: Any, *_: Any) -> None:
        weights = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for weight_cache in list(WeightCache.everyone):
            weight_cache.forget(weights)

    register_optimizer_step_post_hook(stepped)


def _captured(wanted: CachedWeights, tensors: Sequence[Tensor]) -> bool:
    """Whether a CUDA graph capture is running, in which cached weights of training would go stale."""
    return wanted.trains and any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing()


def _fingerprint(tensors: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """Changes whenever a tensor is written in the ways that autograd sees; None where that cannot be told."""
    try:
        return tuple([(t._version, t.data_ptr()) for t in tensors])
    except RuntimeError:  # an inference tensor, or a fake one
        return None


def weights_changed(model: torch.nn.Module) -> None:
    """Tells te_dynamo that parameters of `model` were written in a way that leaves no trace (through `.data`, or by foreign
    code): their FP8 copies are made again at the next call."""
    tensors = {id(p) for p in model.parameters()}
    for weight_cache in list(WeightCache.everyone):
        weight_cache.forget(tensors)
