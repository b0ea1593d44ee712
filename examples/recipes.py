"""The demo's model once in bf16 and once with each recipe: the same seed, the same data, one picture and one table.

    python examples/recipes.py [--steps N] [--only NAME ...] [--out FOLDER]

Writes `recipes.png`, and `recipes.md` with what it prints. Exits with 1 if a recipe other than NVFP4 ends more than 1% away.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from train_bytes import Run, Setup, build_model, draw_batches, python_help, train

from te_dynamo.recipe import RECIPES

TOLERANCE = 0.01
EMULATED = "nvfp4"  # four bits: held to no bound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Setup(steps=150).steps, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="recipes to run (default: all)")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder of picture and table (default: %(default)s)")
    arguments = parser.parse_args()
    console, setup = Console(), Setup(steps=arguments.steps)
    batches = draw_batches(python_help(), setup)
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    runs: dict[str, Run] = {}
    with Progress(*columns, console=console) as progress:
        for name in ("bf16", *arguments.only):
            task = progress.add_task(name, total=setup.steps, note="compiling")
            backend, options = ("inductor", None) if name == "bf16" else ("te_fp8", {"recipe": name})
            runs[name] = train(
                build_model(setup),
                batches,
                setup,
                backend,
                lambda loss, t=task: progress.update(t, advance=1, note=f"loss {loss:.3f}"),
                options,
            )
    base = runs["bf16"].final_loss()
    differences = {name: run.final_loss() / base - 1 for name, run in runs.items()}
    table = Table("recipe", "loss, last 20 steps", "against bf16", "seconds a step", title=f"{setup.steps} steps")
    rows = [(n, f"{r.final_loss():.4f}", f"{differences[n]:+.2%}", f"{r.step_time():.3f}") for n, r in runs.items()]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = [
        "| recipe | loss, last 20 steps | against bf16 | seconds a step |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    (arguments.out / "recipes.md").write_text("\n".join(lines) + "\n")
    draw(runs, arguments.out / "recipes.png")
    console.print(f"Loss curves: {arguments.out / 'recipes.png'}")
    return int(any(abs(d) > TOLERANCE for name, d in differences.items() if name != EMULATED))


def draw(runs: dict[str, Run], path: Path) -> None:
    """Every loss curve, and below them how far each is from bf16's."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(9, 7), height_ratios=(2, 1), layout="constrained")
    for name, run in runs.items():
        top.plot(run.losses, label=name, linewidth=1.6 if name == "bf16" else 0.9)
        bottom.plot([(b / a - 1) * 100 for a, b in zip(runs["bf16"].losses, run.losses, strict=True)], linewidth=0.9)
    top.set_ylabel("loss (nats a byte)")
    top.legend()
    bottom.axhspan(-100 * TOLERANCE, 100 * TOLERANCE, alpha=0.15)
    bottom.set_ylabel("difference from bf16, %")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
