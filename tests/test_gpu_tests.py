"""The tests for a GPU, as far as a CPU can check them: they would run, and the names that they use exist."""

from __future__ import annotations

import ast
import pkgutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "tests" / "gpu").glob("*.py"))


def test_kernels_on_a_cpu_are_their_definitions(forks):
    """Each test of a kernel passes if the operator only has its definition: no argument or tolerance is impossible."""
    arguments = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-k", "not scale_state and not te_s_kernel"]
    paths = [str(ROOT / "tests" / "gpu" / name) for name in ("test_kernels.py", "test_tile_kernels.py")]
    printed = forks.run(
        f"""
import pytest, torch
from tests.gpu import device
device.DEVICE, device.no_device = torch.device("cpu"), lambda: None
print("exit", int(pytest.main({[*arguments, *paths]})))
""",
        path=[str(ROOT)],
    )
    assert printed.endswith("exit 0\n") and "passed" in printed and "skipped" not in printed, printed[-3000:]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_they_replace_is_there(path):
    """`monkeypatch.setattr("package.module.name", ...)`: else a moved name would only be noticed on a GPU."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr" and isinstance(node.args[0], ast.Constant):
            module, _, name = node.args[0].value.rpartition(".")
            assert hasattr(pkgutil.resolve_name(module), name), node.args[0].value
