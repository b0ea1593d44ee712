"""Measures one compiled model in this process: `python -m benchmarks.measure KIND BACKEND [OPTIONS]` prints the result as JSON."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import Chain, tiny_llama, tiny_mixtral
from te_dynamo.state import STATE

SITES, CALLS = 20, 200


def cpu_seconds() -> float:
    """CPU time of this process and of the compilers that it started, which varies less than wall time on a shared machine."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)


def compile_model(model: nn.Module, backend: str, options: dict[str, Any]) -> Callable[..., Any]:
    return torch.compile(model, backend=backend, options=options or None, dynamic=False)


def step(run: Callable[..., Any], x: torch.Tensor) -> None:
    result = run(x)
    (result.logits if hasattr(result, "logits") else result).float().sum().backward()


def compile_time(backend: str, options: dict[str, Any]) -> dict[str, float]:
    """Seconds of CPU for the first forward and backward of a model of many layers, without imports."""
    make = {"Llama": tiny_llama, "Mixtral": tiny_mixtral}[options["model"]]
    small, x = make(1, hidden=32)  # other sizes, so that none of its kernels is used again
    step(compile_model(small, backend, {}), x)  # costs paid once a process
    model, x = make(options["layers"])
    run = compile_model(model, backend, {})
    began = cpu_seconds()
    step(run, x)
    return {"seconds": cpu_seconds() - began}


def call_time(backend: str, options: dict[str, Any]) -> dict[str, float]:
    """Microseconds of a training step of 20 linears of 16 x 16 (host overhead), and of a step of a small Llama."""
    torch.set_num_threads(1)
    model, x = Chain(SITES), torch.randn(2, 16, dtype=torch.bfloat16)
    host = median_us(compile_model(model, backend, options), x, CALLS)
    torch._dynamo.reset()
    model, x = tiny_llama(2, hidden=256, length=128)
    return {"host_us": host, "step_us": median_us(compile_model(model, backend, options), x, CALLS // 20)}


def median_us(run: Callable[..., Any], x: torch.Tensor, calls: int) -> float:
    for _ in range(5):
        step(run, x)
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        step(run, x)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def saved_bytes(backend: str, options: dict[str, Any]) -> dict[str, float]:
    """Bytes that the forward of a chain of linears keeps allocated for backward, without its output."""
    model = Chain(16, size=256)  # many, since the first input, which was allocated before, is not counted
    run = compile_model(model, backend, options)
    x = torch.randn(2048, 256, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        step(run, x)
    return {"bytes": live_after(lambda: run(x)) - 2 * x.numel()}


def live_after(forward: Callable[[], Any]) -> int:
    """The bytes allocated by `forward` that are still allocated after it returned, including its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = forward()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    del kept
    return sum(e.nbytes() for e in events if e.name() == "[memory]")


def sites_time(backend: str, options: dict[str, Any]) -> dict[str, float]:
    """Microseconds of a training step of 200 linears of 64 x 64."""
    torch.set_num_threads(1)
    model, x = Chain(200, size=64), torch.randn(64, 64, dtype=torch.bfloat16)
    return {"step_us": median_us(compile_model(model, backend, options), x, 60)}


class Counted(TorchDispatchMode):
    """Counts ATen calls that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kernels += not func.is_view and func.namespace == "aten"
        return func(*args, **(kwargs or {}))


def state_counts(how: str, options: dict[str, Any]) -> dict[str, float]:
    """Kernels and collectives of one update of the scale state, on one rank of two, with collectives that do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    model, x = tiny_llama(options["layers"])
    run: Any = model
    if how == "layers":
        for layer in model.model.layers:
            layer.compile(backend="te_fp8")
    else:
        run = compile_model(model, "te_fp8", {})
    step(run, x)
    counted: list[Any] = []
    original, dist.all_reduce = dist.all_reduce, lambda *a, **k: counted.append(a)
    try:
        with Counted() as mode:
            STATE.roll()
    finally:
        dist.all_reduce = original
        dist.destroy_process_group()
    return {"kernels": mode.kernels, "collectives": len(counted)}


MEASUREMENTS = {"compile": compile_time, "call": call_time, "saved": saved_bytes, "sites": sites_time, "state": state_counts}

if __name__ == "__main__":
    kind, backend, *rest = sys.argv[1:]
    print(json.dumps(MEASUREMENTS[kind](backend, json.loads(rest[0]) if rest else {})))
