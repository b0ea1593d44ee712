"""`te_dynamo.explain`: compiles and runs a model once, and reports what te_fp8 does with it."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from te_dynamo.backend import observing, te_fp8
from te_dynamo.config import Options
from te_dynamo.passes.effects import storage, writes
from te_dynamo.passes.weights import is_owned, path_of
from te_dynamo.report.flops import GemmObserver, Visit, visits_of
from te_dynamo.report.isolation import Memory, detached, discard_code, graph_breaks, untouched
from te_dynamo.report.report import LOGITS, Report
from te_dynamo.sites import WRAPPED, Site, Sites, clean_path

UNRECOGNIZED = "no rule takes this product with a parameter"
OUTSIDE = "ran outside of every compiled graph"
# If torch has it (2.13), our compiled code never counts toward the user's recompile limits.
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


def explain(
    model: nn.Module, /, *args: Any, options: Mapping[str, Any] | Options | None = None, backward: bool = False, **kwargs: Any
) -> Report:
    """Compiles `model` with te_fp8, runs `model(*args, **kwargs)` once, and reports what was taken, and why the rest was not.

    The whole model is compiled or, if it contains compiled modules (`module.compile()`, `torch.compile(module)`), only those
    modules, with these `options` instead of their own.

    options: as `torch.compile(model, backend="te_fp8", options=...)` takes them. backward: also run backward, from the
    output's `loss` if there is one, else from the sum of all outputs that require grad.

    Afterwards everything is as before: the model's parameters, gradients, buffers and attributes, tensors among the arguments,
    scale state, random states, and the user's compiled code. Other objects that the model writes to (a KV cache among the
    arguments, a list) keep what was written.

    Raises TypeError if `model` is not a module, ValueError for invalid options or if no output requires grad, and
    whatever the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"te_dynamo.explain takes an nn.Module, not {type(model).__name__}")
    while isinstance(model, (OptimizedModule, DistributedDataParallel)):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    chosen = Options.from_user(options)
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    with untouched(model, inputs) as memory:
        names = Names(model)
        recorder = Recorder(chosen, names, GemmObserver(names.of_parameters(), memory), memory)
        try:
            run = _compiled(model, recorder)
            with torch.enable_grad() if backward else nullcontext():
                with recorder.observer:
                    outputs = run(*detached(args), **detached(kwargs))
                if backward:
                    _scalar(outputs).backward()
            return _report(recorder, backward, list(dict.fromkeys([*_skipped(model, recorder), *_loop(model)])))
        finally:
            discard_code(recorder.backend)


def _compiled(model: nn.Module, recorder: Recorder) -> Callable[..., Any]:
    """What to call instead of `model`; may change attributes of its modules."""
    # One context for all modules: with one each, `isolate_recompiles` would keep modules of the same class from sharing graphs.
    compiled = torch._dynamo.optimize(recorder.backend, **ISOLATED)
    inside = [m for m in model.modules() if isinstance(m, OptimizedModule) or m._compiled_call_impl is not None]
    for module in inside:
        if isinstance(module, OptimizedModule):
            vars(module)["forward"] = compiled(module._orig_mod).forward
        else:
            vars(module)["_compiled_call_impl"] = compiled(module._call_impl)
    return model if inside else compiled(model)


def _skipped(model: nn.Module, recorder: Recorder) -> Iterator[str]:
    """Notes on modules of torch.nn whose `.compile()` had no effect (before torch 2.14)."""
    outside = {seen.path for seen in recorder.observer.seen}
    for name, module in model.named_modules():
        own = str(type(module).forward.__module__).startswith("torch.nn.") and module._compiled_call_impl is not None
        if own and (not recorder.graphs or any(path == name or path.startswith(f"{name}.") for path in outside)):
            yield (
                f"{type(module).__name__}.compile() compiled nothing: Dynamo skips the frames of torch.nn's own modules. "
                'Remedy: torch.compile(module, backend="te_fp8").'
            )


def _scalar(outputs: Any) -> Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss.sum()
    differentiable = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad]
    if not differentiable:
        raise ValueError("te_dynamo.explain(backward=True): no output of the model requires grad, so there is nothing to run backward")
    return torch.stack([t.sum(dtype=torch.float32) for t in differentiable]).sum()


