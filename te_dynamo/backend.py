"""`torch.compile(model, backend="te_fp8")`: Dynamo's graph in, a compiled callable out.

    1 canonicalize   one spelling for each operation
    2 raise          torch IR -> semantic ops: linear, norm, attention
    3 fuse           one quantization for what shares an input, Q/K/V into one GEMM, who makes each operand
    4 plan           per site: recipe, provider, attention layout
    5 state          scale state becomes graph inputs
    6 lower          semantic ops -> calls of a provider's implementations
    7 Inductor       compiles all of it, in one graph

Dynamo's own graph is never touched, and what no stage takes stays as it was.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.backends.registry import _COMPILER_FNS
from torch.fx import GraphModule

from te_dynamo import runtime
from te_dynamo.config import Options
from te_dynamo.ir.graph import EXAMPLE, copy_graph_module, fake
from te_dynamo.ir.meta import PLAN, SLOTS
from te_dynamo.lowering.registry import choose
from te_dynamo.passes.attach import attach
from te_dynamo.passes.canonicalize import canonicalize
from te_dynamo.passes.effects import draws
from te_dynamo.passes.fuse import fuse
from te_dynamo.passes.higher_order import mark_parameters, rewritable_units
from te_dynamo.passes.lower import ANY_UNSET, NONE_UNSET, Unset, lower
from te_dynamo.passes.masks import simplify_masks
from te_dynamo.passes.plan import Planner
from te_dynamo.passes.raising import FAMILIES
from te_dynamo.passes.rules import apply
from te_dynamo.passes.select import against_wishes, masks_uniform_rows, select, unmatched_absolute_patterns
from te_dynamo.passes.undo import Rewrites
from te_dynamo.passes.weights import is_owned
from te_dynamo.report.stages import Stages
from te_dynamo.runtime import Calibration, CompiledGraph, Compiler, Variant, beside, eagerly
from te_dynamo.sites import Sites
from te_dynamo.state.reduce import ranks

Callback = Callable[[GraphModule, Sites, Options], None]
observers: list[Callback] = []  # called for each compiled graph with (the graph as planned, or as it was left, its sites, the options)


def te_fp8(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | Options | None = None, **_: Any
) -> Callable[..., Any]:
    """The backend. `mode` and `options` are what the user gave `torch.compile`; keywords that a newer torch adds are accepted.

    Raises ValueError for an option that is unknown or not allowed, RuntimeError for a provider that was asked for by name
    and is not available, or where nothing could be taken and `strict` is set.
    """
    # Registered even if it is passed as a function: only for registered backends does torch drop its weak references to weights, which can
    # then be swapped.
    _COMPILER_FNS.setdefault("te_fp8", te_fp8)
    chosen = Options.from_user(options, mode)
    sites = Sites(strict=chosen.strict)
    grad_enabled = torch.is_grad_enabled() and _wants_gradients(gm)
    device = _device(gm)
    provider, reason = choose(chosen.provider, device)
    if provider is None:
        sites.whole_graph_left(reason or "")
        return _left_to_inductor(gm, example_inputs, sites, chosen)
    stages = Stages(chosen, example_inputs)

    fused = _raise_and_fuse(gm, sites, chosen, provider, device, grad_enabled, stages)
    if not sites.taken():
        return _left_to_inductor(gm, example_inputs, sites, chosen)
    attached = attach(fused, trains=grad_enabled)
    stages.done("state", fused)

    calibrates = _needs_calibration(fused)
    read_again = calibrates or bool(observers)

    def variant(stage: str, unset: Unset, compiler: Compiler, given: Sequence[Any] = example_inputs) -> Variant:
        """A form of the graph. given: examples of its first inputs; those of the others are Dynamo's, symbolic only where its graph is."""
        graph = copy_graph_module(fused) if read_again else fused
        lowered = lower(graph, unset=unset, keep_weights=chosen.keep_weights, compiled=compiler is not eagerly)
        stages.done(stage, graph)
        inputs = [*given, *_added_inputs(graph, len(given))]
        return Variant(compiler(graph, inputs, chosen), lowered)

    steady = variant("lower", NONE_UNSET, runtime.compile_inductor)
    calibration = None
    if calibrates:
        stays = not grad_enabled or not any(is_owned(n) and fake(n).requires_grad for n in fused.graph.nodes)  # nothing sets scales
        symbolic = any(isinstance(i, torch.SymInt) for i in example_inputs)
        random = any(draws(unit.graph) for unit in rewritable_units(fused))
        with beside():
            first = variant("lower_calibrating", ANY_UNSET, runtime.compile_inductor if stays or (symbolic and random) else eagerly)

        @functools.cache
        def installed() -> set[Any]:  # first asked for in a call, when Dynamo has made its guards
            return _guards_on_sizes(example_inputs)

        def partly(unset: Unset) -> Variant:
            before = installed()
            made = variant("lower_partly_calibrating", unset, runtime.compile_inductor, () if symbolic else example_inputs)
            return made if _guards_on_sizes(example_inputs) <= before else first  # too late for more guards

        calibration = Calibration(first, None if stays else partly, random=random)
    _warn_about_patterns(chosen, sites)
    _warn_about_attention(chosen, sites)
    for observer in observers:
        observer(fused, sites, chosen)
    return CompiledGraph(steady, calibration, attached, device, chosen, trains=grad_enabled, check=stages.verifier)


