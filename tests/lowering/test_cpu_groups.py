"""Experts on a CPU: the C++ of linears for each expert's rows, against a naive loop and against the definition."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_dynamo.lowering.call import Call, spec_of
from te_dynamo.lowering.compute import scales_of
from te_dynamo.lowering.cpu.grouped import CPUGroups
from te_dynamo.lowering.grouped import PerTensorGroups
from te_dynamo.lowering.per_tensor import defined_mm
from te_dynamo.lowering.quantized import Scale, Scales
from te_dynamo.lowering.registry import Implementation
from te_dynamo.recipe import DelayedScaling, Float8CurrentScaling, Recipe
from tests.numerics import sqnr

E, N, K = 4, 40, 56
NEEDS = [True, True, False]


def routed(tokens: int, k: int, where: str) -> list[int]:
    """The number of rows of each expert if tokens choose k experts each: by random scores, or all tokens the same ones."""
    scores = torch.rand(tokens, E) if where == "anywhere" else torch.arange(E).float().expand(tokens, E)
    return torch.bincount(scores.topk(k).indices.flatten(), minlength=E).tolist()


def made(sizes: list[int], after: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    tokens = sum(sizes) + after
    x, weight, grad = torch.randn(tokens, K).to(dtype), (torch.randn(E, N, K) * 0.1).to(dtype), torch.randn(tokens, N).to(dtype)
    x[sum(sizes) :], grad[sum(sizes) :] = torch.nan, 1e30
    return [x, weight, torch.tensor(sizes).cumsum(0).to(torch.int32)], grad


def run(
    implementation: Implementation, recipe: Recipe, inputs: list[Tensor], grad: Tensor, slots: list[float] | None = None
) -> list[Tensor]:
    """[y, dx, dw, the amaxes of both, in order]. slots: the scales of input, weight and gradient."""
    attributes = {"out_dtype": inputs[0].dtype, "in_features": K, "inputs_first": False}
    call = Call("grouped_linear", "native", "cpu", spec_of(tuple(inputs)), recipe=recipe.key, attributes=attributes, records=True)
    own = scales_of(call, None)
    known = None if slots is None else [Scale(torch.tensor(s), torch.tensor(s).reciprocal()) for s in slots]
    pairs = (None, None) if known is None else (known[:2], known[2:])
    forward, backward = (Scales(p, own.roles, own.casting, True) for p in pairs)
    done = implementation.forward(call, inputs, forward, NEEDS)
    back = implementation.backward(call, inputs, done.saved, [grad], backward, NEEDS)
    amaxes = torch.stack([a.amax() if a.numel() else a.sum() for a in [*done.amaxes, *back.amaxes]])
    return [done.outputs[0], back.gradients[0], back.gradients[1], amaxes]


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 40),
    k=st.integers(1, E),
    where=st.sampled_from(["anywhere", "to the same experts"]),
    after=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    slots=st.sampled_from([None, [64.0, 1000.0, 4000.0], [0.0, 1000.0, 0.0]]),
)
def test_what_the_definition_gives(tokens: int, k: int, where: str, after: int, dtype: torch.dtype, slots: list[float] | None) -> None:
    inputs, grad = made(routed(tokens, k, where), after, dtype)
    recipe = Float8CurrentScaling() if slots is None else DelayedScaling()
    ours, defined = (run(i, recipe, inputs, grad, slots) for i in (CPUGroups(), PerTensorGroups(defined_mm)))
    assert torch.equal(ours[3], defined[3])
    for found, expected in zip(ours[:3], defined[:3], strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert (not expected.any() and not found.any()) or sqnr(expected, found) > (90 if dtype == torch.float32 else 55)


@pytest.mark.parametrize("sizes", [[5, 0, 17, 1], [0, 0, 33, 0], [0, 0, 0, 0]], ids=str)
def test_against_a_loop(sizes: list[int]) -> None:
    inputs, grad = made(sizes, 2, torch.bfloat16)
    y, dx, dw, _ = run(CPUGroups(), Float8CurrentScaling(), inputs, grad)
    for e, (a, b) in enumerate(pairwise([0, *inputs[2].tolist()])):
        x, w, g = inputs[0][a:b].double(), inputs[1][e].double(), grad[a:b].double()
        if b > a:
            assert sqnr(x @ w.t(), y[a:b]) > 26 and sqnr(g @ w, dx[a:b]) > 22 and sqnr(g.t() @ x, dw[e]) > 22
        else:
            assert (dw[e] == 0).all()
    assert (y[sum(sizes) :] == 0).all() and (dx[sum(sizes) :] == 0).all()
