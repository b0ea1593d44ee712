"""Fixtures for the stand-in's own tests: TE on a device of compute capability 9.0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests import te_on_cpu


@pytest.fixture(scope="session")
def te() -> Any:
    reason = te_on_cpu.missing()
    if reason is not None:
        pytest.skip(reason)
    return te_on_cpu.install()


@pytest.fixture
def tex(te: Any) -> Iterator[Any]:
    """The stand-in; the test runs on a pretended Hopper."""
    import transformer_engine_torch

    with te_on_cpu.cuda_is_cpu():
        yield transformer_engine_torch
