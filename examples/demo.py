"""The same training run twice, with Inductor in bf16 and with te_fp8 in FP8: does FP8 learn the same?

    python examples/demo.py [--steps N] [--quick] [--out FOLDER]

Prints what te_fp8 took and how both runs ended, plots both loss curves, and exits with 1 if the final losses differ by more
than 1%. It needs no GPU and downloads nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from train_bytes import LAST, TOLERANCE, Run, Setup, build_model, draw, draw_batches, python_help, train_with_progress

import te_dynamo


def main() -> int:
    arguments = parse_arguments()
    setup = Setup(steps=arguments.steps)
    if arguments.quick:
        setup = Setup(steps=min(arguments.steps, 30), hidden=128, layers=2, heads=2)
    console = Console()
    batches = draw_batches(python_help(), setup)
    parameters = sum(p.numel() for p in build_model(setup).parameters())
    console.print(f"A byte-level Llama of {parameters / 1e6:.1f} million parameters learns Python's help texts, {setup.steps} steps.")

    runs = {backend: train_with_progress(console, backend, batches, setup, backend) for backend in ("inductor", "te_fp8")}
    print_sites(console, setup, batches[0])
    difference = runs["te_fp8"].final_loss() / runs["inductor"].final_loss() - 1
    print_losses(console, runs, difference)
    draw(runs, arguments.out / "loss.png")
    console.print(f"Loss curves: {arguments.out / 'loss.png'}")
    return 0 if abs(difference) <= TOLERANCE else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Setup.steps, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smaller model and at most 30 steps: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the plot (default: %(default)s)")
    return parser.parse_args()


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
        f"{report.fp8_flop_fraction:.1%} of the weight GEMMs' FLOPs ran in FP8 (not counting the logits); "
        f"graphs: {report.graph_count}, graph breaks: {report.graph_break_count}"
    )


def print_losses(console: Console, runs: dict[str, Run], difference: float) -> None:
    table = Table("backend", "first loss", f"loss, last {LAST} steps", "seconds a step", title="How both runs ended")
    for backend, run in runs.items():
        table.add_row(backend, f"{run.losses[0]:.4f}", f"{run.final_loss():.4f}", f"{run.step_time():.3f}")
    console.print(table)
    verdict = "within" if abs(difference) <= TOLERANCE else "NOT within"
    console.print(f"Difference of the final losses: {difference:+.2%}, {verdict} {TOLERANCE:.0%}")


if __name__ == "__main__":
    sys.exit(main())
