"""FP8 copies of weights that are kept, and who must notice that one of several weights has changed."""

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
    """Two linears of one input: they are one GEMM, and their copies one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) + self.second(x)


def unseen(p: nn.Parameter) -> None:
    """Writes a weight so that its version does not tell."""
    p.data.mul_(-3)


def by_hand(model: Pair, which: str) -> None:
    """`weights_changed` of a part of the model."""
    part = getattr(model, which)
    unseen(part.weight)
    te_dynamo.weights_changed(part)


def by_its_optimizer(model: Pair, which: str) -> None:
    """A step of an optimizer that has this weight alone; what it does to it leaves no trace."""
    weight = getattr(model, which).weight
    step_unseen(torch.optim.SGD([weight], lr=0.1), weight)


def in_the_last_group(model: Pair, which: str) -> None:
    """In the optimizer's first group of parameters is none of this model."""
    weight, foreign = getattr(model, which).weight, nn.Parameter(torch.zeros(1))
    step_unseen(torch.optim.SGD([{"params": [foreign]}, {"params": [weight], "lr": 0.2}], lr=0.1), weight)


def step_unseen(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> None:
    version = weight._version
    unseen(weight)
    optimizer.step()  # there are no gradients: it writes nothing
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
    """Which a kept copy has not: nothing is kept, and what is asked for changes no bit."""
    x, results, model = torch.randn(16, SIZE), [], Pair()
    for keep in (True, False):
        torch._dynamo.reset()
        te_dynamo.scale_state(model).reset()
        call = torch.compile(model, backend=te_fp8, options={"provider": "reference", "like_te": True, "keep_weights": keep})
        results.append([call(x).detach() for _ in range(3)])  # the first by a scale of 1
    assert all(map(torch.equal, *results))
