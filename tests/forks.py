"""Separate processes that start at once: forks of one that has imported torch and, if needed, compiled a linear."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

SERVER = """
import importlib, json, os, sys, tempfile, traceback
import torch, torch._dynamo, torch._inductor.compile_fx
from torch._inductor.cpu_vec_isa import pick_vec_isa
pick_vec_isa()  # tries the processor's instructions in a process of its own, for each process that compiles C++
imports, hidden = map(json.loads, sys.argv[1:])
sys.modules |= dict.fromkeys(hidden)
for name in imports:
    importlib.import_module(name)
answers, ready = os.dup(1), False
for line in sys.stdin:
    code, sys.argv, path, generates = json.loads(line)
    if generates and not ready:
        with torch.no_grad():  # autograd's engine could not be used in a fork of a process that has used it
            torch.compile(torch.nn.Linear(4, 4))(torch.ones(2, 4).relu())
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        ready = True
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
    """Runs code outside of the repository: only what is installed can be imported, unless a path is given.

    imports: modules that are already imported in each process, besides torch; hidden: packages that it cannot import; environment:
    variables that are set in it.
    """

    def __init__(self, imports: Sequence[str] = (), hidden: Sequence[str] = (), **environment: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"} | environment  # a fork has no threads
        command = [sys.executable, "-c", SERVER, json.dumps(imports), json.dumps(hidden)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", env=environment)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.communicate()

    def run(self, code: str, *arguments: str, path: Sequence[str] = (), generates: bool = False) -> str:
        """What the code prints. If it fails, this fails with its stderr.

        generates: whether the code makes Inductor generate code. The setup for that, which takes seconds, is then done before the fork.
        """
        return self.process_of(code, *arguments, path=path, generates=generates)[0]

    def process_of(
        self, code: str, *arguments: str, path: Sequence[str] = (), generates: bool = False, dies: bool = False
    ) -> tuple[str, str]:
        """What the code prints on stdout and stderr. dies: it must be killed (SIGKILL) rather than end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([code, ["-c", *arguments], list(path), generates]) + "\n")
        self.process.stdin.flush()
        status, printed, said = json.loads(self.process.stdout.readline())
        assert status == (signal.SIGKILL if dies else 0), said
        return printed, said


def ranks(size: int, run: Callable[..., None], *given: Any) -> None:
    """Calls `run(rank, *given)` in `size` forks of this process, which is itself one of `Forks`. If one fails, the others, which may wait
    for it, are killed."""
    processes = set()
    for rank in range(size):
        process = os.fork()
        if process:
            processes.add(process)
            continue
        try:
            run(rank, *given)
        except BaseException:
            print(f"rank {rank}:", traceback.format_exc(), file=sys.stderr, sep="\n", flush=True)
            os._exit(1)
        os._exit(0)
    failed = False
    while processes:
        process, status = os.wait()
        processes.discard(process)
        if status and not failed:
            failed = True
            for other in processes:
                os.kill(other, signal.SIGKILL)
    assert not failed
