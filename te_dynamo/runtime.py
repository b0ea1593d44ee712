"""What runs at every call: the scale state of the given weights is passed to the compiled graph, and the recorded amaxes are taken back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch.autograd import forward_ad
from torch.fx import GraphModule

from te_dynamo.cache_key import sources_key
from te_dynamo.config import Options
from te_dynamo.eager import eager, runs_eagerly
from te_dynamo.lowering.graph_passes import joint_graph_passes, last_passes
from te_dynamo.lowering.quantize_rows import register_lowering
from te_dynamo.lowering.registry import functions_in_graphs, modules
from te_dynamo.passes.attach import Attached
from te_dynamo.passes.lower import Lowered, Unset
from te_dynamo.state import FORWARD, GRADIENT, STATE, FakeGroup, Group, checkpoint_around, is_fake
from te_dynamo.state.homes import Holders
from te_dynamo.state.reduce import ranks
from te_dynamo.weight_cache import WeightCache

Compiler = Callable[[GraphModule, Sequence[Any], Options], Callable[..., Any]]


def compile_inductor(gm: GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Inductor, with the user's mode and settings."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    # Torch's caches know a custom operator only by its name, so our sources and options must be part of their key.
    sources = sources_key(modules())
    marked = dict(config.unsafe_marked_cacheable_functions) | dict.fromkeys(functions_in_graphs(), f"{sources} {options.cache_key()}")
    register_lowering()
    patches = options.inductor_config()
    for name, passes in (("joint_custom_pre_pass", joint_graph_passes), ("post_grad_custom_post_pass", last_passes)):
        patches[name] = passes(sources, patches.get(name, getattr(config, name)))  # patches, since backward is compiled later
    with config.patch(unsafe_marked_cacheable_functions=marked):
        return compile_fx(gm, list(inputs), config_patches=patches)  # type: ignore[return-value]


@contextmanager
def beside() -> Iterator[None]:
    """The context for compiling a second form of a graph. DDPOptimizer calls what it compiles once on shapes, expects one form of each
    bucket, and has AOTAutograd answer that first call with fake tensors: the second form would return them from its first real call."""
    context = TracingContext.try_get()
    if context is None or not context.fakify_first_call:
        yield
        return
    own = copy(context)
    own.fakify_first_call, own.ddp_optimizer_ctx = False, None
    with tracing(own):
        yield


def compile_without_codegen(gm: GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """AOTAutograd alone. As with generated code, results that share memory are no views to autograd, which would forbid writing them.

    A view becomes a reshape, as in Inductor: some operators' results have other strides than AOTAutograd expects (`softplus_backward`).
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func

    def as_it_is(graph: GraphModule, _: Any) -> Callable[..., Any]:
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default
        graph.recompile()

        def run(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return graph(*args)

        return make_boxed_func(run)

    return aot_autograd(fw_compiler=as_it_is, bw_compiler=as_it_is)(gm, list(inputs))


def eagerly(gm: GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """For the calibrating graph: not traced unless it has to be."""
    return eager(gm) if runs_eagerly(gm, inputs) else compile_without_codegen(gm, inputs, options)


@dataclass(frozen=True)
class Variant:
    """One compiled form of a graph."""

    run: Callable[..., Any]
    lowered: Lowered


class Calibration:
    """The forms of a graph for calls that meet a scale that was never set. At first all sites calibrate, in a graph that runs as
    AOTAutograd leaves it: generating code does not pay if all scales are set after that. If some stay unset (in eval with gradients
    nothing sets them; a layer that the loss does not reach gets no gradient), a form is compiled in which only the sites with unset
    scales calibrate.

    `partly` makes that form; None if the first one stays. random: whether the graph draws random numbers.

    A checkpoint recomputes in backward what forward computed, so it needs forward's form: a form is kept as long as a call may be
    recomputed.
    """

    FIRST_CALLS = 3
    LOOKED_AT = 32  # unset scales are looked up every so many calls, since on a GPU that waits for the device

    def __init__(self, first: Variant, partly: Callable[[Unset], Variant] | None, *, random: bool = False) -> None:
        self.first, self.partly, self.random = first, partly, random
        self.forms: dict[Unset, Variant] = {}
        self.calls: weakref.WeakKeyDictionary[Group, int] = weakref.WeakKeyDictionary()
        self.chosen: weakref.WeakKeyDictionary[Group, tuple[int, Variant]] = weakref.WeakKeyDictionary()  # with the arena's version
        self.held: weakref.WeakKeyDictionary[Group, Variant | None] = weakref.WeakKeyDictionary()  # while a call may be recomputed

    def of(self, group: Group | None, gradients: bool) -> Variant | None:
        """The form for a call with this group; None if all scales are set."""
        if group is None:
            return self.first
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward and checkpoint_around() is None:
            return self._choose(group, gradients)
        if (
            group.awaits_recomputation(with_other_weights=in_backward)
            and group in self.held
            and (self.held[group] is not None or group.complete(gradients))
        ):
            return self.held[group]
        form = self._of_a_reentrant_checkpoint(group, gradients) if in_backward else self._choose(group, gradients)
        self.held[group] = form
        return form

    def _of_a_reentrant_checkpoint(self, group: Group, gradients: bool) -> Variant | None:
        """Its forward ran without gradients, in code generated by Inductor, which draws other random numbers than PyTorch's operators
        do."""
        if self.partly is None or not self.random or group.complete(gradients):
            return self._choose(group, gradients)
        return self._some_unset(group, gradients, self.partly)

    def _choose(self, group: Group, gradients: bool) -> Variant | None:
        version, chosen = self.chosen.get(group, (-1, None))
        if chosen is None and group.complete(gradients):
            return None
        calls = self.calls[group] = self.calls.get(group, 0) + 1
        if version == group.arena.version and calls % self.LOOKED_AT:  # else a scale that was set may be unset again
            return chosen
        if group.complete(gradients):
            self.chosen.pop(group, None)
            return None
        if self.partly is None or calls <= self.FIRST_CALLS:
            return self.first
        form = self._some_unset(group, gradients, self.partly)
        self.chosen[group] = group.arena.version, form
        return form

    def _some_unset(self, group: Group, gradients: bool, partly: Callable[[Unset], Variant]) -> Variant:
        unset = Unset(*(frozenset(places) for places in group.unset(gradients)))
        if unset not in self.forms:
            self.forms[unset] = partly(unset)
        return self.forms[unset]


class _Found(NamedTuple):
    """The group of some weights, None if they have no state; version: that of `STATE` when it was looked up."""

    version: int
    group: Group | None
    holders: list[Holders]


class CompiledGraph:
    """The callable that Dynamo gets: takes the graph's inputs, adds the state's, and takes the recorded amaxes off the outputs.

    `calibration` has the forms for calls that meet a scale that was never set; None if `steady` handles those too. `check` gets the
    inputs of each call before it runs (the option `verify`).
    """

    def __init__(
        self,
        steady: Variant,
        calibration: Calibration | None,
        attached: Attached,
        device: torch.device,
        options: Options,
        *,
        trains: bool,
        check: Callable[[Sequence[Any]], None] | None = None,
    ) -> None:
        self.check = check
        self.steady, self.calibration, self.attached = steady, calibration, attached
        self.device, self.options, self.trains = device, options, trains
        self.weight_positions = tuple(dict.fromkeys(k.argument for k in attached.keys))
        self.groups: dict[tuple[int, ...], _Found] = {}
        self.weights = WeightCache()

    def __call__(self, *args: Any) -> Any:
        if self.check is not None:
            self.check(args)
        if forward_ad._current_level >= 0:
            _refuse_tangents(args)
        group = self._group(args) if self.attached.keys else None
        recording = self.trains and group is not None and torch.is_grad_enabled() and not group.fake and group.training()
        if group is None or not group.fake:
            STATE.visit(group if recording else None)
        variant = self._variant(group)
        if group is not None and not group.fake:
            STATE.note_checkpoint(group, (args[i] for i in self.weight_positions))
        state = self._state_inputs(group, args, recording)
        weights = self.weights.inputs(variant.lowered.weights, args)
        outputs = variant.run(*args, *state, *weights)
        if not variant.lowered.records:
            return outputs
        *outputs, amax = outputs
        if recording:
            group.record(FORWARD, amax)  # type: ignore[union-attr]
            STATE.watch_backward(outputs, group)  # type: ignore[arg-type]
        return outputs

    def _group(self, args: Sequence[Any]) -> Group | None:
        weights = [args[i] for i in self.weight_positions]
        if any(map(is_fake, weights)):
            return FakeGroup(weights[0], self.attached.forward, self.attached.gradient)
        key = tuple(map(id, weights))
        found = self.groups.get(key)
        # Without slots of its own yet (inference), what is found depends on what other graphs have made since.
        if found is None or not (self.trains or found.version == STATE.version) or not all(map(Holders.has, found.holders, key)):
            holders = STATE.homes.all_holders(weights)
            for weight in weights:
                STATE.watch(weight, self.groups, key)
            attached, process_group = self.attached, ranks(self.options.amax_group)
            group = STATE.group(attached.keys, attached.unions, args, self.device, create=self.trains, process_group=process_group)
            found = self.groups[key] = _Found(STATE.version, group, holders)
        return found.group

    def _variant(self, group: Group | None) -> Variant:
        if self.calibration is None or (group is not None and group.fake):
            return self.steady
        return self.calibration.of(group, self.trains) or self.steady

    def _state_inputs(self, group: Group | None, args: Sequence[Any], recording: bool) -> list[Tensor]:
        if not self.attached.keys:
            return []
        if group is None:
            return [torch.zeros(self.attached.forward, dtype=torch.float32, device=self.device)]
        alone = self.trains and not (recording or group.fake or group.complete(gradients=True))
        inputs = [group.scales(FORWARD, snapshot=self.trains, alone=alone)]
        if self.trains and self.attached.gradient:
            inputs += [group.scales(GRADIENT, snapshot=True, alone=alone), group.sink]
        return inputs


def _refuse_tangents(args: Sequence[Any]) -> None:
    """Raises where an input carries a forward-mode derivative, which a compiled graph would drop."""
    if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise RuntimeError(
            "te_fp8: a compiled graph has no forward-mode derivatives (torch.autograd.forward_ad). Remedy: call the model that was "
            "not compiled, or compile a function that calls torch.func.jvp."
        )
