"""`te_dynamo.explain`: what te_fp8 does with a model, told by compiling and running it once."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._dynamo.utils import counters
from torch.fx import GraphModule, Node
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from te_dynamo.backend import observing, te_fp8
from te_dynamo.config import Options
from te_dynamo.passes.effects import storage, writes
from te_dynamo.passes.weights import is_owned, source_of
from te_dynamo.report.flops import Gemm, GemmObserver, gemms_of
from te_dynamo.report.isolation import Memory, detached, discard_code, untouched
from te_dynamo.report.report import Report
from te_dynamo.report.sites import WRAPPERS, Site, Sites, clean_path

LOGITS = "the logits"  # how the reason begins for which logits are left
UNRECOGNISED = "a product with a parameter, in a form that no rule recognises"
OUTSIDE = "ran outside of every compiled graph"
# Recompile limits of a compile of one's own, where torch has them (2.13); ours are discarded afterwards in any case.
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


def explain(
    model: nn.Module, /, *args: Any, options: Mapping[str, Any] | Options | None = None, backward: bool = False, **kwargs: Any
) -> Report:
    """Compiles `model` with te_fp8, runs `model(*args, **kwargs)` once, and tells what was taken, and what was not and why.

    What is compiled is the whole model; or, where the user has compiled it or modules in it (`module.compile()`,
    `torch.compile(module)`), what he has compiled, with these `options` instead of his.

    options: as `torch.compile(model, backend="te_fp8", options=...)` takes them. backward: also run backward, from the
    output's `loss` where there is one, else from the sum of all outputs that require grad.

    Everything is afterwards as it was: parameters, gradients, buffers and attributes of the model, tensors among the
    arguments, scale state, random states, and what the user has compiled. Other objects that the model writes to (a KV
    cache among the arguments, a list) keep what was written.

    Raises ValueError for options that are not allowed, or where backward has nothing to start from; what the model
    itself raises goes on to the caller.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"te_dynamo.explain takes an nn.Module, not {type(model).__name__}")
    while isinstance(model, (OptimizedModule, DistributedDataParallel)):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    chosen = Options.from_user(options)
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    with untouched(model, inputs) as memory:
        names = Names(model)
        recorder = Recorder(chosen, names, GemmObserver(names.weights(model), memory), memory)
        try:
            run, notes = _compiled(model, recorder)
            with torch.enable_grad() if backward else nullcontext():
                with recorder.observer:
                    outputs = run(*detached(args), **detached(kwargs))
                if backward:
                    _scalar(outputs).backward()
            return _report(recorder, backward, notes)
        finally:
            discard_code(recorder.backend)


def _compiled(model: nn.Module, recorder: Recorder) -> tuple[Callable[..., Any], list[str]]:
    """What to call, and notes on what Dynamo will do with it. The model's own attributes may be changed here."""

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend=recorder.backend, **ISOLATED)  # type: ignore[call-overload]

    notes = []
    inside = [m for m in model.modules() if isinstance(m, OptimizedModule) or m._compiled_call_impl is not None]
    for module in inside:
        if isinstance(module, OptimizedModule):
            vars(module)["forward"] = compiled(module._orig_mod).forward
            continue
        vars(module)["_compiled_call_impl"] = compiled(module._call_impl)
        if type(module).forward.__module__.startswith("torch.nn."):
            notes.append(
                f"{type(module).__name__}.compile() compiles nothing of its own: Dynamo skips the frames of torch.nn's modules. "
                'Remedy: torch.compile(module, backend="te_fp8").'
            )
    return (model if inside else compiled(model)), list(dict.fromkeys(notes))


def _scalar(outputs: Any) -> Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss.sum()
    differentiable = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad]
    if not differentiable:
        raise ValueError("te_dynamo.explain(backward=True): no output of the model requires grad")
    return torch.stack([t.sum(dtype=torch.float32) for t in differentiable]).sum()


class Names:
    """What `model` calls its modules and parameters."""

    def __init__(self, model: nn.Module) -> None:
        modules = (name for name, _ in model.named_modules(remove_duplicate=False))
        self.of: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.of.setdefault(id(parameter), []).append(name)
        known = [*modules, *(name for names in self.of.values() for name in names)]
        self.known = {clean_path(name): _without_wrappers(name) for name in known}

    def weights(self, model: nn.Module) -> Iterator[tuple[Tensor, str]]:
        """Each parameter, with the path of the site that multiplies by it."""
        for parameter in model.parameters():
            name = self.of[id(parameter)][0]
            module, _, attribute = name.rpartition(".")
            yield parameter, _without_wrappers(module if attribute == "weight" else name)

    def prefix(self, tensor: Tensor, relative: str) -> str | None:
        """The name of the module inside which `tensor` is called `relative`."""
        for name in map(clean_path, self.of.get(id(tensor), ())):
            if name == relative or name.endswith("." + relative):
                return name[: -len(relative)].removesuffix(".")
        return None

    def absolute(self, prefix: str, path: str) -> str | None:
        """The name of what is called `path` inside the module `prefix`; None where the model has no such name."""
        return self.known.get(f"{prefix}.{path}".strip("."))


