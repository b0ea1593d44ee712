"""Clocks, and rounds that interleave all contenders, so that a drifting clock frequency affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from benchmarks.gpu.reasons import reason_of

WARM_UP = 3
L2_BYTES = 256 << 20  # more than any L2 there is
DELAY_CYCLES = 20_000_000  # about 10 ms: the host has queued a whole step by then


class Clock(Protocol):
    def samples(self, run: Callable[[], object], calls: int, *, cold: bool = False, queued: bool = False) -> list[float]:
        """Milliseconds of each of `calls` runs, after some that are not counted.

        cold: none of the operands is in the L2 cache. queued: the device waits until the host has launched the whole run, so
        that only device time counts.
        """
        ...

    def host_ms(self, run: Callable[[], object], calls: int) -> float:
        """Milliseconds that the host needs to launch a run, without waiting for the device."""
        ...


class CUDAClock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.scratch: torch.Tensor | None = None

    def samples(self, run: Callable[[], object], calls: int, *, cold: bool = False, queued: bool = False) -> list[float]:
        for _ in range(WARM_UP):
            run()
        torch.cuda.synchronize(self.device)
        pairs = []
        for _ in range(calls):
            if cold:
                self._flush()
            if queued:
                torch.cuda._sleep(DELAY_CYCLES)
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            run()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in pairs]

    def host_ms(self, run: Callable[[], object], calls: int) -> float:
        times = []
        for _ in range(calls):
            torch.cuda.synchronize(self.device)
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        torch.cuda.synchronize(self.device)
        return statistics.median(times) * 1e3

    def _flush(self) -> None:
        if self.scratch is None:
            self.scratch = torch.empty(L2_BYTES, dtype=torch.int8, device=self.device)
        self.scratch.zero_()


class CPUClock:
    """To try the benchmarks without a GPU. Host and device are the same."""

    def samples(self, run: Callable[[], object], calls: int, *, cold: bool = False, queued: bool = False) -> list[float]:
        run()
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1e3)
        return times

    def host_ms(self, run: Callable[[], object], calls: int) -> float:
        return statistics.median(self.samples(run, calls))


def clock_of(device: torch.device) -> Clock:
    return CUDAClock(device) if device.type == "cuda" else CPUClock()


def interleaved(measures: Mapping[str, Callable[[], list[float]]], rounds: int) -> tuple[dict[str, float], dict[str, str]]:
    """For each measure, the median over `rounds` of the median of its result; and the reasons of those that raised."""
    medians: dict[str, list[float]] = {name: [] for name in measures}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, measure in measures.items():
            if name in failed:
                continue
            try:
                medians[name].append(statistics.median(measure()))
            except Exception as error:
                failed[name] = reason_of(error)
    return {name: statistics.median(found) for name, found in medians.items() if name not in failed}, failed