class Names:
    """The names of a model's modules and parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights: dict[int, list[str]] = {}  # by the id of a parameter: the paths of the sites that multiply by it
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.append(name)
            self.weights.setdefault(id(parameter), []).append(clean_path(name).removesuffix("weight").removesuffix("."))
        # By the path without wrappers: the name as in `named_modules`, but without the wrappers that torch puts around modules.
        self.known = {clean_path(n): ".".join(p for p in n.split(".") if p == "module" or p not in WRAPPED) for n in names}

    def of_parameters(self) -> Iterator[tuple[Tensor, str]]:
        for parameter in self.model.parameters():
            path = self.weights[id(parameter)][0]
            yield parameter, self.known.get(path, path)


class Renaming:
    """Maps the paths in a graph to those in the model, learned from parameters whose path in both is known.

    A graph's paths begin at the compiled module, and may be those of another instance, for which it was first compiled.
    """

    def __init__(self, names: Names, pairs: Iterator[tuple[str, int]]) -> None:
        self.known = names.known
        found = Counter(moved for path, parameter in pairs if (moved := self._moved(path, names.weights.get(parameter, []))))
        self.prefixes = [moved for moved, _ in found.most_common()]

    @staticmethod
    def _moved(path: str, candidates: Sequence[str]) -> tuple[str, str] | None:
        """(the prefix of `path`, the model's prefix instead), from the candidate with the longest common suffix."""
        best: tuple[int, str, str] | None = None
        parts = _parts(path)
        for other in map(_parts, candidates):
            same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(reversed(parts), reversed(other), strict=False))))
            if (same or not parts) and (best is None or same > best[0]):
                best = same, ".".join(parts[: len(parts) - same]), ".".join(other[: len(other) - same])
        return best and best[1:]

    def __call__(self, path: str) -> str | None:
        for old, new in self.prefixes:
            if not old or path == old or path.startswith(f"{old}."):
                name = f"{new}.{path[len(old) :].removeprefix('.')}".strip(".")
                if name in self.known:
                    return self.known[name]
        return None


def _parts(path: str) -> list[str]:
    return path.split(".") if path else []


@dataclass
class Graph:
    """A compiled graph. weights: the positions and paths of its parameters; calls: how often it ran, by its parameters' ids."""

    visits: list[Visit]
    sites: list[Site]
    weights: list[tuple[int, str]]
    calls: Counter[tuple[int, ...]] = field(default_factory=Counter)

    def ran(self, args: Sequence[Any]) -> None:
        self.calls[tuple(id(args[i]) for i, _ in self.weights)] += 1

    def sites_of(self, unit: GraphModule) -> list[Site]:
        """The sites in a sub-graph, or in the graph itself; a site in several sub-graphs belongs to the first."""
        claimed: set[int] = set()
        for visit in {id(v.unit): v for v in self.visits}.values():
            here: dict[tuple[str, str], Site] = {}
            for site in self.sites:
                if id(site) not in claimed and (visit.places.get(site.node) == site.path or visit is self.visits[-1]):
                    here.setdefault((site.kind, site.node), site)
            if visit.unit is unit:
                return list(here.values())
            claimed |= {id(site) for site in here.values()}
        return []


