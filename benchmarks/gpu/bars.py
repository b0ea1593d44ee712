"""The requirements that figures must meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.cases import BASELINE
from benchmarks.gpu.gemm import BF16
from benchmarks.gpu.model import HOST_SHAPE, spelled
from te_dynamo.lowering.devices import Peak

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Bar:
    """value: None if it could not be measured; sense: ">=" or "<=", how it must compare to `bound`."""

    what: str
    value: float | None
    sense: str
    bound: float

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.sense == ">=" else self.value <= self.bound

    def to_dict(self) -> dict[str, Any]:
        return {"what": self.what, "value": self.value, "sense": self.sense, "bound": self.bound, "met": self.met}


def bars(layer: Rows, gemm: Rows, peak: Peak | None) -> list[Bar]:
    return [*_layer_bars(layer), *_host_bars(layer), *_gemm_bars(gemm, peak)]


def _layer_bars(rows: Rows) -> Iterator[Bar]:
    """At each shape, the fastest of te_fp8's cases: against bf16, TE's FP8 modules and torchao, and its memory."""
    host = spelled(HOST_SHAPE)
    for shape in dict.fromkeys(row["shape"] for row in rows):
        if shape == host:
            continue
        here = [row for row in rows if row["shape"] == shape and "ms" in row]
        ours = fastest(here, lambda row: row["family"] == "ours")

        def speedup(over: Callable[[Mapping[str, Any]], bool], here: Rows = here, ours: Mapping[str, Any] | None = ours) -> float | None:
            other = fastest(here, over)
            return other["ms"] / ours["ms"] if ours and other else None

        yield Bar(f"{shape}: te_fp8 over {BASELINE}", speedup(lambda row: row["case"] == BASELINE), ">=", 1.45)
        yield Bar(f"{shape}: te_fp8 over TE's FP8 modules", speedup(lambda row: row["family"] == "te"), ">=", 1.0)
        yield Bar(f"{shape}: te_fp8 over torchao's best", speedup(lambda row: row["family"] == "torchao"), ">=", 1.0)
        yield Bar(f"{shape}: MiB more than {BASELINE}", ours["extra_mib"] if ours else None, "<=", 0.0)


def _host_bars(rows: Rows) -> Iterator[Bar]:
    """The largest host time of any shape counts: it does not depend on the size, but small linears may have been left in bf16."""
    host = spelled(HOST_SHAPE)
    measured = [row for row in rows if "ms" in row and row["family"] == "ours"]
    at_small = fastest(measured, lambda row: row["shape"] == host)
    value = None
    if at_small is not None:
        value = max(row["host_ms"] for row in measured if row["case"] == at_small["case"]) / at_small["device_ms"]
    yield Bar(f"{host}: te_fp8's host time a call over its device time", value, "<=", 1.0)


def _gemm_bars(rows: Rows, peak: Peak | None) -> Iterator[Bar]:
    big = fastest([row for row in rows if "ms" in row], lambda row: row["gemm"] == "8192 cubed" and row["contender"] != BF16)
    share = big["tflops"] / peak.fp8_tflops if big is not None and peak is not None else None
    yield Bar("FP8 GEMM of 8192 cubed, share of the dense peak", share, ">=", 0.70)


def fastest(rows: Rows, which: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any] | None:
    return min((row for row in rows if which(row)), key=lambda row: row["ms"], default=None)
