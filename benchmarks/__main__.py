"""Prints the cost of te_dynamo, as ratios to Inductor in the same run.

    python -m benchmarks [--only compile|call|saved|state|cpu] [--json FILE] [--repeat N]
    python -m benchmarks --gpu [...]    # speed on a GPU, see `python -m benchmarks --gpu --help`

compile: CPU time of the first forward and backward of a 32-layer Llama, cold and in a second process (caches warm).
call:    a training step of 20 tiny linears (host overhead), and of a small Llama, on one CPU thread.
saved:   bytes that linears keep allocated for backward.
state:   the cost of delayed over current scaling: kernels and collectives of an update, time of a step with 200 sites.
cpu:     a training step, a forward in eval, one token through 24 linears, and the host time of a tiny model (`benchmarks/cpu.py`).
Each measurement runs in its own process; the two sides of a ratio run one after the other, those of `cpu` in turns. The ratios of
times on a CPU predict nothing about a GPU (`benchmarks/lab.py` does).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INDUCTOR: tuple[str, dict[str, Any]] = ("inductor", {})
DELAYED, CURRENT, SKIPPED = (("te_fp8", options) for options in ({"recipe": "delayed"}, {"recipe": "current"}, {"skip": ["*"]}))
Row = tuple[str, float, float | None]  # what, ratio, target


def child(kind: str, backend: str, options: dict[str, Any] | None = None, cache: str | None = None) -> dict[str, float]:
    """One measurement in its own process, with an empty Inductor cache unless one is given."""
    return process("benchmarks.measure", kind, backend, json.dumps(options or {}), cache=cache)


def process(*module: str, cache: str | None = None) -> dict[str, Any]:
    """What a module prints last, as JSON."""
    with tempfile.TemporaryDirectory() as fresh:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache or fresh, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", "-m", *module]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compile_rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        inductor = [child("compile", "inductor", cache=a)["seconds"] for _ in range(2)]
        fp8 = [child("compile", "te_fp8", cache=b)["seconds"] for _ in range(2)]
    yield f"compile time, 32 layers, cold ({fp8[0]:.1f} s against {inductor[0]:.1f} s)", fp8[0] / inductor[0], 1.25
    yield f"compile time, 32 layers, warm ({fp8[1]:.1f} s against {inductor[1]:.1f} s)", fp8[1] / inductor[1], 1.1


def call_rows(repeat: int) -> Iterator[Row]:
    cases = {"inductor": INDUCTOR, "skip": SKIPPED, "delayed": DELAYED, "current": CURRENT}
    runs = [{name: child("call", *case) for name, case in cases.items()} for _ in range(repeat)]

    def ratio(a: str, b: str, what: str) -> float:
        return statistics.median(run[a][what] / run[b][what] for run in runs)

    yield "host time per call, skip=['*'] to Inductor", ratio("skip", "inductor", "host_us"), 1.10
    yield "host time per call, delayed to current", ratio("delayed", "current", "host_us"), 1.25
    yield "host time per call, delayed to Inductor, 20 sites", ratio("delayed", "inductor", "host_us"), None
    yield "step of a small Llama on a CPU, delayed to Inductor bf16", ratio("delayed", "inductor", "step_us"), None


def saved_rows() -> Iterator[Row]:
    inductor, fp8 = child("saved", "inductor")["bytes"], child("saved", "te_fp8")["bytes"]
    yield f"bytes saved for backward by linears ({fp8 / 1e6:.2f} MB against {inductor / 1e6:.2f} MB)", fp8 / inductor, 0.55


def state_rows() -> Iterator[Row]:
    for how in ("whole", "layers"):
        few, many = (child("state", how, {"layers": n}) for n in (4, 32))
        for what in ("kernels", "collectives"):
            counts = f"{few[what]:.0f} for 4 layers, {many[what]:.0f} for 32"
            yield f"{what} of an update, {how} compiled: {counts}", many[what] / few[what], 1.0
    runs = [(child("sites", *DELAYED), child("sites", *CURRENT)) for _ in range(3)]
    ratio = statistics.median(a["step_us"] / b["step_us"] for a, b in runs)
    yield "a step with 200 sites, with state (delayed) to without (current)", ratio, 1.05


# The targets by what is measured and the dtype of the model.
ON_A_CPU = {
    "training": ("a training step of a Llama (4 layers of 512, 1024 tokens)", {"torch.float32": 0.75, "torch.bfloat16": 1.25}),
    "evaluation": ("its forward in eval", {"torch.float32": 0.75, "torch.bfloat16": 1.15}),
    "decode": ("one token through 24 linears of 2048 x 2048", {"torch.float32": 1.0, "torch.bfloat16": 1.0}),
    "host": ("a training step of a tiny Llama (4 layers of 64, 64 tokens), one thread", {"torch.float32": 3.0, "torch.bfloat16": 3.0}),
}


def cpu_rows() -> Iterator[Row]:
    for what, (says, targets) in ON_A_CPU.items():
        for dtype, found in process("benchmarks.cpu", what).items():
            times = f"{found['te_fp8']:.1f} ms against {found['inductor']:.1f} ms"
            yield f"{says}, {dtype.removeprefix('torch.')} ({times})", found["ratio"], targets[dtype]


def main() -> None:
    if "--gpu" in sys.argv[1:]:
        from benchmarks.gpu import run

        return run.main([argument for argument in sys.argv[1:] if argument != "--gpu"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("compile", "call", "saved", "state", "cpu"))
    parser.add_argument("--json", type=Path, help="also write the ratios to this file")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of the call times (default: %(default)s)")
    arguments = parser.parse_args()
    sections = {
        "saved": saved_rows,
        "state": state_rows,
        "call": lambda: call_rows(arguments.repeat),
        "compile": compile_rows,
        "cpu": cpu_rows,
    }
    found = []
    for name, section in sections.items():
        if arguments.only in (None, name):
            for what, ratio, target in section():
                found.append({"what": what, "ratio": ratio, "target": target})
                print(f"{ratio:7.2f}x  {'' if target is None else f'(target {target}x) '}{what}", flush=True)
    if arguments.json:
        import torch

        arguments.json.write_text(json.dumps({"torch": torch.__version__, "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
