"""No S x S tensor on a CPU: the peak memory of attention in forward and backward, with 8 heads of 64 features in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from te_dynamo.backend import observing, te_fp8
from te_dynamo.sites import Site
from te_dynamo.state import STATE

HEADS, SIZE = 8, 64


@pytest.fixture(autouse=True)
def fresh(no_codegen: None) -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with STATE.set_aside():
        yield


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SIZE**-0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


def peak_of(step: Callable[[], object]) -> int:
    """The peak bytes that `step` allocates, not counting those from before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def peak(length: int, attention: str) -> int:
    call, found = torch.compile(by_hand, backend=te_fp8, options={"attention": attention}, dynamic=True), list[Site]()

    def step(length: int) -> Callable[[], object]:
        q, k, v = (torch.randn(1, HEADS, length, SIZE, requires_grad=True) for _ in range(3))
        return lambda: torch.autograd.grad(call(q, k, v).sum(), (q, k, v))

    with observing(lambda gm, sites, _: found.extend(sites.taken())):
        step(128)()  # compiles
    assert [site.detail["precision"] for site in found] == ["high" if attention == "high_precision" else "fp8"]
    return peak_of(step(length))


@pytest.mark.parametrize(
    ("length", "attention"),
    [
        (4096, "high_precision"),
        pytest.param(8192, "high_precision", marks=pytest.mark.slow),
        pytest.param(4096, "fp8", marks=pytest.mark.slow),
        pytest.param(4096, "fp8_both", marks=pytest.mark.slow),
    ],
)
def test_an_eighth_of_the_scores_memory(length, attention):
    scores = 2 * HEADS * length**2 * 4  # at least: the probabilities that are kept for backward, and their gradient
    assert peak(length, attention) < scores / 8


def test_scores_in_memory_are_seen():
    """The measurement sees the scores that attention written out by hand keeps in memory."""
    length = 512
    q, k, v = (torch.randn(1, HEADS, length, SIZE, requires_grad=True) for _ in range(3))
    assert peak_of(lambda: torch.autograd.grad(by_hand(q, k, v).sum(), (q, k, v))) > 2 * HEADS * length**2 * 4
