"""The name "te_fp8" works in a process that never imports te_dynamo. Needs the package installed, as `make setup` does."""

import subprocess
import sys
from importlib.metadata import entry_points, requires, version

import pytest

import te_dynamo

CALL = """
import sys, torch
assert not [name for name in sys.modules if name.startswith("te_dynamo")], "imported before anyone asked for it"
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
x = torch.randn(16, 32)
expected = model(x)
{compile}
y = compiled(x)
y.sum().backward()
assert "te_dynamo.backend" in sys.modules
assert all(torch.isfinite(p.grad).all() for p in model.parameters())
error = (y - expected).norm() / expected.norm()
assert 0 < error < 0.1, error
"""


def test_the_name_is_registered():
    (entry,) = entry_points(group="torch_dynamo_backends", name="te_fp8")
    assert entry.value == "te_dynamo.backend:te_fp8"
    assert version("te_dynamo") == te_dynamo.__version__
    assert any(need.replace(" ", "") in ("torch<2.16,>=2.11", "torch>=2.11,<2.16") for need in requires("te_dynamo"))


def test_torch_lists_the_name(forks):
    forks.run("import torch; assert 'te_fp8' in torch.compiler.list_backends()")


@pytest.mark.parametrize(
    "how",
    [
        'compiled = torch.compile(model, backend="te_fp8")',
        'compiled = torch.compile(model, backend="te_fp8", dynamic=True, fullgraph=True)',
        'compiled = torch.compile(model, backend="te_fp8", mode="max-autotune-no-cudagraphs")',
        'compiled = torch.compile(model, backend="te_fp8", options={"recipe": "current", "mode": "default"})',
        'compiled = torch.compile(lambda x: model(x), backend="te_fp8")',
    ],
)
def test_compile_by_name(how, forks):
    forks.run(CALL.format(compile=how), generates=True)


def test_module_compile_by_name(forks):
    # nn.Sequential itself is skipped by Dynamo when compiled in place, so the model has a forward of its own.
    how = """
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = model
    def forward(self, x):
        return self.inner(x)
compiled = Model()
compiled.compile(backend="te_fp8")
"""
    forks.run(CALL.format(compile=how), generates=True)


def test_an_unknown_option_reaches_the_user(forks):
    code = """
import torch
try:
    torch.compile(torch.nn.Linear(4, 4), backend="te_fp8", options={"recipie": "current"})(torch.randn(2, 4))
except Exception as error:
    assert "Did you mean 'recipe'" in str(error), error
else:
    raise AssertionError("accepted")
"""
    forks.run(code)


def test_importing_te_dynamo_is_cheap(tmp_path):
    code = (
        "import te_dynamo, sys; heavy = {'torch', 'transformers', 'accelerate', 'matplotlib', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy; te_dynamo.set_options(recipe='current')"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
