"""Forward and backward of one transformer layer: every case at every shape, interleaved."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.gpu.cases import BASELINE, CASES, Case
from benchmarks.gpu.model import LLAMA_3_8B, SHAPES, TINY, TINY_SHAPES, Shape, spelled
from benchmarks.gpu.reasons import Failed
from benchmarks.gpu.timing import interleaved
from benchmarks.gpu.workers import Worker

ROUNDS, CALLS = 5, 10
AT_ONCE = min(6, max(1, (os.cpu_count() or 1) // 2))  # processes that compile at the same time: more would need more device memory
PREPARE_SECONDS, ALL_SECONDS = 150.0, 360.0  # to compile and warm up: for a case at one shape, and for all
Prepared = dict[tuple[str, Shape], dict[str, Any]]
Reasons = dict[tuple[str, Shape], str]


def rows(device: torch.device, tiny: bool, cases: Sequence[Case] = CASES, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """A row for each case and shape: {"case", "family", "shape", ...figures} or {"case", "family", "shape", "reason"}."""
    shapes, size = (TINY_SHAPES, TINY) if tiny else (SHAPES, LLAMA_3_8B)
    missing = {case.name: case.missing(device) for case in cases}
    reasons: Reasons = {(name, shape): reason for name, reason in missing.items() if reason for shape in shapes}
    figures: Prepared = {}
    with ExitStack() as stack:
        able = [case.name for case in cases if not missing[case.name]]
        workers = {name: stack.enter_context(Worker(name, device, tiny)) for name in able}
        _prepare(workers, shapes, figures, reasons, say)
        for shape in shapes:
            ready = {name: worker for name, worker in workers.items() if (name, shape) in figures}
            _time(ready, shape, 1 if tiny else ROUNDS, figures, reasons)
            say(f"timed at {spelled(shape)}: {len(ready)} cases")
            _profile(ready, shape, figures, reasons)
    return [_row(case, shape, figures, reasons, size.flops(shape)) for shape in shapes for case in cases]


def _prepare(
    workers: Mapping[str, Worker], shapes: Sequence[Shape], figures: Prepared, reasons: Reasons, say: Callable[[str], None]
) -> None:
    deadline = time.monotonic() + ALL_SECONDS

    def one(name: str) -> None:
        for shape in shapes:
            try:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Failed(f"its turn to compile did not come within {ALL_SECONDS:.0f} s")
                figures[name, shape] = workers[name].ask("prepare", timeout=min(PREPARE_SECONDS, left), shape=shape)
                say(f"{name} at {spelled(shape)}: ready after {figures[name, shape]['seconds']:.0f} s")
            except Failed as failed:
                reasons[name, shape] = str(failed)
                say(f"{name} at {spelled(shape)}: {failed}")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, sorted(workers, key=_urgency)))


def _urgency(name: str) -> int:
    """The order of preparation, since time may run out: the baseline first, then te_fp8, then the others."""
    family = next((case.family for case in CASES if case.name == name), "")
    return 0 if name == BASELINE else 1 if family == "ours" else 2


def _time(workers: Mapping[str, Worker], shape: Shape, rounds: int, figures: Prepared, reasons: Reasons) -> None:
    """Adds each case's "ms" (of a step among steps, as in training), "device_ms" (device time only) and "host_ms"."""

    def turn(name: str, method: str, **arguments: Any) -> Callable[[], list[float]]:
        def measure() -> list[float]:
            found = workers[name].ask(method, shape=shape, calls=CALLS, **arguments)
            workers[name].ask("rest")
            return found if isinstance(found, list) else [found]

        return measure

    for figure, method, arguments in (("ms", "time", {}), ("device_ms", "time", {"queued": True}), ("host_ms", "host", {})):
        measures = {name: turn(name, method, **arguments) for name in workers if (name, shape) not in reasons}
        found, failed = interleaved(measures, rounds)
        for name, value in found.items():
            figures[name, shape][figure] = value
        reasons.update({(name, shape): reason for name, reason in failed.items()})


def _profile(workers: Mapping[str, Worker], shape: Shape, figures: Prepared, reasons: Reasons) -> None:
    """Adds the "kernels" of a step for the cases that are compared kernel by kernel: the baseline and ours."""
    for case in CASES:
        if case.name in workers and (case.name, shape) not in reasons and (case.name == BASELINE or case.family == "ours"):
            figures[case.name, shape]["kernels"] = workers[case.name].ask("kernels", shape=shape)
            workers[case.name].ask("rest")


def _row(case: Case, shape: Shape, figures: Prepared, reasons: Reasons, flops: int) -> dict[str, Any]:
    row = {"case": case.name, "family": case.family, "shape": spelled(shape)}
    if (case.name, shape) in reasons:
        return row | {"reason": reasons[case.name, shape]}
    mine, base = figures[case.name, shape], figures.get((BASELINE, shape), {})
    compared = base if (BASELINE, shape) not in reasons else {}
    peak, reference = mine["peak_bytes"], compared.get("peak_bytes")
    return row | {
        "ms": mine["ms"],
        "ratio": compared["ms"] / mine["ms"] if compared else None,
        "device_ms": mine["device_ms"],
        "host_ms": mine["host_ms"],
        "tflops": flops / mine["ms"] / 1e9,
        "fp8_linears": mine["fp8_linears"],
        "peak_mib": None if peak is None else peak / 2**20,
        "extra_mib": None if peak is None or reference is None else (peak - reference) / 2**20,
        "prepare_s": mine["seconds"],
        "kernels": mine.get("kernels", {}),
    }
