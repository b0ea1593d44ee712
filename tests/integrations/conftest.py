"""Processes that start with Hugging Face's libraries imported, and Accelerate in the state of a fresh process.

peft, which the Trainer imports if it is installed, imports Transformer Engine if that is installed. Here that is NVIDIA's Python package
without its libraries, and importing it fails, so it is hidden from peft.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from tests.forks import Forks

TE = "transformer_engine"
with pytest.MonkeyPatch.context() as patch:
    if TE not in sys.modules:
        patch.setitem(sys.modules, TE, None)
    import transformers.trainer  # noqa: F401


@pytest.fixture(scope="session")
def hf_forks() -> Iterator[Forks]:
    with Forks(["transformers.models.llama.modeling_llama", "te_dynamo.integrations.transformers"], hidden=[TE]) as made:
        yield made


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Resets Dynamo and Accelerate, whose state is global, so that they do not remember the previous test."""
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    torch._dynamo.reset()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
