"""te_fp8 with like_te=True against Transformer Engine's own modules, on the device: same weights, data and recipe, many steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_dynamo.state import FORWARD, GRADIENT, STATE
from tests.gpu.device import DEVICE
from tests.gpu.helpers import compiled, gradients, random
from tests.numerics import sqnr
from tests.slots import history_of, index_of

pytestmark = pytest.mark.gpu
TOKENS, K, N, STEPS, HISTORY = 128, 512, 256, 10, 6
SLOTS = (("input", FORWARD, "scaling_fwd", 0), ("weight", FORWARD, "scaling_fwd", 1), ("grad_output", GRADIENT, "scaling_bwd", 0))


@pytest.fixture(params=["native", "te"])
def ours(request: pytest.FixtureRequest, te: Any, small_sites_too: None) -> str:
    return request.param


def recipe_named(name: str) -> Any:
    from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling

    return DelayedScaling(amax_history_len=HISTORY) if name == "delayed" else Float8CurrentScaling()


def both(te: Any, mine: nn.Module, theirs: nn.Module, names: dict[str, str], recipe: Any, provider: str) -> Any:
    """Yields, for each step, (ours, TE's) of the output and each gradient, by our names. names: ours to TE's."""
    their_parameters = dict(theirs.named_parameters())
    assert names.values() == their_parameters.keys() or set(names.values()) == set(their_parameters)
    with torch.no_grad():
        for name, parameter in mine.named_parameters():
            their_parameters[names[name]].copy_(parameter)
    run = compiled(mine, provider=provider, recipe=recipe, like_te=True)

    def their_run(x: Tensor) -> Tensor:
        with te.autocast(enabled=True, recipe=recipe):
            return theirs(x)

    for step in range(STEPS):
        x, dy = random(TOKENS, K, seed=step) * 10.0 ** (step % 3 - 1), random(TOKENS, N, seed=100 + step) * 10.0 ** (step % 2)
        a, b = gradients(mine, run, x, dy), gradients(theirs, their_run, x, dy)
        yield step, {name: (value, b[names.get(name, name)]) for name, value in a.items()}


def states(weight: Tensor, theirs: Any) -> dict[str, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """(scale, history) of each tensor of a linear, ours and TE's, by role."""
    STATE.roll()  # TE's roll is at the end of a forward and of a backward, ours at the next forward
    arena, found = STATE.arena(weight.device), {}
    for role, direction, meta, column in SLOTS:
        index, state = index_of(weight, role), theirs.fp8_meta[meta]
        here = arena.scale[direction, index], history_of(arena, direction, index)
        found[role] = here, (state.scale[column], state.amax_history[:, column])
    return found


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_a_linear_is_te_s(te, ours, recipe, bias):
    """The operands are the same; the GEMMs may accumulate in another order."""
    torch.manual_seed(0)
    mine = nn.Linear(K, N, bias=bias, device=DEVICE, dtype=torch.bfloat16)
    theirs = te.Linear(K, N, bias=bias, params_dtype=torch.bfloat16, device=DEVICE)
    names = {name: name for name, _ in mine.named_parameters()}
    for step, results in both(te, mine, theirs, names, recipe_named(recipe), ours):
        for name, (a, b) in results.items():
            assert sqnr(b, a) > 38, (step, name)
        if recipe == "delayed":
            for role, ((scale, history), (their_scale, their_history)) in states(mine.weight, theirs).items():
                assert torch.equal(scale, their_scale), (step, role, scale, their_scale)
                assert torch.equal(history, their_history), (step, role, history, their_history)


@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_a_norm_and_a_linear_are_te_s(te, ours, recipe, norm):
    """TE's norm and ours may differ in the last bit of bf16, which changes one cast in thirty by a step of E4M3."""
    torch.manual_seed(0)
    first = getattr(nn, norm)(K, eps=1e-5)
    with torch.no_grad():
        for p in first.parameters():
            p.add_(0.1 * torch.randn_like(p))
    mine = nn.Sequential(first, nn.Linear(K, N)).to(DEVICE, torch.bfloat16)
    theirs = te.LayerNormLinear(K, N, eps=1e-5, normalization=norm, params_dtype=torch.bfloat16, device=DEVICE)
    names = {"0.weight": "layer_norm_weight", "0.bias": "layer_norm_bias", "1.weight": "weight", "1.bias": "bias"}
    names = {a: b for a, b in names.items() if a in dict(mine.named_parameters())}
    for step, results in both(te, mine, theirs, names, recipe_named(recipe), ours):
        for name, (a, b) in results.items():
            assert sqnr(b, a) > (30 if name in ("y", "dx", "1.weight", "1.bias") else 25), (step, name)
        if recipe == "delayed":
            for role, ((scale, history), (their_scale, their_history)) in states(mine[1].weight, theirs).items():
                tolerance = 1e-2 if role == "input" else 0.0
                torch.testing.assert_close(scale, their_scale, rtol=tolerance, atol=0, msg=f"step {step}: scale of {role}")
                torch.testing.assert_close(history, their_history, rtol=tolerance, atol=0, msg=f"step {step}: history of {role}")
