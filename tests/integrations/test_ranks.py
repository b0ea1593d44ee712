"""Accelerate's DDP and FSDP2 on two processes, gloo, a CPU. What the ranks do and assert is in `ranks.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.test_examples import EXAMPLES, SCRIPT

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def torchrun(*arguments: str, ranks: int = 2, folder: Path = ROOT) -> str:
    """Runs torchrun, and returns what all ranks print."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{EXAMPLES}", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_two_ranks_resume_bit_for_bit(case, tmp_path):
    assert torchrun("-m", "tests.integrations.ranks", str(tmp_path), case).count(f"{case}: right") == 2


@pytest.mark.parametrize("how", [[], ["--shard"]], ids=["ddp", "fsdp2"])
def test_the_example_resumes_on_another_number_of_ranks(how, tmp_path):
    (tmp_path / "quick.py").write_text(SCRIPT)
    example = str(EXAMPLES / "train_distributed.py")

    def losses(*arguments: str, ranks: int) -> list[str]:
        return torchrun("quick.py", example, *how, *arguments, ranks=ranks, folder=tmp_path).splitlines()

    whole = losses("--steps", "4", "--save-at", "2", ranks=2)
    resumed = losses("--steps", "4", "--resume", ranks=1)
    assert [line.partition(":")[0] for line in resumed] == ["step 3", "step 4"]
    assert all(abs(float(a.split()[-1]) - float(b.split()[-1])) < 2e-3 for a, b in zip(whole[2:], resumed, strict=True))
