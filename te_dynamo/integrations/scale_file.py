"""Scale state as a safetensors file next to a checkpoint's weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

import te_dynamo
from te_dynamo.state.names import Model

NAME = "scale_state.safetensors"


def save_scales(model: Model, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the scale state of a model, with metadata strings. A model without state gets a file without tensors.

    The file is replaced atomically: a process that is killed leaves the previous file. Needs no other rank.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file(te_dynamo.scale_state(model).state_dict(), partial, dict(metadata) if metadata else None)  # {} and no tensors: a broken file
    os.replace(partial, path)


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a file that `save_scales` wrote."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def load_scales(model: Model, path: Path) -> None:
    """Loads a file's scale state into a model, before or after its first call.

    Raises RuntimeError, naming every entry, if the state does not fit the model; nothing is loaded then.
    """
    with safe_open(path, framework="pt") as file:
        entries = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    te_dynamo.scale_state(model).load_state_dict(entries)
