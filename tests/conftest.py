"""Fixtures for every test."""

from __future__ import annotations

import gc
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.forks import Forks


def pytest_collection_finish(session: pytest.Session) -> None:
    """Freezes what is imported by now, and what torch imports when it compiles for the first time: nearly a million objects, so that
    neither the garbage collector nor the search for a weight's modules scans them in each test."""
    if session.items and not session.config.option.collectonly:
        run = torch.compile(torch.nn.Linear(4, 4))
        run(torch.ones(4, 4)).sum().backward()
        torch._dynamo.reset()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def guards_are_not_timed() -> Iterator[None]:
    """Dynamo measures the guards of each graph that it compiles, for which it clears the processor's caches: 20 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._dynamo.guards.profile_guard_manager", lambda *_: 0.0, raising=False)
        yield


@pytest.fixture
def no_codegen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs graphs as AOTAutograd leaves them: for tests of plans, state and numbers that do not depend on generated code.

    A module requests it with `pytestmark = pytest.mark.usefixtures("no_codegen")`; its tests marked `inductor` are compiled by Inductor.
    """
    from te_dynamo.runtime import compile_without_codegen

    if request.node.get_closest_marker("inductor") is None:
        monkeypatch.setattr("te_dynamo.runtime.compile_inductor", compile_without_codegen)


@pytest.fixture(autouse=True)
def nothing_of_torch_s_is_left_changed() -> Iterator[None]:
    """Torch's global settings are the same after a test as before: else other tests would depend on the order."""

    def state() -> tuple[object, ...]:
        depth = torch.autocast_increment_nesting()
        torch.autocast_decrement_nesting()
        return depth, torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()

    before = state()
    yield
    assert state() == before


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs code in a separate process, without the seconds that importing torch takes."""
    with Forks() as made:
        yield made


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[[str], str]]:
    """Runs code with Triton's interpreter, and returns what it prints. A separate process: Triton reads the environment once."""
    pytest.importorskip("triton", reason="Triton is not installed")
    root = str(Path(__file__).resolve().parents[1])
    with Forks(["triton", "te_dynamo.backend"], TRITON_INTERPRET="1", PYTHONWARNINGS="ignore") as made:
        yield lambda code: made.run(textwrap.dedent(code), path=[root])
