"""Data parallel on two processes: DDP and FSDP2, gloo, a CPU. What the ranks do and assert is in `ranks.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
RUN = """
import sys
from tests.distributed.ranks import main
from tests.forks import ranks
folder, *cases = sys.argv[1:]
ranks(2, main, 2, folder, cases)
ranks(1, main, 1, folder, ["fsdp_resume"])
"""


def test_on_two_ranks_and_a_sharded_checkpoint_on_one(forks, tmp_path):
    """All two-rank cases in one launch: starting a process takes longer than most cases. The checkpoint also resumes on one rank."""
    cases = ("ddp", "collectives", "apart", "fp8_attention", "fsdp", "fsdp_inference", "tensor_parallel", "fsdp_save", "fsdp_resume")
    forks.run(RUN, str(tmp_path), *cases, path=[str(ROOT)], generates=True)
