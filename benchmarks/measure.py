"""Measurements of one compiled model in this process; `python -m benchmarks.measure KIND BACKEND [OPTIONS]` prints one as JSON."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.models import Chain, tiny_llama

LAYERS, SITES, CALLS = 32, 20, 200


def cpu_seconds() -> float:
    """CPU time of this process and of the compilers that it started: steadier than wall time on a shared machine."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)


def compile_model(model: nn.Module, backend: str, options: dict[str, Any]) -> Callable[..., Any]:
    return torch.compile(model, backend=backend, options=options or None, dynamic=False)


def step(run: Callable[..., Any], x: torch.Tensor) -> None:
    result = run(x)
    (result.logits if hasattr(result, "logits") else result).float().sum().backward()


def compile_time(backend: str, options: dict[str, Any]) -> dict[str, float]:
    """Seconds of CPU for the first forward and backward of a 32-layer Llama, imports apart."""
    model, x = tiny_llama(LAYERS)
    run = compile_model(model, backend, options)
    step(compile_model(Chain(1), backend, options), torch.randn(2, 16, dtype=torch.bfloat16))  # what a process pays once
    began = cpu_seconds()
    step(run, x)
    return {"seconds": cpu_seconds() - began}


def call_time(backend: str, options: dict[str, Any]) -> dict[str, float]:
    """Microseconds of a training step of 20 linears of 16 x 16 (what the host costs), and of a step that does some work."""
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
    """Bytes that a forward of linears leaves allocated for its backward, at the allocator; its output apart."""
    model = Chain(16, size=256)  # the first input is kept by its owner: the more linears, the less that counts
    run = compile_model(model, backend, options)
    x = torch.randn(2048, 256, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        step(run, x)
    return {"bytes": live_after(lambda: run(x)) - 2 * x.numel()}


def live_after(forward: Callable[[], Any]) -> int:
    """The bytes that are allocated when `forward` has returned and were not before, while its result is alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = forward()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    del kept
    return sum(e.nbytes() for e in events if e.name() == "[memory]")


MEASUREMENTS = {"compile": compile_time, "call": call_time, "saved": saved_bytes}

if __name__ == "__main__":
    kind, backend, *rest = sys.argv[1:]
    print(json.dumps(MEASUREMENTS[kind](backend, json.loads(rest[0]) if rest else {})))
