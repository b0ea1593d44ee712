"""Runs unchanged scripts that use Accelerate or the Trainer in FP8, and Accelerate's own commands so that they know the name "te_fp8".

accelerate launch -m te_dynamo run train.py                          # `run` comes before the script
python -m te_dynamo accelerate launch --dynamo_backend te_fp8 train.py
"""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

INTEGRATION = "te_dynamo.integrations.accelerate"  # once it is imported, Accelerate accepts the name


def run(script: str, arguments: Sequence[str]) -> None:
    """Runs a script like `python script arguments`, with te_fp8 as the backend of each Accelerator that names none.

    Raises FileNotFoundError if there is no such script, ImportError without Accelerate. Warns if nothing was compiled in the end.
    """
    if not Path(script).is_file():
        raise FileNotFoundError(f"te_fp8: there is no script {script!r}")
    import_module(INTEGRATION)
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "TE_FP8"  # `accelerate launch` has set it to NO
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        if ended.code in (None, 0):
            _warn_if_nothing_was_compiled(script)
        raise
    _warn_if_nothing_was_compiled(script)


def _warn_if_nothing_was_compiled(script: str) -> None:
    if "te_dynamo.backend" not in sys.modules:  # torch imports it for the first graph
        warnings.warn(
            f"te_fp8: nothing was compiled: {script} prepares no model with Accelerate or the Trainer, or names another backend. "
            "Remedy: model.compile(backend='te_fp8') in the script.",
            stacklevel=3,
        )


def accelerate(arguments: Sequence[str]) -> None:
    """Runs `accelerate arguments`. It launches a separate process, which must import `te_dynamo.integrations.accelerate` itself."""
    from accelerate.commands.accelerate_cli import main
    from accelerate.commands.config.config_utils import DYNAMO_BACKENDS

    import_module(INTEGRATION)
    DYNAMO_BACKENDS.append("TE_FP8")  # the choices of --dynamo_backend
    sys.argv = ["accelerate", *arguments]
    main()
