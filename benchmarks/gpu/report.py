"""The result of a run, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.bars import bars
from benchmarks.gpu.cases import CASES
from benchmarks.gpu.devices import DeviceInfo

Row = Mapping[str, Any]
Cell = Callable[[Row], Any]


def result(
    device: DeviceInfo, versions: Mapping[str, Any], date: str, sections: Mapping[str, list[dict[str, Any]]], predicted: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that a run measured, in types that `json.dumps` takes."""
    peak = device.peak
    layer, gemm, bandwidth = (sections.get(name, []) for name in ("layer", "gemm", "bandwidth"))
    return {
        "date": date,
        "device": asdict(device),
        "versions": dict(versions),
        "layer": [_with_share(row | _prediction(row, predicted), "tflops", peak.fp8_tflops if peak else None) for row in layer],
        "gemm": [_with_share(row, "tflops", peak.fp8_tflops if peak else None) for row in gemm],
        "bandwidth": [_with_share(row, "gbs", peak.gbs if peak else None) for row in bandwidth],
        "bars": [bar.to_dict() for bar in bars(layer, gemm, peak)],
    }


def predictions(path: Path) -> dict[str, Any]:
    """{backend: {shape: {"predicted_ms", "ratio"}}} from the file that `python -m benchmarks --only lab` writes; empty if there is none."""
    return json.loads(path.read_text())["layer"] if path.exists() else {}


def _prediction(row: Row, predicted: Mapping[str, Any]) -> dict[str, Any]:
    backend = next((case.lab for case in CASES if case.name == row["case"]), None)
    found = predicted.get(backend or "", {}).get(row["shape"], {})
    return {"predicted_ms": found.get("predicted_ms"), "predicted_ratio": found.get("ratio")}


def _with_share(row: dict[str, Any], figure: str, peak: float | None) -> dict[str, Any]:
    """Adds share_of_peak: of the dense FP8 peak, or of the memory bandwidth; None if the peak is not known."""
    return row | {"share_of_peak": row[figure] / peak if peak and figure in row else None}


def markdown(found: Mapping[str, Any]) -> str:
    device, peak = found["device"], found["device"]["peak"]
    versions = ", ".join(f"{name} {value or 'none'}" for name, value in found["versions"].items())
    reach = (
        f"{peak['fp8_tflops']:g} TFLOP/s in dense FP8, {peak['bf16_tflops']:g} in bf16, {peak['gbs']:g} GB/s ({peak['source']})"
        if peak
        else "not known, so no shares of it are given"
    )
    parts = [f"# {device['name']}, {found['date']}", versions, f"Peak: {reach}.", "## Held to", _table(BARS, found["bars"])]
    for key, title, columns in SECTIONS:
        if found[key]:
            parts += [title, _table(columns, found[key])]
    for row in found["layer"]:
        if row.get("kernels") and row["shape"] == found["layer"][0]["shape"]:
            parts += [f"## Kernels of a step: {row['case']}, {row['shape']}", _table(KERNELS, _kernels(row["kernels"]))]
    return "\n\n".join(parts) + "\n"


def _kernels(found: Mapping[str, Sequence[float]]) -> list[Row]:
    """The longest kernels, and the sum of the rest."""
    rows = [{"kernel": name[:MOST_OF_A_NAME], "calls": calls, "us": us} for name, (calls, us) in found.items()]
    rest = rows[MOST_KERNELS:]
    other = {"kernel": f"{len(rest)} others", "calls": sum(r["calls"] for r in rest), "us": sum(r["us"] for r in rest)}
    return rows[:MOST_KERNELS] + [other] * bool(rest)


def _table(columns: Mapping[str, Cell], rows: Sequence[Row]) -> str:
    """A Markdown table. A row that was not measured has its reason in the first column of figures, and nothing after it."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [_text(cell(row)) for cell in columns.values()]
        if "reason" in row:
            first = next(i for i, title in enumerate(columns) if title == FIRST_FIGURE)
            cells = [*cells[:first], f"not available: {row['reason']}".replace("|", "\\|"), *[""] * (len(cells) - first - 1)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "\\|")


def _get(key: str) -> Cell:
    return lambda row: row.get(key)


def _percent(key: str) -> Cell:
    return lambda row: None if row.get(key) is None else f"{100 * row[key]:.0f}%"


def _times(key: str) -> Cell:
    return lambda row: None if row.get(key) is None else f"{row[key]:.2f}x"


FIRST_FIGURE = "ms"
MOST_KERNELS, MOST_OF_A_NAME = 25, 100
KERNELS: dict[str, Cell] = {"kernel": _get("kernel"), "calls": _get("calls"), "us": _get("us")}
BARS: dict[str, Cell] = {
    "what": _get("what"),
    "found": _get("value"),
    "wanted": lambda bar: f"{bar['sense']} {bar['bound']:g}",
    "met": lambda bar: "not measured" if bar["met"] is None else bar["met"],
}
LAYER: dict[str, Cell] = {
    "shape": _get("shape"),
    "case": _get("case"),
    "ms": _get("ms"),
    "over bf16": _times("ratio"),
    "device ms": _get("device_ms"),
    "host ms": _get("host_ms"),
    "TFLOP/s": _get("tflops"),
    "of FP8 peak": _percent("share_of_peak"),
    "FP8 linears": _get("fp8_linears"),
    "peak MiB": _get("peak_mib"),
    "extra MiB": _get("extra_mib"),
    "predicted ms": _get("predicted_ms"),
    "predicted over bf16": _times("predicted_ratio"),
}
GEMM: dict[str, Cell] = {
    "GEMM": _get("gemm"),
    "M x N x K": lambda row: f"{row['m']} x {row['n']} x {row['k']}",
    "by": _get("contender"),
    "ms": _get("ms"),
    "TFLOP/s": _get("tflops"),
    "of FP8 peak": _percent("share_of_peak"),
}
BANDWIDTH: dict[str, Cell] = {
    "what": _get("what"),
    "matrix": lambda row: f"{row['rows']} x {row['columns']}",
    "by": _get("contender"),
    "ms": _get("ms"),
    "GB/s": _get("gbs"),
    "of memory's peak": _percent("share_of_peak"),
}
SECTIONS: tuple[tuple[str, str, dict[str, Cell]], ...] = (
    (
        "layer",
        "## One transformer layer, forward and backward\n\n"
        "ms: a step among steps, as in training; device ms: the device's own time of it; host ms: until the step is launched. "
        "Predictions are those of `te_dynamo.estimate`, for an H100.",
        LAYER,
    ),
    ("gemm", "## GEMMs", GEMM),
    ("bandwidth", "## Quantization\n\nA rate counts what must be moved: the bf16 matrix once, each FP8 matrix once.", BANDWIDTH),
)
