"""The predicted speedup of te_fp8 on a GPU that is not present, model by model: `python -m benchmarks --only lab`.

Deterministic: the same versions give the same figures on any machine. `te_dynamo.lab` says how, docs/estimate.md how accurate they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab_models import CASES, Case
from te_dynamo.lab.estimate import HOW_FAR, Estimate, Example, estimate_of
from te_dynamo.lab.roofline import GROUPS
from te_dynamo.lab.show import Table, markdown_of
from te_dynamo.lab.stand_in import building

RESULTS = Path(__file__).parent / "results"
LAYER = "Llama-3-8B layer"


def built(case: Case) -> Callable[[], Example]:
    def build() -> Example:
        with building():
            model, inputs = case.make(case.batch, case.length)
        return Example(model, (), inputs) if isinstance(inputs, dict) else Example(model, tuple(inputs), {})

    return build


def estimates(device: str = "h100", cases: Sequence[Case] = CASES, **options: Any) -> Iterator[tuple[Case, Estimate]]:
    for case in cases:
        yield case, estimate_of(built(case), device, options=options or None)


def row(case: Case, found: Estimate) -> dict[str, Any]:
    """What is kept of an estimate: totals and sites, without the launches."""
    whole = found.to_dict()
    return {"case": case.name, "shape": case.shape, "target": case.target, **{k: whole[k] for k in ("speedup", "sides", "sites", "notes")}}


def result(device: str, rows: Sequence[dict[str, Any]], versions: dict[str, str]) -> dict[str, Any]:
    return {"device": device, "versions": versions, "cases": list(rows), "layer": predictions(rows)}


def predictions(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """{backend: {shape: {"predicted_ms", "ratio"}}} of the layer that `python -m benchmarks --gpu` times."""
    found: dict[str, dict[str, dict[str, float]]] = {"bf16 Inductor": {}, "te_fp8 native": {}}
    for r in rows:
        if r["case"] == LAYER:
            base, ours = r["sides"][:2]
            found["bf16 Inductor"][r["shape"]] = {"predicted_ms": round(base["ms"], 3), "ratio": 1.0}
            found["te_fp8 native"][r["shape"]] = {"predicted_ms": round(ours["ms"], 3), "ratio": round(r["speedup"], 3)}
    return found


def markdown(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rows = found["cases"]
    missed = [r for r in rows if r["target"] is not None and r["speedup"] < r["target"] - 5e-4]
    slower = [r for r in rows if r["speedup"] < 0.9995]
    parts = [
        f"# Predicted for {found['device']}",
        f"A training step, forward and backward, of one layer each (two of Gemma 3). {versions}. By `python -m benchmarks --only lab`; the "
        "same figures are in the JSON file of this name.",
        HOW_FAR,
        markdown_of(_totals(rows)),
        f"Below 1.0x: {_names(slower)}. Below their target: {_names(missed)}.",
        "Where the microseconds go:",
        markdown_of(_groups(rows)),
        "Sites that are left in high precision:",
        markdown_of(_left(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def _names(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{r['case']} {r['shape']} ({r['speedup']:.2f}x)" for r in rows) or "none"


def _totals(rows: Sequence[dict[str, Any]]) -> Table:
    header = ("model", "shape", "", "kernels", "GEMMs", "FP8 FLOPs", "GB outside GEMMs", "saved MiB", "predicted ms", "ratio", "target")
    cells = []
    for r in rows:
        for i, side in enumerate(r["sides"][:2]):
            figures = (f"{side['gigabytes']:.2f}", f"{side['saved'] / 2**20:.1f}", f"{side['ms']:.3f}", f"{r['speedup'] if i else 1.0:.3f}")
            share = f"{side['fp8_tflop'] / side['tflop']:.1%}" if side["tflop"] else "-"
            target = f"{r['target']:.2f}" if i and r["target"] is not None else ""
            cells.append((r["case"], r["shape"], side["label"], str(side["kernels"]), str(side["gemms"]), share, *figures, target))
    return Table("", header, cells)


def _groups(rows: Sequence[dict[str, Any]]) -> Table:
    sides = [(r, side) for r in rows for side in r["sides"][:2]]
    cells = [(r["case"], r["shape"], side["label"], *(f"{side['groups'][name]:.0f}" for name in GROUPS)) for r, side in sides]
    return Table("", ("model", "shape", "", *GROUPS), cells)


def _left(rows: Sequence[dict[str, Any]]) -> Table:
    left = [(r, s) for r in rows for s in r["sites"] if s["provider"] is None and s["kind"] != "norm" and s["bf16_us"]]
    cells = [(r["case"], r["shape"], s["path"], f"{s['bf16_us']:.0f}", s["reason"] or "") for r, s in left]
    return Table("", ("model", "shape", "path", "GEMMs, us", "because"), cells)


def write(found: dict[str, Any], folder: Path = RESULTS, name: str = "lab-h100") -> Path:
    """As JSON and as Markdown; returns the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    path = folder / f"{name}.md"
    path.write_text(markdown(found))
    return path


def main(device: str = "h100", cases: Sequence[Case] = CASES, say: Callable[[str], None] = print) -> dict[str, Any]:
    from importlib.metadata import version

    rows, name = [], ""
    for case, found in estimates(device, cases):
        rows.append(row(case, found))
        name = found.device
        say(f"{found.speedup:7.2f}x  {case.name} {case.shape}")
    return result(name, rows, {package: version(package) for package in ("torch", "transformers")})


if __name__ == "__main__":
    print(write(main()))
