"""Runs the programs of this folder as a user does, each in a separate process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.forks import Forks

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
import te_dynamo
from te_dynamo import backend, runtime
runtime.compile_inductor = runtime.compile_without_codegen
from tests.integrations.{name} import main
main(sys.argv[1], **json.loads(sys.argv[2]))
"""


def run(forks: Forks, name: str, folder: Path, *, dies: bool = False, **settings: Any) -> tuple[Any, str]:
    """The JSON in the last line that the program printed, and its stderr. dies: it kills itself."""
    given = json.dumps({"dies": dies, **settings})
    printed, said = forks.process_of(PROGRAM.format(name=name), str(folder), given, path=[str(ROOT)], dies=dies)
    return None if dies else json.loads(printed.splitlines()[-1]), said
