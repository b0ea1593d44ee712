"""Each example does what it says, in a tiny setting, as a script in a separate process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forks import Forks

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPT = """
import runpy, sys
import te_dynamo
from te_dynamo import backend, runtime
runtime.compile_inductor = runtime.compile_without_codegen
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(forks: Forks, name: str, *arguments: str) -> str:
    """Runs an example, and returns what it prints."""
    return forks.run(SCRIPT, str(EXAMPLES / name), *arguments, path=[str(EXAMPLES)])


def number(pattern: str, printed: str) -> float:
    found = re.search(pattern + r" ([\d.]+)", printed)
    assert found, printed
    return float(found.group(1))


SMALL = ("--length", "16", "--passages", "40")


def test_finetune_trainer(hf_forks, tmp_path):
    small = (*SMALL, "--out", str(tmp_path))
    assert 0 <= number("accuracy:", run(hf_forks, "finetune_trainer.py", *small, "--steps", "2")) <= 1
    assert (tmp_path / "checkpoint-2" / "scale_state.safetensors").exists()


@pytest.mark.slow
def test_finetune_trainer_resumes(hf_forks, tmp_path):
    small = (*SMALL, "--out", str(tmp_path))
    run(hf_forks, "finetune_trainer.py", *small, "--steps", "2")
    run(hf_forks, "finetune_trainer.py", *small, "--steps", "3", "--resume")
    assert (tmp_path / "checkpoint-3").exists()


def test_finetune_accelerate(hf_forks, tmp_path):
    small = (*SMALL, "--steps", "1", "--out", str(tmp_path))
    assert "epoch 1: loss" in run(hf_forks, "finetune_accelerate.py", *small, "--epochs", "1")
    assert (tmp_path / "epoch_1" / "scale_state.safetensors").exists()
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_finetune_accelerate_resumes(hf_forks, tmp_path):
    small = (*SMALL, "--steps", "1", "--out", str(tmp_path))
    run(hf_forks, "finetune_accelerate.py", *small, "--epochs", "1")
    resumed = run(hf_forks, "finetune_accelerate.py", *small, "--epochs", "2", "--resume")
    assert "epoch 2: loss" in resumed and "epoch 1" not in resumed


@pytest.mark.parametrize("kind", [[], pytest.param(["--dora"], marks=pytest.mark.slow)], ids=["lora", "dora"])
def test_lora_peft(kind, hf_forks, tmp_path):
    pytest.importorskip("peft", reason="needs peft: pip install -e .[peft]")
    printed = run(hf_forks, "lora_peft.py", "--steps", "3", "--out", str(tmp_path), *kind)
    exact, here = number("in float32:", printed), number("in FP8:", printed)
    assert abs(exact - here) < 0.05


@pytest.mark.slow
def test_lora_peft_resumes(hf_forks, tmp_path):
    """Bit for bit."""
    pytest.importorskip("peft", reason="needs peft: pip install -e .[peft]")
    whole = run(hf_forks, "lora_peft.py", "--steps", "4", "--out", str(tmp_path / "whole"))
    run(hf_forks, "lora_peft.py", "--steps", "2", "--out", str(tmp_path))
    resumed = run(hf_forks, "lora_peft.py", "--steps", "4", "--out", str(tmp_path), "--resume")
    assert "step 3:" in resumed and "step 2:" not in resumed
    assert number("step 4: loss", resumed) == number("step 4: loss", whole)
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "whole")]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


def test_generate(hf_forks):
    printed = run(hf_forks, "generate.py", "--tokens", "4", "--prompt", "ab")
    assert re.search(r"uncompiled, [\d.]+ tokens a second: 'ab", printed) and "te_fp8, " in printed


def test_moe(hf_forks):
    printed = run(hf_forks, "moe.py", "--steps", "3")
    assert "2 x mlp.experts.gate_up_proj: native" in printed and "2 x mlp.experts.down_proj: native" in printed
    assert "2 x mlp.gate: not in FP8: it chooses the experts" in printed and "graphs: 1" in printed
    first = [number(f"{name}: loss", printed) for name in ("float32", "te_fp8")]
    assert abs(first[0] - first[1]) < 0.02 < first[0] - number(r"te_fp8: loss [\d.]+ at first,", printed)


def test_vision_digits(hf_forks):
    printed = run(hf_forks, "vision_digits.py", "--epochs", "1")
    assert all(number(f"{name}: accuracy", printed) > 0.14 for name in ("float32", "te_fp8"))  # chance is 0.1; 360 images


@pytest.mark.slow
def test_vision_digits_is_as_accurate_as_in_float32(hf_forks):
    printed = run(hf_forks, "vision_digits.py")
    exact, here = (number(f"{name}: accuracy", printed) for name in ("float32", "te_fp8"))
    assert exact > 0.9 and abs(exact - here) < 0.03  # 360 images, with a sampling error of 0.011
