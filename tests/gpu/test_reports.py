"""te_dynamo's reports, on the device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import te_dynamo
from tests.gpu.helpers import compiled, gradients, mlps, random

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a separate process, at the root of the repository, whether te_dynamo is installed or not."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": paths}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_explain(provider):
    model, x = mlps(), random(4, 64, 256)
    report = te_dynamo.explain(model, x, backward=True, options={"provider": provider})
    linears = [site for site in report.sites if "linear" in site.kind]
    assert len(linears) == 6 and {site.provider for site in linears} == {provider}
    assert report.graph_break_count == 0 and report.fp8_flop_fraction == 1.0
    assert provider in str(report)


def test_explain_says_why_a_small_linear_was_left():
    report = te_dynamo.explain(mlps(), random(4, 64, 256), backward=True)
    assert report.fp8_flop_fraction == 0
    assert any("too small to pay on this GPU" in (site.reason or "") for site in report.sites)


def test_dumped_scripts_run_by_themselves(small_sites_too, tmp_path):
    model, x = mlps(), random(4, 64, 256)
    gradients(model, compiled(model, provider="native", debug_dir=str(tmp_path)), x, x)
    (folder,) = tmp_path.iterdir()
    scripts = [path for stage in ("dynamo", "fuse", "lower", "lower_first") for path in folder.glob(f"*_{stage}.py")]
    assert len(scripts) >= 3
    for script in scripts:
        done = run(str(script))
        assert done.returncode == 0, f"{script.name}: {done.stderr}"


def test_verify(small_sites_too):
    model, x = mlps(dtype=torch.float32), random(4, 64, 256, dtype=torch.float32)
    found = gradients(model, compiled(model, provider="native", verify=True, strict=True), x, x)
    assert all(value.isfinite().all() for value in found.values())


def test_doctor():
    if importlib.util.find_spec("te_dynamo.__main__") is None:
        pytest.skip("this te_dynamo has no command of its own")
    if "doctor" not in run("-m", "te_dynamo", "--help").stdout:
        pytest.skip("te_dynamo's command has no `doctor`")
    done = run("-m", "te_dynamo", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
