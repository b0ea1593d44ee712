"""Processes of their own that start at once: forks of one that has imported torch, and done nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

SERVER = """
import json, os, sys, tempfile, traceback
import torch, torch._dynamo, torch._inductor.compile_fx
answers = os.dup(1)
for line in sys.stdin:
    code, sys.argv, path = json.loads(line)
    printed, said = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    child = os.fork()
    if child == 0:
        os.dup2(printed.fileno(), 1), os.dup2(said.fileno(), 2)
        sys.path[:0] = path
        failed = 0
        try:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        except BaseException:
            failed = 1
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(failed)
    _, status = os.waitpid(child, 0)
    printed.seek(0), said.seek(0)
    os.write(answers, (json.dumps([status, printed.read(), said.read()]) + "\\n").encode())
"""


class Forks:
    """Outside the repository: only what is installed can be imported, unless a path is given."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", env=environment
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.communicate()

    def run(self, code: str, *arguments: str, path: Sequence[str] = ()) -> str:
        """What the code prints. Fails with what it says where it fails."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([code, ["-c", *arguments], list(path)]) + "\n")
        self.process.stdin.flush()
        status, printed, said = json.loads(self.process.stdout.readline())
        assert status == 0, said
        return printed
