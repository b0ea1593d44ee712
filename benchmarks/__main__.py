"""Prints the cost of te_dynamo, as ratios to Inductor in the same run.

    python -m benchmarks [--only SECTION]... [--repeat N] [--output FOLDER [--name NAME]]
    python -m benchmarks --gpu [...]    # speed on a GPU, see `python -m benchmarks --gpu --help`

compile: CPU time of the first forward and backward of 32 and 80 layers of a Llama and 32 of a Mixtral, cold and in a second process (caches
         warm); of the larger ones one repetition.
call:    a training step of 20 tiny linears (host overhead), and of a small Llama, on one CPU thread.
saved:   bytes that linears keep allocated for backward.
state:   the cost of delayed over current scaling: kernels and collectives of an update, time of a step with 200 sites.
cpu:     a training step, a forward in eval, one token through 24 linears, and the host time of a tiny model (`benchmarks/cpu.py`).
lab:     predicted training steps on a GPU that is not present (`benchmarks/lab.py`); also writes lab-h100.json and lab-h100.md.
ptxas:   Triton kernels that spill registers (`benchmarks/ptxas.py`).

Times are medians of N repetitions, with their extremes; each measurement runs in its own process, and the sides of a ratio alternate. Only
`lab` predicts anything about a GPU. With --output the figures are written as JSON, Markdown and a picture, with versions and processor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, write

ROOT = Path(__file__).resolve().parent.parent
INDUCTOR: tuple[str, dict[str, Any]] = ("inductor", {})
DELAYED, CURRENT, SKIPPED = (("te_fp8", options) for options in ({"recipe": "delayed"}, {"recipe": "current"}, {"skip": ["*"]}))


def child(kind: str, backend: str, options: dict[str, Any] | None = None, cache: str | None = None) -> dict[str, float]:
    """One measurement in its own process, with an empty Inductor cache unless one is given."""
    return process("benchmarks.measure", kind, backend, json.dumps(options or {}), cache=cache)


def process(*module: str, cache: str | None = None) -> dict[str, Any]:
    """Runs a module, and returns the last line that it prints, parsed as JSON."""
    with tempfile.TemporaryDirectory() as fresh:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache or fresh, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", "-m", *module]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compile_rows(repeat: int) -> Iterator[Figure]:
    for model, layers, times, target in (("Llama", 32, repeat, 1.0), ("Llama", 80, 1, 1.0), ("Mixtral", 32, 1, 1.05)):
        ratios: dict[str, list[float]] = {"cold": [], "warm": []}
        for _ in range(times):
            with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
                for how in ratios:
                    inductor, fp8 = (
                        child("compile", backend, {"model": model, "layers": layers}, cache)["seconds"]
                        for backend, cache in (("inductor", a), ("te_fp8", b))
                    )
                    ratios[how].append(fp8 / inductor)
        yield Figure.of("compile", f"compile time, {layers} layers of a {model}, cold", ratios["cold"], target)
        yield Figure.of("compile", f"compile time, {layers} layers of a {model}, warm", ratios["warm"], 1.05)


def call_rows(repeat: int) -> Iterator[Figure]:
    cases = {"inductor": INDUCTOR, "skip": SKIPPED, "delayed": DELAYED, "current": CURRENT}
    runs = [{name: child("call", *case) for name, case in cases.items()} for _ in range(repeat)]

    def ratios(a: str, b: str, what: str) -> list[float]:
        return [run[a][what] / run[b][what] for run in runs]

    yield Figure.of("call", "host time per call, skip=['*'] to Inductor", ratios("skip", "inductor", "host_us"), 1.10)
    yield Figure.of("call", "host time per call, delayed to current", ratios("delayed", "current", "host_us"), 1.25)
    yield Figure.of("call", "host time per call, delayed to Inductor, 20 sites", ratios("delayed", "inductor", "host_us"))
    yield Figure.of("call", "step of a small Llama on a CPU, delayed to Inductor bf16", ratios("delayed", "inductor", "step_us"))


def saved_rows(repeat: int) -> Iterator[Figure]:
    inductor, fp8 = child("saved", "inductor")["bytes"], child("saved", "te_fp8")["bytes"]
    what = f"bytes saved for backward by linears ({fp8 / 1e6:.2f} MB against {inductor / 1e6:.2f} MB)"
    yield Figure("saved", what, fp8 / inductor, 0.55)


def state_rows(repeat: int) -> Iterator[Figure]:
    for how in ("whole", "layers"):
        few, many = (child("state", how, {"layers": n}) for n in (4, 32))
        for what in ("kernels", "collectives"):
            counts = f"{few[what]:.0f} for 4 layers, {many[what]:.0f} for 32"
            yield Figure("state", f"{what} of an update, {how} compiled: {counts}", many[what] / few[what], 1.0)
    runs = [(child("sites", *DELAYED), child("sites", *CURRENT)) for _ in range(repeat)]
    ratios = [a["step_us"] / b["step_us"] for a, b in runs]
    yield Figure.of("state", "a step with 200 sites, with state (delayed) to without (current)", ratios, 1.05)


# By what is measured: its description, and the targets by dtype of the model.
ON_A_CPU = {
    "training": ("a training step of a Llama (4 layers of 512, 1024 tokens)", {"torch.float32": 0.75, "torch.bfloat16": 1.25}),
    "evaluation": ("its forward in eval", {"torch.float32": 0.75, "torch.bfloat16": 1.15}),
    "decode": ("one token through 24 linears of 2048 x 2048", {"torch.float32": 1.0, "torch.bfloat16": 1.0}),
    "host": ("a training step of a tiny Llama (4 layers of 64, 64 tokens), one thread", {"torch.float32": 3.0, "torch.bfloat16": 3.0}),
}


def cpu_rows(repeat: int) -> Iterator[Figure]:
    for what, (says, targets) in ON_A_CPU.items():
        runs = [process("benchmarks.cpu", what) for _ in range(repeat)]
        for dtype, target in targets.items():
            found = [run[dtype] for run in runs]
            times = f"{found[0]['te_fp8']:.1f} ms against {found[0]['inductor']:.1f} ms"
            name = f"{says}, {dtype.removeprefix('torch.')} ({times})"
            yield Figure.of("cpu", name, [f["ratio"] for f in found], target)


def lab_rows(folder: Path | None) -> Iterator[Figure]:
    from benchmarks import lab

    found = lab.main(say=lambda _: None)
    for row in found["cases"]:
        target = None if row["target"] is None else 1 / row["target"]
        yield Figure("lab", f"predicted step of {row['case']} {row['shape']} on {found['device']}", 1 / row["speedup"], target)
    if folder is not None:
        lab.write(found, folder)


def ptxas_rows() -> Iterator[Figure]:
    from benchmarks.ptxas import CAPABILITIES
    from te_dynamo.lab.ptxas import unavailable

    if (reason := unavailable()) is not None:
        print(f"ptxas: {reason}", file=sys.stderr)
        return
    for capability in CAPABILITIES:
        name = ".".join(map(str, capability))
        rows = [r for launched in process("benchmarks.ptxas", name)[name].values() for r in launched]
        what = f"of {len(rows)} launches, Triton kernels that spill registers for compute capability {name}"
        yield Figure("ptxas", what, sum(r["spilled"] > 0 for r in rows), 0, unit="")


def main() -> None:
    if "--gpu" in sys.argv[1:]:
        from benchmarks.gpu import run

        return run.main([argument for argument in sys.argv[1:] if argument != "--gpu"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("saved", "state", "call", "compile", "cpu", "lab", "ptxas")
    parser.add_argument("--only", choices=names, action="append", help="a section; repeatable (default: all)")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of times (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the figures to files in this folder")
    parser.add_argument("--name", default="benchmarks", help="of these files (default: %(default)s)")
    chosen = parser.parse_args()
    sections: dict[str, Callable[[], Iterator[Figure]]] = {
        "saved": lambda: saved_rows(chosen.repeat),
        "state": lambda: state_rows(chosen.repeat),
        "call": lambda: call_rows(chosen.repeat),
        "compile": lambda: compile_rows(chosen.repeat),
        "cpu": lambda: cpu_rows(chosen.repeat),
        "lab": lambda: lab_rows(chosen.output),
        "ptxas": ptxas_rows,
    }
    found = []
    for name in chosen.only or names:
        for figure in sections[name]():
            found.append(figure)
            print(figure, flush=True)
            if chosen.output:  # the results so far: an interrupted run keeps them
                write(found, chosen.output, chosen.name)


if __name__ == "__main__":
    main()