def _without_wrappers(name: str) -> str:
    """A name as `named_modules` has it, without the wrappers that torch puts around modules."""
    return ".".join(part for part in name.split(".") if part == "module" or part not in WRAPPERS)


@dataclass
class Graph:
    """A compiled graph, and how often it ran: `calls` counts by the modules inside which its weights' names begin."""

    sites: list[Site]
    gemms: list[Gemm]
    calls: Counter[tuple[str, ...]] = field(default_factory=Counter)


class Recorder:
    """The backend te_fp8, with notes of what it compiles and of what runs."""

    def __init__(self, options: Options, names: Names, observer: GemmObserver, memory: Memory) -> None:
        self.options, self.names, self.observer, self.memory = options, names, observer, memory
        self.graphs: list[Graph] = []

    def backend(self, gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        planned: list[tuple[GraphModule, Sites]] = []
        with self.observer.rest(), observing(lambda graph, sites, _: planned.append((graph, sites))):
            compiled = te_fp8(gm, example_inputs, options=self.options)
        ((graph_module, sites),) = planned
        with self.observer.rest():
            graph = Graph(list(sites), list(gemms_of(graph_module, torch.is_grad_enabled())))
        self.graphs.append(graph)
        parameters = [(i, clean_path(source_of(p))) for i, p in enumerate(_placeholders(gm)) if is_owned(p)]
        written = _written(gm)

        def run(*args: Any) -> Any:
            prefixes = Counter(self.names.prefix(args[i], name) for i, name in parameters)
            graph.calls[tuple(prefix for prefix, _ in prefixes.most_common() if prefix is not None)] += 1
            for i in written:
                self.memory.about_to_write(args[i])
            with self.observer.rest():
                return compiled(*args)

        return run

    def sites(self) -> Iterator[Site]:
        """The sites of every module that ran, those of a graph that ran several times in one module once."""
        for graph in self.graphs:
            flops: Counter[str] = Counter()
            for gemm in graph.gemms:
                flops[gemm.node] += gemm.forward
            sites = [site if site.flops else replace(site, flops=flops[site.node]) for site in [*graph.sites, *_unrecognised(graph)]]
            for prefixes, count in graph.calls.items():
                for site in sites:
                    yield replace(site, path=self._absolute(prefixes, site.path), flops=site.flops * count)
        outside: Counter[str] = Counter()
        for seen in self.observer.seen:
            if seen.weight:
                outside[seen.path] += seen.forward
        for path, forward in outside.items():
            yield Site("linear", path, "", reason=OUTSIDE, flops=forward)

    def _absolute(self, prefixes: Sequence[str], path: str) -> str:
        found = (self.names.absolute(prefix, path) for prefix in prefixes)
        return next((name for name in found if name is not None), path)

    def flops(self, backward: bool) -> tuple[int, int]:
        """(in FP8, all) of what counts, over all that ran."""
        fp8 = total = 0
        for graph in self.graphs:
            count = graph.calls.total()
            logits = {site.node for site in graph.sites if (site.reason or "").startswith(LOGITS)}
            for gemm in graph.gemms:
                if gemm.node not in logits and (gemm.weight or self.options.attention == "fp8"):
                    flops = count * (gemm.forward + gemm.backward * backward)
                    fp8, total = fp8 + flops * gemm.fp8, total + flops
        for seen in self.observer.seen:
            if seen.weight or self.options.attention == "fp8":
                total += seen.forward + seen.backward * backward
        return fp8, total


def _placeholders(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _written(gm: GraphModule) -> list[int]:
    """The positions of the inputs that a graph writes to."""
    memory = {storage(target) for node in gm.graph.nodes for target in writes(node)} - {None}
    return [i for i, placeholder in enumerate(_placeholders(gm)) if storage(placeholder) in memory]


def _unrecognised(graph: Graph) -> Iterator[Site]:
    """Sites for the weight GEMMs that no rule saw, or where the graph was left without a look."""
    whole = next((site.reason for site in graph.sites if site.kind == "graph"), None)
    seen = {site.node for site in graph.sites}
    for gemm in graph.gemms:
        if gemm.weight and not gemm.fp8 and gemm.node not in seen:
            yield Site("linear", gemm.path, gemm.node, reason=whole or UNRECOGNISED, flops=gemm.forward)


def _report(recorder: Recorder, backward: bool, notes: Sequence[str]) -> Report:
    fp8, total = recorder.flops(backward)
    if not recorder.graphs and not notes:
        notes = [
            "Dynamo gave te_fp8 no graph: nothing was compiled. It skips what is disabled, what breaks inside a loop, and the frames of "
            "torch.nn's own modules; TORCH_LOGS=graph_breaks,dynamo tells more."
        ]
    return Report(
        graph_count=len(recorder.graphs),
        graph_break_count=sum(counters["graph_break"].values()),
        sites=tuple(recorder.sites()),
        fp8_flops=fp8,
        counted_flops=total,
        backward=backward,
        graph_breaks=dict(counters["graph_break"]),
        notes=tuple(notes),
    )