class Recorder:
    """The backend te_fp8, but it also records what it compiles and what runs."""

    def __init__(self, options: Options, names: Names, observer: GemmObserver, memory: Memory) -> None:
        self.options, self.names, self.observer, self.memory = options, names, observer, memory
        self.graphs: list[Graph] = []

    def backend(self, gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        planned: list[tuple[GraphModule, Sites]] = []
        with self.observer.rest():
            with observing(lambda graph, sites, _: planned.append((graph, sites))):
                compiled = te_fp8(gm, example_inputs, options=self.options)
            ((planned_graph, sites),) = planned
            visits = visits_of(planned_graph, torch.is_grad_enabled())
        placeholders = gm.graph.find_nodes(op="placeholder")
        graph = Graph(visits, list(sites), [(i, path_of(p)) for i, p in enumerate(placeholders) if is_owned(p)])
        self.graphs.append(graph)
        memory = {storage(target) for node in gm.graph.nodes for target in writes(node)} - {None}
        written = [i for i, p in enumerate(placeholders) if storage(p) in memory]

        def run(*args: Any) -> Any:
            graph.ran(args)
            for i in written:
                self.memory.about_to_write(args[i])
            with self.observer.rest():
                return compiled(*args)

        return run

    def sites(self) -> list[Site]:
        """The sites of every module that ran, each once, with the FLOPs of all its calls."""
        found: dict[tuple[Any, ...], Site] = {}
        for number, graph in enumerate(self.graphs):
            for parameters, count in graph.calls.items():
                for visit in graph.visits:
                    for site in self._sites(graph, visit, parameters):
                        key = (number, id(visit.unit), site.kind, site.path, site.node)
                        before = found.setdefault(key, replace(site, flops=0))
                        before.flops += site.flops * count
        for seen in self.observer.seen:
            if seen.weight:
                before = found.setdefault((seen.path,), Site("linear", seen.path, "", reason=OUTSIDE))
                before.flops += seen.forward
        return list(found.values())

    def _sites(self, graph: Graph, visit: Visit, parameters: Sequence[int]) -> Iterator[Site]:
        by_position = {i: parameter for (i, _), parameter in zip(graph.weights, parameters, strict=True)}
        inside = ((g.path, by_position[g.argument]) for g in visit.gemms if g.path and g.fp8 and g.argument in by_position)
        renamings = [Renaming(self.names, inside)] if visit is not graph.visits[-1] else []
        renamings.append(Renaming(self.names, ((path, by_position[i]) for i, path in graph.weights)))
        flops: Counter[tuple[str, bool]] = Counter()
        for gemm in visit.gemms:
            flops[gemm.node, gemm.weight] += gemm.forward
        sites = graph.sites_of(visit.unit)
        for site in [*sites, *untold(visit, sites)]:
            path = next((name for rename in renamings if (name := rename(site.path)) is not None), site.path)
            yield replace(site, path=path, flops=flops[site.node, site.kind != "attention"])

    def flops(self, backward: bool) -> tuple[int, int]:
        """The FLOPs that count, over all calls: (in FP8, in total)."""
        attention = self.options.attention in ("fp8", "fp8_both")
        fp8 = total = 0
        for graph in self.graphs:
            calls = graph.calls.total()
            for visit in graph.visits:
                logits = {site.node for site in graph.sites_of(visit.unit) if (site.reason or "").startswith(LOGITS)}
                for gemm in visit.gemms:
                    if gemm.node not in logits and (gemm.weight or attention):
                        in_backward = gemm.backward * backward
                        fp8 += calls * (gemm.forward * gemm.fp8 + in_backward * gemm.fp8_backward)
                        total += calls * (gemm.forward + in_backward)
        for seen in self.observer.seen:
            if seen.weight or attention:
                total += seen.forward + seen.backward * backward
        return fp8, total

    def uncounted(self) -> list[str]:
        """The operations with a parameter that ran but whose FLOPs are not known."""
        return sorted({name for graph in self.graphs if graph.calls for visit in graph.visits for name in visit.uncounted})


def untold(visit: Visit, sites: Sequence[Site]) -> Iterator[Site]:
    """Sites for the weight GEMMs that no rule reported, or whose whole graph was left to Inductor."""
    told = {site.node for site in sites if site.kind != "attention"}
    whole = next((site.reason for site in sites if site.kind == "graph"), None)
    for name, path in {gemm.node: gemm.path for gemm in visit.gemms if gemm.weight and gemm.node not in told}.items():
        operation = re.sub(r"_\d+$", "", name)
        inside = f"it is in a sub-graph of {visit.within}, which is left to Inductor. Remedy: move it out" if visit.within else None
        yield Site("linear", path, name, reason=whole or inside or f"{UNRECOGNIZED} ({operation})")


LEAK = (
    "{} scaling has one scale for all tokens of a call: what a token gives depends, within FP8's rounding, on the tokens after it and on "
    "the rest of the batch. Where it must not: recipe='delayed', once its scales are trained, or 'rowwise'"
)


def _loop(model: nn.Module) -> list[str]:
    """A note if experts of transformers are called one after the other, else []."""
    kinds = [m for m in model.modules() if getattr(m, "_can_set_experts_implementation", bool)()]
    if not any(getattr(m.config, "_experts_implementation", None) == "eager" for m in kinds):
        return []
    return [
        "the experts are called in a Python loop over those that tokens chose, which breaks the graph at each step. "
        "Remedy: model.set_experts_implementation('grouped_mm')"
    ]


def _report(recorder: Recorder, backward: bool, notes: Sequence[str]) -> Report:
    fp8, total = recorder.flops(backward)
    if not recorder.graphs and not notes:
        notes = [
            "Dynamo gave te_fp8 no graph, so nothing was compiled: it skips what is disabled, and what breaks inside a loop. "
            "TORCH_LOGS=graph_breaks,dynamo shows which of the two."
        ]
    if uncounted := recorder.uncounted():
        notes = [*notes, f"not among the FLOPs, as they cannot be counted by themselves: {', '.join(uncounted)}"]
    breaks, sites = graph_breaks(), tuple(recorder.sites())
    mixing = sorted({str(site.recipe) for site in sites if "scale" in site.detail})
    if mixing and any(site.kind == "attention" for site in sites):
        notes = [*notes, LEAK.format(" and ".join(mixing))]
    return Report(len(recorder.graphs), breaks.total(), sites, fp8, total, backward, dict(breaks), tuple(notes))
