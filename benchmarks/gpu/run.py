"""Speed on a GPU: a transformer layer against all alternatives, GEMMs and quantization against the device's peaks.

    python -m benchmarks --gpu [--only layer|gemm|bandwidth] [--output FOLDER]

One transformer layer (of Llama 3 8B's shape), forward and backward, under Inductor, Transformer Engine's modules, torchao and
te_fp8; then GEMMs and quantization kernels alone. It needs no network, and should take less than 10 minutes on an H100.
A case that is not installed or fails gets a row with the reason. Writes FOLDER/<device>.json and .md, which the folder's README.md
explains.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import bandwidth, gemm, layer
from benchmarks.gpu.devices import describe, versions
from benchmarks.gpu.reasons import Failed
from benchmarks.gpu.report import markdown, predictions, result
from benchmarks.gpu.workers import Worker

RESULTS = Path(__file__).resolve().parents[1] / "results"
SWEEP_SECONDS = 150.0


def sweep(name: str, rows_without: Callable[[str], list[dict[str, Any]]], device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """A section's rows, measured in its own process; if that dies, a single row with the reason."""
    with Worker(name, device, tiny) as worker:
        try:
            return worker.ask("rows", timeout=SWEEP_SECONDS)
        except Failed as failed:
            return rows_without(str(failed))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks --gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("layer", "gemm", "bandwidth"))
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the result files (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help=argparse.SUPPRESS)  # cpu: to try it out
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device: torch.device = given.device
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")

    about = describe(device)
    sections: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "gemm": lambda: sweep("gemm", gemm.not_measured, device, given.tiny),
        "bandwidth": lambda: sweep("bandwidth", bandwidth.not_measured, device, given.tiny),
        "layer": lambda: layer.rows(device, given.tiny, say=lambda text: print(text, flush=True)),
    }
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    path, text = given.output / f"{about.slug}.json", ""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, section in sections.items():
        if given.only in (None, name):
            found[name] = section()
            text = write(path, result(about, versions(device), date, found, predictions(RESULTS / "lab-h100.json")))
    print(text)
    print(f"written to {path} and {path.with_suffix('.md').name}")


def write(path: Path, whole: dict[str, Any]) -> str:
    """Writes the results so far: an interrupted run keeps its finished sections. Returns the Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n")
    text = markdown(whole)
    path.with_suffix(".md").write_text(text)
    return text


if __name__ == "__main__":
    main()
