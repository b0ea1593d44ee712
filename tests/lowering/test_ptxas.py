"""Every Triton kernel of the package fits into registers, on Hopper and on Blackwell, according to ptxas in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.gpu.workers import ROOT
from benchmarks.ptxas import CAPABILITIES, kernels
from te_dynamo.lab import ptxas


@pytest.mark.slow
@pytest.mark.skipif(ptxas.unavailable() is not None, reason=str(ptxas.unavailable()))
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_spills(capability):
    command = [sys.executable, "-m", "benchmarks.ptxas", ".".join(map(str, capability))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ((_, found),) = json.loads(done.stdout).items()
    used = [resources for rows in found.values() for resources in rows]
    assert {r["kernel"] for r in used} == kernels()  # a new one must be added to benchmarks/ptxas.py
    assert not [r for r in used if r["spilled"]]
    assert all(0 < r["registers"] <= 255 and r["shared"] <= 227 * 1024 for r in used)


def test_the_kernels_are_found():
    assert {"cast_transpose_kernel", "qkv_kernel", "roll_kernel", "transpose_kernel"} <= kernels()
