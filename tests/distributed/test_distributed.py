"""Data parallel on two processes: DDP and FSDP2, gloo, a CPU. What the ranks do and assert is in `ranks.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def run(folder: Path, *cases: str, ranks: int = 2) -> None:
    """Runs cases on so many ranks, one after the other, up to the first that fails: then with what it printed."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "tests.distributed.ranks", str(folder), *cases]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]


def test_on_two_ranks_and_a_sharded_checkpoint_on_one(tmp_path):
    """All that two ranks run in one launch: to start a process takes longer than most cases do. The checkpoint resumes on one rank too."""
    on_two = ("ddp", "collectives", "apart", "fp8_attention", "fsdp", "fsdp_inference", "tensor_parallel", "fsdp_save", "fsdp_resume")
    run(tmp_path, *on_two)
    run(tmp_path, "fsdp_resume", ranks=1)
