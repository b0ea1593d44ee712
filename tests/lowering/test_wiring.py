"""Between a graph and a kernel: rows of a GEMM, the registry, autocast, fakes, and what may be differentiated or quantized ahead."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from te_dynamo.backend import observing, te_fp8
from te_dynamo.ir import op_named
from te_dynamo.ir.linear import GemmRows
from te_dynamo.lowering import registry
from te_dynamo.recipe import RECIPES, DelayedScaling, Float8CurrentScaling
from tests import calls
from tests.numerics import sqnr


@pytest.mark.parametrize("rows", [GemmRows((8, 2, 4), merged=True), GemmRows((6, 6, 6), merged=True, interleave=3)])
def test_members_of_a_gemm_get_their_own_rows(rows):
    parts = [torch.randn(n, 5) for n in rows.sizes]
    whole = rows.join(parts)
    assert whole.shape == (sum(rows.sizes), 5)
    for i, part in enumerate(parts):
        assert torch.equal(rows.rows(whole, i, len(parts)), part)
    x = torch.randn(7, 5)
    for y, part in zip(rows.split(x @ whole.t()), parts, strict=True):
        torch.testing.assert_close(y.flatten(1), x @ part.t())


def test_an_implementation_for_a_device_wins_over_one_for_all(monkeypatch):
    recipe, name = DelayedScaling(), "made up"
    for device in ("", "cuda"):
        monkeypatch.setitem(registry._IMPLEMENTATIONS, ("linears", name, DelayedScaling, device), registry.Implementation())
    on_cpu, on_cuda = (registry.find(op_named("linears"), name, recipe, torch.device(d)) for d in ("cpu", "cuda"))
    assert on_cpu is registry._IMPLEMENTATIONS["linears", name, DelayedScaling, ""]
    assert on_cuda is registry._IMPLEMENTATIONS["linears", name, DelayedScaling, "cuda"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_autocast_changes_nothing_inside_of_a_site(recipe):
    x, weight, dy = (torch.randn(*shape) for shape in ((32, 64), (48, 64), (32, 48)))

    def results() -> list[Tensor]:
        torch.manual_seed(0)  # nvfp4 rounds gradients at random
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        (y,) = calls.linears("reference", leaves[0], [leaves[1]], [None], recipe=RECIPES[recipe]())
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, results(), strict=True))


def described(values: Any) -> Any:
    return [described(v) for v in values] if isinstance(values, (list, tuple)) else (values.shape, values.stride(), values.dtype)


def test_a_fake_forward_is_that_of_what_is_wanted():
    """For every choice of gradients, in one process: what is saved depends on it."""
    x, weights = torch.randn(32, 64), [torch.randn(48, 64), torch.randn(16, 64)]
    call = calls.linears_call("native", [x, weights, [None, None]], recipe=Float8CurrentScaling())
    seen = set()
    for needs in itertools.product([True, False], repeat=3):
        arguments = (call.key, [x, *weights, None, None], None, 0, [*needs, False, False])
        real = torch.ops.te_dynamo.site_fwd(*arguments)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) if t is not None else None for t in arguments[1]]
            fake = torch.ops.te_dynamo.site_fwd(call.key, fakes, *arguments[2:])
        assert described(fake) == described(real), needs
        seen.add(str(described(real)))
    assert len(seen) > 1


@pytest.mark.parametrize("provider", ["native", "reference"])
def test_a_second_derivative_is_refused(provider):
    """It would be wrong: a quantization has no derivative."""
    x, weight = torch.randn(16, 32).requires_grad_(), torch.randn(16, 32).requires_grad_()
    (y,) = calls.linears(provider, x, [weight], [None], recipe=Float8CurrentScaling())
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


class FromItsLength(nn.Module):
    """The input's length determines which rows of its weight are used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.narrow(0, x.shape[0], 16))


def test_a_view_that_depends_on_more_than_the_weight_is_not_made_ahead(no_codegen):
    torch._dynamo.reset()
    model = FromItsLength()
    call, found = torch.compile(model, backend=te_fp8, fullgraph=True, dynamic=True, options={"recipe": "current"}), []
    with torch.no_grad(), observing(lambda gm, sites, _: found.extend(s.provider for s in sites)):
        for tokens in (16, 48, 32):
            x = torch.randn(tokens, 32)
            assert sqnr(model(x), call(x)) > 22
    assert found and set(found) == {"native"}


class Relative(nn.Module):
    """Its attention adds a learned bias, looked up by distance."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.qkv, self.table = nn.Linear(32, 96), nn.Parameter(torch.randn(15, 2))
        step = torch.arange(8)
        self.register_buffer("distance", step - step[:, None] + 7)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.distance].permute(2, 0, 1)[None] * 1.5
        if self.by_hand:  # so that the rule must build what is added to the scores
            return (((q @ k.mT + bias) * 0.3).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_bias_that_learns_keeps_attention_out_of_fp8(by_hand, no_codegen):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x, dy, found = Relative(by_hand), torch.randn(2, 8, 32), torch.randn(2, 8, 32), []
    call = torch.compile(model, backend=te_fp8, fullgraph=True, options={"attention": "fp8"})
    with (
        observing(lambda gm, sites, _: found.extend(s for s in sites if s.kind == "attention")),
        pytest.warns(UserWarning, match="attention='fp8', but high precision for 1 of 1 in this graph: .*no gradient to its mask"),
    ):
        call(x).backward(dy)
    assert "no gradient to its mask" in found[0].detail["fp8"]
    (expected,) = torch.autograd.grad(model(x), [model.table], dy)
    assert sqnr(expected, model.table.grad) > 15
