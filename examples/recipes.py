"""Trains the demo's model in bf16 and with each recipe: the same seed, the same data, one plot and one table.

    python examples/recipes.py [--steps N] [--only NAME ...] [--out FOLDER]

Writes `recipes.png`, and `recipes.md` with the table. Exits with 1 if a recipe other than NVFP4 ends more than 1% away.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from train_bytes import LAST, TOLERANCE, Setup, draw, draw_batches, python_help, train_with_progress

from te_dynamo.recipe import RECIPES

BASE = "bf16"
UNBOUNDED = "nvfp4"  # four bits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Setup.steps, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="recipes to run (default: all)")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for plot and table (default: %(default)s)")
    arguments = parser.parse_args()
    console, setup = Console(), Setup(steps=arguments.steps)
    batches = draw_batches(python_help(), setup)
    runs = {BASE: train_with_progress(console, BASE, batches, setup, "inductor")}
    for name in arguments.only:
        runs[name] = train_with_progress(console, name, batches, setup, "te_fp8", {"recipe": name})
    differences = {name: run.final_loss() / runs[BASE].final_loss() - 1 for name, run in runs.items()}
    header = ("recipe", f"loss, last {LAST} steps", f"against {BASE}", "seconds a step")
    rows = [(name, f"{run.final_loss():.4f}", f"{differences[name]:+.2%}", f"{run.step_time():.3f}") for name, run in runs.items()]
    table = Table(*header, title=f"{setup.steps} steps")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    draw(runs, arguments.out / "recipes.png")
    lines = [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]
    (arguments.out / "recipes.md").write_text("\n".join(lines) + "\n")
    console.print(f"Loss curves: {arguments.out / 'recipes.png'}")
    return int(any(abs(difference) > TOLERANCE for name, difference in differences.items() if name != UNBOUNDED))


if __name__ == "__main__":
    sys.exit(main())
