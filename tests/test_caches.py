"""torch's compile caches return te_dynamo's graphs in a second process, and never a stale one."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import pytest

import te_dynamo
from tests.forks import Forks

PACKAGE = Path(te_dynamo.__file__).parent
SCRIPT = """
import json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters
torch.compiler.config.cache_key_tag = sys.argv[2]  # entries of their own, in the folder where compiled C++ is, which takes half a minute
torch._inductor.config.fx_graph_cache = torch._functorch.config.enable_autograd_cache = True
from te_dynamo.backend import te_fp8

torch.manual_seed(0)
model = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
def run(x):
    return model[1](torch.relu(model[0](x)))
x = torch.randn(8, 64, requires_grad=True)
y = torch.compile(run, backend=te_fp8, options=json.loads(sys.argv[1]))(x)
y.sum().backward()
print(json.dumps({
    "aot_hit": counters["aot_autograd"]["autograd_cache_hit"], "aot_miss": counters["aot_autograd"]["autograd_cache_miss"],
    "bypass": counters["aot_autograd"]["autograd_cache_bypass"] + counters["inductor"]["fxgraph_cache_bypass"],
    "fx_miss": counters["inductor"]["fxgraph_cache_miss"], "grad": x.grad.norm().item(), "sum": x.grad.sum().item(),
}))
"""


def run(forks: Forks, cache: str, package_root: Path, options: dict | None = None) -> dict:
    printed = forks.run(SCRIPT, json.dumps(options or {}), cache, path=[str(package_root)], generates=True)
    return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def cache() -> str:
    """The name of an empty cache."""
    return str(uuid.uuid4())


@pytest.fixture(scope="module")
def first(forks: Forks, cache: str) -> dict:
    """The results of the first process that uses the cache."""
    return run(forks, cache, PACKAGE.parent)


def test_a_second_process_hits_and_other_options_miss(forks, cache, first):
    assert (first["aot_hit"], first["bypass"]) == (0, 0) and first["aot_miss"] == 1
    second = run(forks, cache, PACKAGE.parent)
    assert (second["aot_hit"], second["aot_miss"], second["bypass"], second["fx_miss"]) == (1, 0, 0, 0)
    assert second["grad"] == first["grad"]
    other = run(forks, cache, PACKAGE.parent, {"include_logits": True})
    assert (other["aot_hit"], other["aot_miss"]) == (0, 1)


def test_a_changed_backward_is_not_served_stale(forks, cache, tmp_path):
    root = tmp_path / "changed"
    shutil.copytree(PACKAGE, root / "te_dynamo", ignore=shutil.ignore_patterns("__pycache__"))
    source = root / "te_dynamo" / "lowering" / "per_tensor.py"
    text = source.read_text()
    assert text.count("return Backward([dx, dws, dbs], amaxes)") == 1
    source.write_text(text.replace("return Backward([dx, dws, dbs], amaxes)", "return Backward([2 * dx, dws, dbs], amaxes)"))
    by_definition = {"provider": "reference"}  # the provider with the changed backward
    before, changed = run(forks, cache, PACKAGE.parent, by_definition), run(forks, cache, root, by_definition)
    assert changed["aot_hit"] == 0
    assert changed["sum"] == pytest.approx(4 * before["sum"], rel=0.2)  # twice for each of the two layers
