"""One case, or a sweep, in its own process, so that neither its state nor its death affects the others.

`python -m benchmarks.gpu.worker NAME --device DEVICE [--tiny]` reads one JSON request per line from stdin and answers each with a
line, {"value": ...} or {"error": why}. What libraries print goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import bandwidth, gemm
from benchmarks.gpu.cases import case_named
from benchmarks.gpu.model import LLAMA_3_8B, TINY, Shape, inputs
from benchmarks.gpu.reasons import reason_of
from benchmarks.gpu.timing import clock_of

SWEEPS: dict[str, Callable[[torch.device, bool], list[dict[str, Any]]]] = {"gemm": gemm.sweep, "bandwidth": bandwidth.sweep}


class Sweep:
    """A section that is measured in one process."""

    def __init__(self, name: str, device: torch.device, tiny: bool) -> None:
        self.sweep, self.device, self.tiny = SWEEPS[name], device, tiny

    def rows(self) -> list[dict[str, Any]]:
        return self.sweep(self.device, self.tiny)


class LayerSteps:
    """Forward and backward of one case's layer, at any shape."""

    def __init__(self, name: str, device: torch.device, tiny: bool) -> None:
        self.device, self.size = device, TINY if tiny else LLAMA_3_8B
        self.clock = clock_of(device)
        self.built = case_named(name).build(self.size, device)
        self.steps: dict[Shape, Callable[[], None]] = {}

    def prepare(self, shape: list[int]) -> dict[str, Any]:
        """Compiles and warms up: {"seconds", "fp8_linears", "peak_bytes"}, the last for one step, including weights and inputs."""
        key = (shape[0], shape[1])
        began = time.perf_counter()
        step = self.steps[key] = self._step(key)
        for _ in range(3):  # the first computes its own scales, the second is the first of the steady graph
            step()
        self._synchronize()
        seconds = time.perf_counter() - began
        peak = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            step()
            peak = torch.cuda.max_memory_allocated(self.device)
            self._release()
            torch.cuda.empty_cache()  # other processes are waiting
        return {"seconds": seconds, "fp8_linears": self.built.fp8_linears(), "peak_bytes": peak}

    def time(self, shape: list[int], calls: int, queued: bool = False) -> list[float]:
        """Milliseconds of each of `calls` steps. The L2 cache is not flushed: the layer's weights alone are larger."""
        return self.clock.samples(self.steps[shape[0], shape[1]], calls, queued=queued)

    def host(self, shape: list[int], calls: int) -> float:
        return self.clock.host_ms(self.steps[shape[0], shape[1]], calls)

    def kernels(self, shape: list[int], steps: int = 5) -> dict[str, list[float]]:
        """Every kernel of a step by name: its number of launches and its total microseconds; the longest first."""
        found: dict[str, list[float]] = {}
        if self.device.type != "cuda":
            return found
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(steps):
                self.steps[shape[0], shape[1]]()
            self._synchronize()
        for event in profiled.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                entry = found.setdefault(event.name, [0.0, 0.0])
                entry[0] += 1 / steps
                entry[1] += event.device_time / steps
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def rest(self) -> None:
        """Frees memory until this process's next turn."""
        self._release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _step(self, shape: Shape) -> Callable[[], None]:
        x, dy = inputs(self.size, shape, self.device)
        forward, module = self.built.forward(shape[1]), self.built.module

        def step() -> None:
            module.zero_grad(set_to_none=True)
            x.grad = None
            forward(x).backward(dy)

        step.x = x  # type: ignore[attr-defined]
        return step

    def _release(self) -> None:
        self.built.module.zero_grad(set_to_none=True)
        for step in self.steps.values():
            step.x.grad = None  # type: ignore[attr-defined]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    target: Any = None
    for line in sys.stdin:
        method, keywords = json.loads(line)
        try:
            if target is None:
                target = (Sweep if arguments.name in SWEEPS else LayerSteps)(arguments.name, arguments.device, arguments.tiny)
            answer = {"value": getattr(target, method)(**keywords)}
        except Exception as error:
            answer = {"error": reason_of(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
