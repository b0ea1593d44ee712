"""The CPU path against Inductor, interleaved in one process: `python -m benchmarks.cpu WHAT` prints the result as JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from benchmarks.models import Chain, llama, tiny_llama

BF16, F32 = torch.bfloat16, torch.float32
Side = tuple[str, torch.dtype]  # backend, dtype of the model
SIDES: tuple[Side, ...] = (("inductor", F32), ("inductor", BF16), ("te_fp8", F32), ("te_fp8", BF16))


def compiled(backend: str, model: nn.Module) -> Callable[..., Any]:
    """Compiles with a separate code object, so that no side checks another's guards."""

    def call(x: torch.Tensor) -> Any:
        return model(x)

    own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    return torch.compile(own, backend=backend, dynamic=False)


def training(backend: str, dtype: torch.dtype) -> Callable[[], None]:
    model, x = llama(dtype)
    return _step(model, x, compiled(backend, model))


def host(backend: str, dtype: torch.dtype) -> Callable[[], None]:
    model, x = tiny_llama(4)
    model.to(dtype)
    return _step(model, x, compiled(backend, model))


def _step(model: nn.Module, x: torch.Tensor, run: Callable[..., Any]) -> Callable[[], None]:
    def step() -> None:
        run(x).logits.float().square().mean().backward()
        for p in model.parameters():
            p.grad = None

    return step


def evaluation(backend: str, dtype: torch.dtype) -> Callable[[], None]:
    model, x = llama(dtype)
    return _forward(compiled(backend, model.eval()), x)


def decode(backend: str, dtype: torch.dtype) -> Callable[[], None]:
    torch.manual_seed(0)
    return _forward(compiled(backend, Chain(24, 2048, dtype).eval()), torch.randn(1, 2048, dtype=dtype))


def _forward(run: Callable[..., Any], x: torch.Tensor) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            run(x)

    return forward


# By what is timed: a function that makes a side, rounds, threads.
MEASUREMENTS: dict[str, tuple[Callable[[str, torch.dtype], Callable[[], None]], int, int]] = {
    "training": (training, 9, 2),
    "evaluation": (evaluation, 15, 2),
    "decode": (decode, 60, 2),
    "host": (host, 60, 1),
}


def measure(what: str) -> dict[str, dict[str, float]]:
    """By dtype of the model: median milliseconds of each backend over interleaved calls, and the median ratio of te_fp8 to Inductor."""
    make, rounds, threads = MEASUREMENTS[what]
    torch.set_num_threads(threads)
    sides = {side: make(*side) for side in SIDES}
    for run in sides.values():
        for _ in range(4):  # the first call calibrates, the second compiles what follows
            run()
    times: dict[Side, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            began = time.perf_counter()
            run()
            times[side].append((time.perf_counter() - began) * 1e3)
    found = {}
    for dtype in (F32, BF16):
        inductor, fp8 = times["inductor", dtype], times["te_fp8", dtype]
        ratio = statistics.median(b / a for a, b in zip(inductor, fp8, strict=True))
        found[str(dtype)] = {"inductor": statistics.median(inductor), "te_fp8": statistics.median(fp8), "ratio": ratio}
    return found


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
