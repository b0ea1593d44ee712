"""The same training run twice, Inductor in bf16 and te_fp8 in FP8: does FP8 learn the same?

    python examples/demo.py [--steps N] [--quick] [--out FOLDER]

Prints what te_fp8 took and how both runs ended, draws both loss curves, and exits with 1 if the final losses differ by
more than 1%. It needs no GPU and downloads nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from train_bytes import Run, Setup, build_model, draw_batches, python_help, train

import te_dynamo

TOLERANCE = 0.01
LAST = 20


def main() -> int:
    arguments = parse_arguments()
    setup = Setup(steps=arguments.steps)
    if arguments.quick:
        setup = Setup(steps=min(arguments.steps, 30), hidden=128, layers=2, heads=2)
    console = Console()
    batches = draw_batches(python_help(), setup)
    parameters = sum(p.numel() for p in build_model(setup).parameters())
    console.print(f"A byte-level Llama of {parameters / 1e6:.1f} million parameters learns Python's help texts, {setup.steps} steps.")

    runs = [train_with_progress(console, setup, batches, backend) for backend in ("inductor", arguments.backend)]
    if arguments.backend == "te_fp8":
        print_sites(console, setup, batches[0])
    difference = runs[1].final_loss(LAST) / runs[0].final_loss(LAST) - 1
    print_losses(console, runs, difference)
    console.print(f"Loss curves: {draw(runs, arguments.out)}")
    return 0 if abs(difference) <= TOLERANCE else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smaller model and at most 30 steps: does it run at all?")
    parser.add_argument("--backend", default="te_fp8", help="what is compared with Inductor (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder of the picture (default: %(default)s)")
    return parser.parse_args()


def train_with_progress(console: Console, setup: Setup, batches: torch.Tensor, backend: str) -> Run:
    name, note = TextColumn("{task.description:>8}"), TextColumn("{task.fields[note]}")
    with Progress(name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note, console=console) as progress:
        task = progress.add_task(backend, total=setup.steps, note="compiling")
        return train(build_model(setup), batches, setup, backend, lambda loss: progress.update(task, advance=1, note=f"loss {loss:.3f}"))


def print_sites(console: Console, setup: Setup, tokens: torch.Tensor) -> None:
    """What te_fp8 did with each linear, norm and attention of the model."""
    with torch.autocast("cpu", torch.bfloat16):
        report = te_dynamo.explain(build_model(setup), input_ids=tokens, labels=tokens, backward=True)
    table = Table("site", "count", "provider", "layout", "why not", title="What te_fp8 took")
    counts = Counter((site.kind, site.provider, site.layout, site.reason) for site in report.sites)
    for (kind, provider, layout, reason), count in counts.items():
        table.add_row(kind, str(count), provider or "-", layout or "", reason or "")
    console.print(table)
    console.print(
        f"{report.fp8_flop_fraction:.1%} of the weight GEMMs' FLOPs ran in FP8 (the logits not counted); "
        f"graphs: {report.graph_count}, graph breaks: {report.graph_break_count}"
    )


def print_losses(console: Console, runs: list[Run], difference: float) -> None:
    table = Table("backend", "first loss", f"loss, last {LAST} steps", "seconds a step", title="How both runs ended")
    for run in runs:
        table.add_row(run.backend, f"{run.losses[0]:.4f}", f"{run.final_loss(LAST):.4f}", f"{run.step_time():.3f}")
    console.print(table)
    verdict = "within" if abs(difference) <= TOLERANCE else "NOT within"
    console.print(f"Difference of the final losses: {difference:+.2%}, {verdict} {TOLERANCE:.0%}")


def draw(runs: list[Run], folder: Path) -> Path:
    """Both loss curves, and below them their difference, as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 6), height_ratios=(3, 1), layout="constrained")
    for run, style in zip(runs, ("-", "--"), strict=True):
        top.plot(run.losses, style, label=run.backend)
    top.set_ylabel("loss (nats a byte)")
    top.legend()
    first, second = runs
    bottom.plot([(b / a - 1) * 100 for a, b in zip(first.losses, second.losses, strict=True)], color="black", linewidth=0.8)
    bottom.axhspan(-100 * TOLERANCE, 100 * TOLERANCE, alpha=0.15)
    bottom.set_ylabel("difference, %")
    bottom.set_xlabel("step")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    sys.exit(main())
