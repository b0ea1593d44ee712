"""Compiles one step of a model, runs it on fake tensors, and records what it would launch."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from te_dynamo.backend import observing, te_fp8
from te_dynamo.lab.launches import BACKWARD, Launch, Recorder, tensors_in
from te_dynamo.lab.roofline import microseconds
from te_dynamo.lowering.devices import GPU
from te_dynamo.report.explain import untold
from te_dynamo.report.flops import visits_of
from te_dynamo.sites import Site, Sites
from te_dynamo.weight_cache import WeightCache


@dataclass(frozen=True)
class SiteCost:
    """A site, and the FLOPs of its GEMMs in the step: forward and, in training, backward."""

    site: Site
    flops: int


@dataclass(frozen=True)
class Step:
    """launches: in order, timed; saved: bytes held for backward, besides parameters and inputs; sites, warnings: te_fp8's;
    kernels: Inductor's Triton kernels by name; seconds: the time to compile and run."""

    launches: list[Launch]
    saved: int
    sites: list[SiteCost]
    warnings: list[str]
    seconds: float
    kernels: dict[str, Any] = field(repr=False, default_factory=dict)


def measure(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    gpu: GPU,
    *,
    backend: str,
    options: Mapping[str, Any] | None = None,
    training: bool = True,
) -> Step:
    """A step of `module(*args, **kwargs)`, with fake tensors on the GPU that the process pretends to have (see `pretend`), in an
    open FakeTensorMode. training: forward and backward, else forward only, without gradients.

    backend: "inductor", "te_fp8", with its options, or "eager". Raises ValueError if training has nothing to differentiate.
    """
    torch._dynamo.reset()
    sites: list[SiteCost] = []
    began = time.perf_counter()
    parameters, inputs = list(module.parameters()), tensors_in((args, kwargs))
    leaves = [t for t in [*inputs, *parameters] if t.requires_grad]
    held = {t.untyped_storage()._cdata for t in [*inputs, *parameters, *module.buffers()]}
    run: Any = module
    if backend != "eager":
        named: Any = te_fp8 if backend == "te_fp8" else backend  # it may not be installed
        run = torch.compile(module, backend=named, options=dict(options or {}) or None, dynamic=False)

    def step(recorder: Recorder | None) -> int:
        outputs = run(*args, **kwargs)
        if not training:
            return 0
        wanted = _differentiable(outputs)
        saved = saved_for_backward(wanted, set(held))
        grads = [torch.empty_like(t) for t in wanted]
        if recorder is not None:
            recorder.phase = BACKWARD
        torch.autograd.grad(wanted, leaves, grads, allow_unused=True)
        return saved

    with ExitStack() as stack:
        said = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.enter_context(torch.set_grad_enabled(training))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(observing(lambda gm, found, _: sites.extend(_costs(gm, found))))
        if not training:
            stack.enter_context(_weights_quantized_once())
        step(None)  # compiles
        recorder = stack.enter_context(Recorder(parameters))
        saved = step(recorder)
    for launch in recorder.launches:
        launch.us = microseconds(launch, gpu.peak, gpu.capability)
    ours = list(dict.fromkeys(text for w in said if (text := str(w.message)).startswith("te_fp8")))
    return Step(recorder.launches, saved, sites, ours, time.perf_counter() - began, recorder.kernels)


def _costs(gm: GraphModule, sites: Sites) -> Iterator[SiteCost]:
    visits = visits_of(gm, torch.is_grad_enabled())
    flops = Counter[tuple[str, bool]]()
    for gemm in (gemm for visit in visits for gemm in visit.gemms):
        flops[gemm.node, gemm.weight] += gemm.forward + gemm.backward
    for site in [*sites, *untold(visits[-1], list(sites))]:
        yield SiteCost(site, flops[site.node, site.kind != "attention"])


@contextmanager
def _weights_quantized_once() -> Iterator[None]:
    """In inference, weights are quantized once and cached; but not fake ones, since a change of them would go unnoticed."""
    made: dict[tuple[int, ...], list[Tensor]] = {}
    quantize = WeightCache.inputs

    def inputs(self: WeightCache, wanted: Any, args: Sequence[Any]) -> list[Tensor]:
        key = (id(self), *(id(args[i]) for weights in wanted for i in weights.arguments))
        if key not in made:
            made[key] = quantize(self, wanted, args)
        return made[key]

    WeightCache.inputs = inputs  # type: ignore[method-assign]
    try:
        yield
    finally:
        WeightCache.inputs = quantize  # type: ignore[method-assign]


def _differentiable(outputs: Any) -> list[Tensor]:
    """The loss, if the outputs have one, else all outputs that require grad."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    found = [loss] if isinstance(loss, Tensor) else tensors_in(outputs)
    found = [t for t in found if t.requires_grad]
    if not found:
        raise ValueError("te_dynamo.estimate: no output requires grad, so there is no training step. Remedy: train=False (--eval)")
    return found


def saved_for_backward(outputs: Sequence[Tensor], known: set[int]) -> int:
    """Bytes that the autograd graph of `outputs` holds in storages that are not `known`."""
    seen, stack, total = set[Any](), [t.grad_fn for t in outputs], 0
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        saved = [*getattr(node, "saved_tensors", ())]
        saved += [getattr(node, name) for name in dir(node) if name.startswith("_saved_") and not name.startswith("_saved_tensors")]
        for t in tensors_in(saved):
            if t.untyped_storage()._cdata not in known:
                known.add(t.untyped_storage()._cdata)
                total += t.untyped_storage().nbytes()
    return total
