"""Kept FP8 copies of weights, and that a change of one of several weights is noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import te_dynamo
from te_dynamo.backend import te_fp8
from te_dynamo.state import STATE
from tests.numerics import sqnr

SIZE = 32


@pytest.fixture(autouse=True)
def fresh(no_codegen: None) -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with STATE.set_aside():
        yield


class Pair(nn.Module):
    """Two linears of one input: they are one GEMM, with one copy."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) + self.second(x)


def unseen(p: nn.Parameter) -> None:
    """Writes to a weight without a change of its version."""
    p.data.mul_(-3)


def by_hand(model: Pair, which: str) -> None:
    """Calls `weights_changed` for a part of the model."""
    part = getattr(model, which)
    unseen(part.weight)
    te_dynamo.weights_changed(part)


def by_its_optimizer(model: Pair, which: str) -> None:
    """A step of an optimizer with only this weight, which it changes without a new version."""
    weight = getattr(model, which).weight
    step_unseen(torch.optim.SGD([weight], lr=0.1), weight)


def in_the_last_group(model: Pair, which: str) -> None:
    """The optimizer's first parameter group has none of this model's parameters."""
    weight, foreign = getattr(model, which).weight, nn.Parameter(torch.zeros(1))
    step_unseen(torch.optim.SGD([{"params": [foreign]}, {"params": [weight], "lr": 0.2}], lr=0.1), weight)


def step_unseen(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> None:
    version = weight._version
    unseen(weight)
    optimizer.step()  # without gradients it writes nothing
    assert weight._version == version


@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("change", [by_hand, by_its_optimizer, in_the_last_group])
@pytest.mark.parametrize("trains", [True, False], ids=["training", "inference"])
def test_each_weight_of_a_gemm_counts(trains, change, which):
    model, x = Pair(), torch.randn(16, SIZE)
    call = torch.compile(model, backend=te_fp8, options={"provider": "reference", "recipe": "current", "keep_weights": True})
    with torch.set_grad_enabled(trains):
        for _ in range(2):
            assert sqnr(model(x), call(x)) > 22
        change(model, which)
        assert sqnr(model(x), call(x)) > 22


def scaled(weight: Tensor) -> None:
    weight.mul_(-0.5)


def normalized(weight: Tensor) -> None:
    weight.copy_(nn.functional.normalize(weight, dim=1))


@pytest.mark.parametrize("write", [scaled, normalized])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
def test_what_the_graph_writes_in_training_is_not_kept(keep: bool, write: Callable[[Tensor], Any]):
    class Writes(Pair):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                write(self.second.weight)
            return super().forward(x)

    reference, x = Writes(), torch.randn(16, SIZE)
    model = copy.deepcopy(reference)
    call = torch.compile(model, backend=te_fp8, options={"provider": "reference", "recipe": "current", "keep_weights": keep})
    for _ in range(3):
        expected, found = reference(x), call(x)
        assert sqnr(expected, found) > 22
        assert torch.equal(model.second.weight, reference.second.weight)
        for y in (expected, found):
            y.sum().backward()
        assert sqnr(reference.second.weight.grad, model.second.weight.grad) > 18


def test_like_te_a_weight_is_quantized_by_its_slot_s_scale():
    """A kept copy has another scale: so nothing is kept, and the option does not change a bit."""
    x, results, model = torch.randn(16, SIZE), [], Pair()
    for keep in (True, False):
        torch._dynamo.reset()
        te_dynamo.scale_state(model).reset()
        call = torch.compile(model, backend=te_fp8, options={"provider": "reference", "like_te": True, "keep_weights": keep})
        results.append([call(x).detach() for _ in range(3)])  # the first by a scale of 1
    assert all(map(torch.equal, *results))
