"""Fixtures for every test."""

from __future__ import annotations

import gc
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.forks import Forks


def pytest_collection_finish() -> None:
    """What is imported by now, half a million objects, stays: neither the garbage collector nor the search for a weight's modules
    looks at it again in each test."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_codegen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as AOTAutograd leaves them: for tests of plans, state and numbers, which generated code is not the subject of.

    A module asks for it by `pytestmark = pytest.mark.usefixtures("no_codegen")`; what is marked `inductor` there is compiled by it.
    """
    from te_dynamo.runtime import compile_without_codegen

    if request.node.get_closest_marker("inductor") is None:
        monkeypatch.setattr("te_dynamo.runtime.compile_inductor", compile_without_codegen)


@pytest.fixture(autouse=True)
def nothing_of_torch_s_is_left_changed() -> Iterator[None]:
    """What is global in torch is after a test as it was before: another test, in another order, would compute something else."""

    def state() -> tuple[object, ...]:
        depth = torch.autocast_increment_nesting()
        torch.autocast_decrement_nesting()
        return depth, torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()

    before = state()
    yield
    assert state() == before


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs code in a process of its own, without the seconds that an import of torch takes."""
    with Forks() as made:
        yield made


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[[str], str]]:
    """Runs code whose kernels Triton interprets, and gives what it prints. What Triton reads from the environment holds for a process."""
    pytest.importorskip("triton", reason="Triton is not installed")
    root = str(Path(__file__).resolve().parents[1])
    with Forks(["triton", "te_dynamo.backend"], TRITON_INTERPRET="1", PYTHONWARNINGS="ignore") as made:
        yield lambda code: made.run(textwrap.dedent(code), path=[root])
