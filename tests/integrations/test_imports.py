"""What te_dynamo imports, and when; and scripts that run in FP8 without importing it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

OTHERS = "{'transformers', 'accelerate', 'peft', 'safetensors'}"


def test_te_dynamo_imports_none_of_them(forks):
    code = f"""
import sys, torch, te_dynamo
from te_dynamo.backend import te_fp8
te_dynamo.scale_state, te_dynamo.explain, te_dynamo.weights_changed
model = torch.nn.Linear(16, 16)
torch.compile(model, backend="te_fp8")(torch.ones(16, 16))
found = {OTHERS} & set(sys.modules)
assert not found, found
"""
    forks.run(code, generates=True)


def test_without_them_te_dynamo_works_and_an_integration_says_what_is_missing(forks):
    code = f"""
import sys
for name in {OTHERS}:
    sys.modules[name] = None  # as if it were not installed
import torch, te_dynamo
import te_dynamo.backend
for name in ("accelerate", "transformers"):
    try:
        __import__("te_dynamo.integrations." + name)
    except ImportError as error:
        assert name in str(error) or "accelerate" in str(error), error
    else:
        raise AssertionError(name)
try:
    te_dynamo.compile_config()
except ImportError as error:
    assert "transformers" in str(error)
else:
    raise AssertionError
"""
    forks.run(code)


SCRIPT = """
import json, os, sys, torch
from accelerate import Accelerator
from te_dynamo import backend, runtime
import neighbour
runtime.compile_inductor = runtime.compile_without_codegen
graphs = []
with backend.observing(lambda gm, sites, options: graphs.append([len(sites.taken()), str(options.recipe)])):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(neighbour.model())(torch.ones(16, 16))
print(json.dumps({"graphs": graphs, "arguments": sys.argv[1:], "name": __name__}))
"""
NEIGHBOUR = """
import torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)
    def forward(self, x):
        return self.linear(x).relu()
model = Model
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path / "train.py"


def main(forks, *arguments: str):
    return forks.process_of("import sys\nfrom te_dynamo.__main__ import main\nmain(sys.argv[1:])", *arguments)


def test_run_runs_a_script_as_it_is(hf_forks, script):
    printed, said = main(hf_forks, "run", "--recipe", "rowwise", str(script), "--epochs", "3")
    result = json.loads(printed)
    assert result["arguments"] == ["--epochs", "3"] and result["name"] == "__main__"
    ((taken, recipe),) = result["graphs"]
    assert taken == 1 and "Rowwise" in recipe
    assert "nothing was compiled" not in said


def test_run_says_if_nothing_was_compiled(hf_forks, tmp_path):
    (tmp_path / "train.py").write_text("import torch; torch.nn.Linear(2, 2)(torch.ones(2))")
    assert "nothing was compiled" in main(hf_forks, "run", str(tmp_path / "train.py"))[1]


def test_run_names_a_script_that_is_not_there():
    from te_dynamo.__main__ import main

    with pytest.raises(FileNotFoundError, match="no script 'absent.py'"):
        main(["run", "absent.py"])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["launch -m te_dynamo run", "named"])
def test_accelerate_launch(way, script, tmp_path):
    """The command line itself, with the processes that it launches."""
    if way == "named":
        script.write_text("import te_dynamo.integrations.accelerate\n" + SCRIPT)
        command = ["-m", "te_dynamo", "accelerate", "launch", "--cpu", "--num_processes", "1", "--dynamo_backend", "te_fp8", str(script)]
    else:
        command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "te_dynamo", "run", str(script)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["graphs"][0][0] == 1
