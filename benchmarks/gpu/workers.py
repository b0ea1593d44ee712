"""The command's side of `worker.py`: starts processes, sends requests, and finds out why one does not answer."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.reasons import Failed

ROOT = Path(__file__).resolve().parents[2]
THREADS = 4  # Inductor's compile threads per process: several processes compile at once


class Worker:
    """The process of a case or a sweep. A context manager, which ends it."""

    def __init__(self, name: str, device: torch.device, tiny: bool) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.worker", name, "--device", str(device)]
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        env.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(THREADS))
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in __exit__)
        self.process = subprocess.Popen(
            command + ["--tiny"] * tiny, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.answers: queue.Queue[str] = queue.Queue()
        self.given_up: str | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                with contextlib.suppress(OSError):  # unwritten requests to a process that is gone
                    stream.close()

    def ask(self, method: str, timeout: float = 60.0, **arguments: Any) -> Any:
        """Calls a method in the process. Raises Failed, with the reason, if no value comes back."""
        assert self.process.stdin is not None
        if self.given_up is not None:
            raise Failed(self.given_up)
        try:
            print(json.dumps([method, arguments]), file=self.process.stdin, flush=True)
            line = self.answers.get(timeout=timeout)
        except OSError:
            line = ""
        except queue.Empty:
            self.process.kill()
            self.given_up = f"took longer than {timeout:.0f} s to {method}"
            raise Failed(self.given_up) from None
        if not line:
            self.given_up = self._how_it_died()
            raise Failed(self.given_up)
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["value"]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def _how_it_died(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
        return f"its process ended with {code}: {last}"
