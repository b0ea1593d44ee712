"""The command line: `python -m te_dynamo doctor`, `estimate module:factory`, `run script.py`, `accelerate launch ...`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from te_dynamo.lab.command import add as add_estimate


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 unless the command itself fails, whatever it finds."""
    parser = argparse.ArgumentParser(prog="python -m te_dynamo", description="te_dynamo's commands.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor", help="show devices and packages, who computes what, and what is missing; try kernels known to be miscompiled"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    add_estimate(commands)
    run = commands.add_parser("run", help="run a script that uses Accelerate or the Trainer, unchanged, in FP8")
    run.add_argument("--recipe", help="te_dynamo's option, for example current")
    run.add_argument("script")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's")
    run.set_defaults(run=_run)
    accelerate = commands.add_parser("accelerate", help="Accelerate's own commands, with te_fp8 as a --dynamo_backend", add_help=False)
    accelerate.add_argument("arguments", nargs=argparse.REMAINDER)
    accelerate.set_defaults(run=_accelerate)
    chosen = parser.parse_args(arguments)
    status: int = chosen.run(chosen)
    return status


def _doctor(chosen: argparse.Namespace) -> int:
    from te_dynamo.report import doctor  # imports torch

    with contextlib.redirect_stdout(sys.stderr):  # what libraries print
        found = doctor.diagnose()
    print(doctor.as_json(found) if chosen.json else doctor.as_text(found))
    return 0


def _run(chosen: argparse.Namespace) -> int:
    import te_dynamo
    from te_dynamo.integrations.run import run

    if chosen.recipe is not None:
        te_dynamo.set_options(recipe=chosen.recipe)
    run(chosen.script, chosen.arguments)
    return 0


def _accelerate(chosen: argparse.Namespace) -> int:
    from te_dynamo.integrations.run import accelerate

    accelerate(chosen.arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