def planned(gm: GraphModule, options: Options, device: torch.device, *, grad_enabled: bool = True) -> Sites:
    """What stages 1 to 4 decide for a graph, as if its tensors were on `device`. Nothing is lowered or compiled; raises like `te_fp8`."""
    sites = Sites(strict=options.strict)
    provider, reason = choose(options.provider, device)
    if provider is None:
        sites.whole_graph_left(reason or "")
    else:
        _raise_and_fuse(gm, sites, options, provider, device, grad_enabled, Stages(options, ()))
    return sites


def _raise_and_fuse(
    gm: GraphModule, sites: Sites, options: Options, provider: str, device: torch.device, grad_enabled: bool, stages: Stages
) -> GraphModule:
    """Stages 1 to 4, on a copy of Dynamo's graph. What is raised and turns out not to be taken is put back as it was."""
    graph = copy_graph_module(gm)
    mark_parameters(graph)
    stages.start(graph)
    units = rewritable_units(graph)
    for unit in units:
        canonicalize(unit)
    stages.done("canonicalize", graph)

    group = ranks(options.amax_group)
    planner = Planner(options, provider, device, sites, "" if group is None else group.group_name)
    for unit in units:
        rewrites = Rewrites()
        for rules in FAMILIES:
            apply(rules, unit, sites, rewrites)
        while excluded := select(unit, options, planner.unsupported, grad_enabled):
            rewrites.restore(unit.graph, excluded, sites)
        simplify_masks(unit, sites)
        rewrites.restore(unit.graph, masks_uniform_rows(unit, options), sites)
        unit.graph.lint()
        unit.recompile()
    stages.done("raise", graph)
    for unit in units:
        fuse(unit, grad_enabled=grad_enabled, short_sequence=options.short_sequence, skip_padding=options.padding == "skip")
    stages.done("fuse", graph)
    for unit in units:
        planner.plan(unit, grad_enabled=grad_enabled)
    stages.done("plan", graph)
    return graph


def _needs_calibration(gm: GraphModule) -> bool:
    """Whether some site cannot detect by itself that a scale was never set, so that a separate graph calibrates. Opaque sites can."""
    nodes = (node for unit in rewritable_units(gm) for node in unit.graph.nodes)
    return any(SLOTS in node.meta and node.meta[PLAN].needs_calibration for node in nodes)


def _wants_gradients(gm: GraphModule) -> bool:
    values = (n.meta.get(EXAMPLE) for n in gm.graph.nodes if n.op == "placeholder")
    return any(isinstance(v, torch.Tensor) and v.requires_grad for v in values)


def _device(gm: GraphModule) -> torch.device:
    """Where the graph's parameters are: the most common device of its floating-point inputs."""
    values = [n.meta.get(EXAMPLE) for n in gm.graph.nodes if n.op == "placeholder"]
    devices = Counter(v.device for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())
    return devices.most_common(1)[0][0] if devices else torch.device("cpu")


def _guards_on_sizes(inputs: Sequence[Any]) -> set[Any]:
    return {guard.expr for i in inputs if isinstance(i, torch.SymInt) for guard in i.node.shape_env.guards}


def _added_inputs(graph: GraphModule, given: int) -> list[Any]:
    return [n.meta[EXAMPLE] for n in graph.graph.nodes if n.op == "placeholder"][given:]


def _left_to_inductor(gm: GraphModule, example_inputs: Sequence[Any], sites: Sites, options: Options) -> Callable[..., Any]:
    """Nothing was taken: the graph is Inductor's, exactly as Dynamo gave it. FP8 asked for is never silently bf16."""
    if any(against_wishes(site.reason) for site in sites) and not options.leaves_everything():
        _warn(options, f"te_fp8: nothing in this graph could be computed in FP8. {sites.commonest_reasons()}")
    for observer in observers:
        observer(gm, sites, options)
    return runtime.compile_inductor(gm, list(example_inputs), options)


def _warn_about_attention(options: Options, sites: Sites) -> None:
    """FP8 that was asked for by name is never silently 16 bits."""
    attentions = [site for site in sites.taken() if site.kind == "attention"]
    left = Counter(reason for site in attentions if (reason := site.detail.get("fp8")))
    if left and options.attention in ("fp8", "fp8_both"):
        counts = f"{left.total()} of {len(attentions)} in this graph"
        _warn(options, f"te_fp8: attention={options.attention!r}, but high precision for {counts}: {left.most_common(1)[0][0]}.")


def _warn(options: Options, message: str) -> None:
    if options.strict:
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=3)


def _warn_about_patterns(options: Options, sites: Sites) -> None:
    for pattern, path in unmatched_absolute_patterns(options.patterns(), [s.path for s in sites]):
        warnings.warn(
            f"te_fp8: the pattern {pattern!r} matches no site of a graph whose paths look like {path!r}: they are relative to the "
            "module that was compiled, and one graph may serve several modules. Remedy: compile those layers with their own options.",
            stacklevel=2,
        )


@contextlib.contextmanager
def observing(callback: Callback) -> Iterator[None]:
    """While open, `callback` is called for each graph that te_fp8 compiles."""
    observers.append(callback)
    try:
        yield
    finally:
        observers.remove(callback)
