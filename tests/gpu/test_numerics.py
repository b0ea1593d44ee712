"""Every provider's linears: against exact arithmetic, and against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import te_dynamo
from te_dynamo.ir import op_named
from te_dynamo.lowering import registry
from te_dynamo.recipe import named
from te_dynamo.state import STATE
from tests import calls
from tests.gpu.device import DEVICE
from tests.gpu.helpers import compiled, gradients, mlps, random, sites_of
from tests.numerics import sqnr

pytestmark = pytest.mark.gpu
SIZE = 1024
IN_THEORY = {"y": 28.5, "dx": 24.6, "weight": 24.6}  # dB, for E4M3 and E5M2 with Gaussian operands


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x, w, g = (random(SIZE, SIZE, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    exact = {"y": x.double() @ w.double().t(), "dx": g.double() @ w.double(), "weight": g.double().t() @ x.double()}
    return x, w, g, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_errors_are_those_of_the_formats(provider, dtype):
    x, w, g, exact = operands(dtype)
    x.requires_grad_()
    w.requires_grad_()
    y, _ = calls.linears(f"{provider}:{DEVICE.type}", x, [w], [None], records=True, calibrating=True)
    dx, dw = torch.autograd.grad(y, (x, w), g)
    for name, value in (("y", y), ("dx", dx), ("weight", dw)):
        assert abs(sqnr(exact[name], value) - IN_THEORY[name]) < 0.5, name


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_errors_of_what_is_compiled(provider, recipe):
    """The first step, which uses its own scales, and the steady graph."""
    x, w, g, exact = operands(torch.bfloat16)
    model = nn.Linear(SIZE, SIZE, bias=False, device=DEVICE, dtype=torch.bfloat16)
    model.weight.data.copy_(w)
    run = compiled(model, provider=provider, recipe=recipe)
    (site,) = sites_of(lambda: gradients(model, run, x, g))
    assert (site.provider, site.recipe) == (provider, recipe)
    for _ in range(2):
        found = gradients(model, run, x, g)
        for name, expected in IN_THEORY.items():
            assert abs(sqnr(exact[name], found[name]) - expected) < 0.5, name


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_a_linear_is_the_definition_s(provider, recipe):
    """The FP8 operands are the same; only a GEMM's accumulation differs. Scales and histories are bitwise equal."""
    found, states = {}, {}
    for who in dict.fromkeys((provider, "reference")):
        torch._dynamo.reset()
        with STATE.set_aside():
            torch.manual_seed(0)
            model = nn.Linear(512, 256, device=DEVICE, dtype=torch.bfloat16)
            run = compiled(model, provider=who, recipe=recipe)
            steps = [gradients(model, run, (1 + s) * random(128, 512, seed=s), random(128, 256, seed=50 + s)) for s in range(4)]
            found[who], states[who] = steps, te_dynamo.scale_state(model).state_dict()
    for step, (mine, definition) in enumerate(zip(found[provider], found["reference"], strict=True)):
        for name, value in definition.items():
            assert sqnr(value, mine[name]) > 35, (step, name)
    assert states[provider].keys() == states["reference"].keys() and bool(states["reference"]) == (recipe == "delayed")
    for key, value in states["reference"].items():
        assert torch.equal(states[provider][key], value), key


@pytest.mark.parametrize(("recipe", "tokens"), [("delayed", 100), ("current", 128)], ids=["delayed-padded", "current"])
def test_blocks_are_the_definition_s(provider, recipe, tokens):
    """Norms, shared inputs, merged GEMMs, biases, residuals: equal up to the effect of a last bit that differs before a cast."""
    found = {}
    for who in dict.fromkeys((provider, "reference")):
        torch._dynamo.reset()
        with STATE.set_aside():
            model = mlps()
            run = compiled(model, provider=who, recipe=recipe)
            found[who] = [gradients(model, run, random(1, tokens, 256, seed=s), random(1, tokens, 256, seed=50 + s)) for s in range(3)]
    for step, (mine, definition) in enumerate(zip(found[provider], found["reference"], strict=True)):
        for name, value in definition.items():
            assert sqnr(value, mine[name]) > 22, (step, name)


@pytest.mark.parametrize("recipe", ["rowwise", "block"])
def test_finer_scales_are_the_definition_s(small_sites_too, recipe):
    if (reason := registry.why_not(op_named("linears"), named(recipe), "native", DEVICE)) is not None:
        pytest.skip(reason)
    found = {}
    for who in ("native", "reference"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Linear(512, 256, device=DEVICE, dtype=torch.bfloat16)
        run = compiled(model, provider=who, recipe=recipe)
        found[who] = gradients(model, run, random(128, 512), random(128, 256, seed=2))
    for name, value in found["reference"].items():
        assert sqnr(value, found["native"][name]) > 35, name


@pytest.mark.parametrize("recipe", ["rowwise", "block"])
def test_finer_scales_by_definition(small_sites_too, recipe):
    x, w, g, exact = operands(torch.bfloat16)
    model = nn.Linear(SIZE, SIZE, bias=False, device=DEVICE, dtype=torch.bfloat16)
    model.weight.data.copy_(w)
    found = gradients(model, compiled(model, provider="reference", recipe=recipe), x, g)
    for name, value in exact.items():  # gradients are E4M3 here
        assert sqnr(value, found[name]) > 27, name


def test_inference(provider):
    model = mlps().eval()
    x = random(4, 40, 256)
    with torch.no_grad():
        exact = model.double()(x.double())
        model.bfloat16()
        run = compiled(model, provider=provider)
        first, second = run(x), run(x)
    assert torch.equal(first, second)
    assert sqnr(exact - x.double(), first.double() - x.double()) > 20
