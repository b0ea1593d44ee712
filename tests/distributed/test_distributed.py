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


def run(case: str, folder: Path, ranks: int = 2) -> None:
    """Runs a case on so many ranks, and fails with what they printed."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "tests.distributed.ranks", case, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize("case", ["ddp", "collectives", "apart", "fsdp", "fsdp_inference", "tensor_parallel"])
def test_on_two_ranks(case, tmp_path):
    run(case, tmp_path)


def test_a_sharded_checkpoint_resumes_on_another_number_of_ranks(tmp_path):
    run("fsdp_save", tmp_path)
    for ranks in (2, 1):
        run("fsdp_resume", tmp_path, ranks)
