"""The predicted step of a Llama-3-8B layer on an H100, Inductor in bf16 against te_fp8's providers, on a machine without a GPU.

    python -m benchmarks.lab PATH_TO_GPULAB [--shape 1x4096 ...] [--python PYTHON] [--json FILE]

Two tables: the totals of a step, and the microseconds of its parts, beside the floor: the same GEMMs and attention in FP8 and
bf16, one read and one write of each tensor that must exist, every quantization done by the kernel that makes the values.

gpulab is an external cost model, not part of this repository: PATH_TO_GPULAB is its folder. It compiles the step for sm_90,
runs it on fake CUDA tensors and records each launch: trust kernels, bytes and the ratio rather than milliseconds.
The benchmarks on a GPU print `--json benchmarks/results/lab.json` beside their own times.
It needs triton, transformer_engine's Python package and g++, so `--python` may name another interpreter than this one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = ("1x4096", "4x2048", "16x512", "1x512")  # batch x length
TE_FP8 = ["--backend", "te_fp8", "--import", "benchmarks.lab_backend", "--option"]
BACKENDS = {
    "bf16 Inductor": [],
    "te_fp8 native": [*TE_FP8, 'provider="native"'],
    "te_fp8 te": ["--import", "te_present", *TE_FP8, 'provider="te"'],
    **{f"te_fp8 native, {memory}": [*TE_FP8, 'provider="native"', "--option", f'memory="{memory}"'] for memory in ("speed", "saving")},
}
FLOOR = """
import dataclasses, json, os, sys
import gpulab
gpulab.pretend_h100()
import fp8_cases
hardware, rows = gpulab.Hardware(), {}
for shape in sys.argv[2:]:
    events, _ = fp8_cases.floor(*map(int, shape.split("x")), True, True)
    rows[shape] = [dataclasses.asdict(event) | {"us": hardware.us(event)} for event in events]
json.dump(rows, open(sys.argv[1], "w"))
sys.stdout.flush()
os._exit(0)
"""
WEIGHT_CASTS = ("cast_transpose", "te_quantize", "weights")
SMALL = 8.0  # us
# The group of a launch: the first that fits.
GROUPS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "GEMMs": lambda e: e["kind"] == "gemm",
    "attention": lambda e: e["kind"] == "attention",
    "weights to FP8, both ways": lambda e: e["name"].startswith(WEIGHT_CASTS),
    "transposed copies": lambda e: e["name"] == "transpose",
    "scales and other small kernels": lambda e: e["us"] < SMALL,
    "norms, RoPE, SwiGLU, sums and casts": lambda e: True,
}
COLUMNS = {"kernels": "kernels", "GEMMs": "gemms", "GB outside GEMMs": "gb", "saved MiB": "saved_mb", "predicted ms": "device_ms"}


def measure(lab: Path, python: str, shapes: list[str], arguments: list[str]) -> list[dict[str, Any]]:
    """A row for each shape, as gpulab gives them, with "gb", the gigabytes outside GEMMs."""
    root = Path(__file__).parent.parent
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [python, "gpulab.py", "--case", "bf16", "--json", str(result), *arguments]
        for shape in shapes:
            command += ["--shape", shape]
        subprocess.run(command, cwd=lab, env=os.environ | {"PYTHONPATH": paths}, check=True, stdout=subprocess.DEVNULL)
        rows = json.loads(result.read_text())["rows"]
    return [row | {"gb": row["triton_gb"] + row["extern_gb"]} for row in rows]


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown; the ratio is to the first backend at the same shape."""
    lines = []
    for i, reference in enumerate(next(iter(rows.values()))):
        for name, measured in rows.items():
            row = measured[i]
            cells = [f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key in COLUMNS.values()]
            lines.append([row["shape"], name, *cells, f"{reference['device_ms'] / row['device_ms']:.3f}"])
    return markdown(["shape", "backend", *COLUMNS, "ratio"], lines)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    first, *rest = (f"| {' | '.join(cells)} |" for cells in (header, *lines))
    return "\n".join([first, "|" + "---|" * len(header), *rest])


def floor(lab: Path, python: str, shapes: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The launches of the floor at each shape."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "floor.json"
        subprocess.run([python, "-c", FLOOR, str(result), *shapes], cwd=lab, check=True, stdout=subprocess.DEVNULL)
        return json.loads(result.read_text())


def spent(events: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds by group."""
    result = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        result[next(name for name, fits in GROUPS.items() if fits(event))] += event["us"]
    return result


def spending(rows: dict[str, list[dict[str, Any]]], floors: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: microseconds of a step by group, beside the floor's."""
    lines = []
    for i, row in enumerate(next(iter(rows.values()))):
        measured = {"floor": floors[row["shape"]]} | {name: found[i]["events"] for name, found in rows.items()}
        for name, events in measured.items():
            groups = spent(events)
            lines.append([row["shape"], name, *(f"{us:.0f}" for us in (*groups.values(), sum(groups.values())))])
    return markdown(["shape", "backend", *GROUPS, "all, us"], lines)


def predictions(rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """{backend: {shape: {"predicted_ms", "ratio"}}}; the ratio is to the first backend at the same shape."""
    base = next(iter(rows.values()))
    return {
        name: {
            row["shape"]: {"predicted_ms": round(row["device_ms"], 3), "ratio": round(reference["device_ms"] / row["device_ms"], 3)}
            for row, reference in zip(measured, base, strict=True)
        }
        for name, measured in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=Path, help="the folder of gpulab")
    parser.add_argument("--shape", action="append", help=f"BATCHxLENGTH, repeatable (default: {' '.join(SHAPES)})")
    parser.add_argument("--python", default=sys.executable, help="an interpreter with torch, transformers and triton")
    parser.add_argument("--json", type=Path, help="also write the predictions to this file")
    args = parser.parse_args()
    shapes = args.shape or list(SHAPES)
    rows = {name: measure(args.lab, args.python, shapes, arguments) for name, arguments in BACKENDS.items()}
    print(table(rows), spending(rows, floor(args.lab, args.python, shapes)), sep="\n\n")
    if args.json:
        args.json.write_text(json.dumps(predictions(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
