"""Skips each test if its device, or Transformer Engine, is missing; and gives it its own scale state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from te_dynamo.state import STATE
from tests.gpu.device import PROVIDERS, no_device, no_te


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    if (reason := no_device()) is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    torch.manual_seed(0)
    with STATE.set_aside():
        yield
    torch._dynamo.reset()


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest) -> str:
    """Each provider that is available here; nothing is left in bf16 for being small."""
    if request.param == "te" and (reason := no_te()) is not None:
        pytest.skip(reason)
    request.getfixturevalue("small_sites_too")
    return request.param


@pytest.fixture
def small_sites_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes sites of a test's size, which would not pay off."""
    monkeypatch.setattr("te_dynamo.lowering.cost.not_worth_it", lambda *_, **__: None)


@pytest.fixture
def te() -> Any:
    """`transformer_engine.pytorch`, the real one."""
    if (reason := no_te()) is not None:
        pytest.skip(reason)
    import transformer_engine.pytorch

    return transformer_engine.pytorch
