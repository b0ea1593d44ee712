"""Recipes as a user gives them: by name, by object, by pattern, TE's own, and changed during a run."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import te_dynamo
from te_dynamo.backend import observing, te_fp8
from te_dynamo.config import Options
from te_dynamo.recipe import (
    RECIPES,
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Float8RowwiseScaling,
    Format,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    from_key,
    named,
)
from te_dynamo.state import STATE
from tests.numerics import sqnr

SIZE = 64
pytestmark = pytest.mark.usefixtures("no_codegen")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.up, self.down = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, SIZE // 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with STATE.set_aside():
        yield
    torch._dynamo.reset()


def gradients(call: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of each weight."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.dim() == 2)]


def sites_of(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with observing(lambda gm, sites, chosen: found.update({s.path: s for s in sites if s.kind != "norm"})):
        torch.compile(model, backend=te_fp8, fullgraph=True, options=options)(x)
    return found


# The theoretical SQNR of one linear, minus the cost of a norm, a GELU and two linears in a row; the minimum over output and gradients.
LEAST = {"delayed": 20, "current": 20, "rowwise": 22, "block": 22, "mxfp8": 22, "nvfp4": 8}


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        *((name, "reference") for name in RECIPES),
        *(pytest.param(name, "auto", marks=() if name in ("delayed", "current") else pytest.mark.inductor) for name in RECIPES),
    ],
)
def test_each_recipe_trains_and_infers(name, provider):
    model, x = Net(), torch.randn(32, SIZE)
    call = torch.compile(model, backend=te_fp8, fullgraph=True, options={"recipe": name, "provider": provider})
    for _ in range(3):
        found = gradients(call, model, x)
    expected = gradients(model, model, x)
    assert all(LEAST[name] < sqnr(a, b) < LEAST[name] + 25 for a, b in zip(expected, found, strict=True))
    with torch.no_grad():
        again = call(x)
    assert LEAST[name] < sqnr(expected[0], again) < LEAST[name] + 25


@pytest.mark.parametrize("name", RECIPES)
def test_a_key_says_what_kernels_need(name):
    recipe = RECIPES[name]()
    assert named(name) == recipe == from_key(recipe.key)
    assert recipe.key == RECIPES[name]().key


def test_defaults_are_te_s():
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    theirs = pytest.importorskip("transformer_engine.common.recipe", reason="transformer_engine is not installed")
    ours = (DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling, NVFP4BlockScaling)
    for cls in ours:
        # Ours has a margin for growth, which costs nothing; TE's own recipe is taken as it is.
        assert named(getattr(theirs, cls.__name__)()) == (cls(margin=0) if cls is DelayedScaling else cls()), cls
    recipe = named(theirs.DelayedScaling(margin=1, amax_history_len=16, amax_compute_algo="most_recent", fp8_format=theirs.Format.E4M3))
    assert recipe == DelayedScaling(margin=1, amax_history_len=16, amax_compute_algo="most_recent", fp8_format="E4M3")
    with pytest.raises(ValueError, match="backward_override='high_precision'.*leave it at None"):
        named(theirs.Float8CurrentScaling(backward_override="high_precision"))
    with pytest.raises(ValueError, match="CustomRecipe has no counterpart here"):
        named(theirs.CustomRecipe(qfactory=lambda role: None))
    model = Net()
    call = torch.compile(model, backend=te_fp8, options={"recipe": theirs.DelayedScaling(amax_history_len=16)})
    call(torch.randn(8, SIZE)).sum().backward()
    assert te_dynamo.scale_state(model).state_dict()["up.input.amax_history"].shape == (16,)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DelayedScaling(amax_history_len=0), "amax_history_len=0.*1 or more"),
        (lambda: DelayedScaling(amax_compute_algo="mean"), "'max', 'most_recent' or a function"),
        (lambda: DelayedScaling(scaling_factor_compute_algo="x"), "None or a function"),
        (lambda: DelayedScaling(fp8_format="E5M2"), "HYBRID.*E5M2 in forward is not supported"),
        (lambda: Float8BlockScaling(x_block_scaling_dim=3), "1 x 128.*128 x 128"),
        (lambda: Float8BlockScaling(x_block_scaling_dim=2), "two operands with blocks of 128 x 128"),
        (lambda: NVFP4BlockScaling(fp8_format="HYBRID"), "E4M3, the format of its scales"),
        (lambda: Options(recipe="curent"), "Did you mean 'current'"),
        (lambda: Options(recipe={"*": "curent"}), "Did you mean 'current'"),
        (lambda: Options(recipe={3: "current"}), "fnmatch patterns"),
        (lambda: Options(recipe=3.5), "3.5 is no recipe"),
    ],
)
def test_what_is_not_allowed_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_formats_may_be_given_apart():
    assert DelayedScaling(fp8_format=("E4M3", "E5M2")).fp8_format is Format.HYBRID
    assert DelayedScaling(fp8_format=("E4M3", "E4M3")).fp8_format is Format.E4M3
    assert (Format.HYBRID.forward, Format.HYBRID.gradient) == (E4M3, E5M2)
    model, x = Net(), torch.randn(32, SIZE)
    errors = {}
    for fp8_format in ("HYBRID", "E4M3"):
        torch._dynamo.reset()
        call = torch.compile(model, backend=te_fp8, options={"recipe": Float8CurrentScaling(fp8_format=fp8_format)})
        errors[fp8_format] = sqnr(gradients(model, model, x)[1], gradients(call, model, x)[1])
    assert errors["E4M3"] > errors["HYBRID"] + 1.5  # one more mantissa bit


# --- by pattern


def test_each_site_has_the_recipe_of_the_first_pattern_that_matches():
    recipes = {"up": Float8RowwiseScaling(), "*own": None, "*": "delayed"}
    found = sites_of(Net(), torch.randn(8, SIZE), recipe=recipes)
    assert (found["up"].recipe, found["up"].provider) == ("rowwise", "native")
    assert found["down"].provider is None and found["down"].reason == "its recipe is None: high precision"
    assert Options(recipe={"a.*": "current"}).recipe_of("b.c") == DelayedScaling()  # without a matching pattern it is "auto"
    assert Options(recipe=None).recipe_of("b") is None
    assert Options(recipe="delayed", like_te=True).recipe_of("b") == DelayedScaling(like_te=True)


@pytest.mark.inductor
def test_linears_of_one_input_with_different_recipes_are_computed_apart():
    model, x = Attention(), torch.randn(2, 16, SIZE)
    recipes = {"q_proj": "current", "k_proj": "block", "*": "delayed"}
    found = sites_of(model, x, recipe=recipes)
    assert {path: s.recipe for path, s in found.items() if path} == {
        "q_proj": "current",
        "k_proj": "block",
        "v_proj": "delayed",
        "o_proj": "delayed",
    }
    assert not any("merged" in s.detail for s in found.values())
    call = torch.compile(model, backend=te_fp8, fullgraph=True, options={"recipe": recipes})
    for a, b in zip(gradients(model, model, x), gradients(call, model, x), strict=True):
        assert sqnr(a, b) > 15


def test_a_pattern_for_another_root_is_told_of():
    with pytest.warns(UserWarning, match=r"the pattern 'model.layers.0.up' matches no site"):
        sites_of(Net(), torch.randn(8, SIZE), recipe={"model.layers.0.up": "current", "*": "delayed"})


@pytest.mark.inductor
def test_no_fp8_at_all_is_inductor_s_and_no_reason_to_warn():
    model, x = Net(), torch.randn(8, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(torch.compile(model, backend=te_fp8, options={"recipe": None}), model, x)
    torch._dynamo.reset()
    expected = gradients(torch.compile(model), model, x)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", ["block", "mxfp8", "nvfp4"])
def test_a_provider_without_the_recipe(name):
    found = sites_of(Net(), torch.randn(8, SIZE), recipe=name)
    assert found["up"].provider == "reference" and "torch._scaled_mm has" in found["up"].detail["provider"]
    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"provider='native' does not have the recipe '{name}'.*Remedy"):
        sites_of(Net(), torch.randn(8, SIZE), recipe=name, provider="native")


def test_fp8_attention_is_the_recipe_s_to_say():
    x = torch.randn(2, 16, SIZE)
    found = sites_of(Attention(), x, recipe=DelayedScaling(fp8_dpa=True))
    attention = next(s for s in found.values() if s.kind == "attention")
    assert (attention.recipe, attention.detail["precision"]) == ("delayed", "fp8")
    torch._dynamo.reset()
    attention = next(s for s in sites_of(Attention(), x, recipe="block", attention="fp8").values() if s.kind == "attention")
    assert attention.detail["precision"] == "high" and "one scale a tensor" in attention.detail["fp8"]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="attention='fp8', but high precision for 1 of 1 in this graph: .*one scale a tensor"):
        sites_of(Attention(), x, recipe="block", attention="fp8", strict=True)
    torch._dynamo.reset()
    off = sites_of(Attention(), x, recipe=DelayedScaling(fp8_dpa=True), attention="high_precision")
    assert next(s for s in off.values() if s.kind == "attention").detail["precision"] == "high"


def test_fp8_mha_rounds_what_attention_gives_and_gets_back():
    model, x = Attention(), torch.randn(2, 16, SIZE)
    errors = []
    for recipe in (DelayedScaling(fp8_dpa=True), DelayedScaling(fp8_dpa=True, fp8_mha=True)):
        torch._dynamo.reset()
        call = torch.compile(model, backend=te_fp8, fullgraph=True, options={"recipe": recipe})
        errors.append([sqnr(a, b) for a, b in zip(gradients(model, model, x), gradients(call, model, x), strict=True)])
    assert all(found > 12 for found in errors[1])
    # o_proj rounds its input anyway, with the same scale. The additional rounding is of the O in S's gradient: the gradients of q
    # and k have more noise.
    (y, _, q, k, *_), (rounded_y, _, rounded_q, rounded_k, *_) = errors
    assert rounded_y == y and rounded_q < q - 0.3 and rounded_k < k - 0.3


# --- changed during a run


def test_a_recipe_may_change_during_a_run_and_the_state_stays():
    model, x = Net(), torch.randn(32, SIZE)
    model.compile(backend=te_fp8, options={"recipe": "delayed"})
    for _ in range(3):
        gradients(model, model, x)
    before = te_dynamo.scale_state(model).state_dict()
    for recipe in ("current", None, "mxfp8"):
        model.compile(backend=te_fp8, options={"recipe": recipe})
        gradients(model, model, x)
        after = te_dynamo.scale_state(model).state_dict()
        assert all(torch.equal(after[k], before[k]) for k in before)
    model.compile(backend=te_fp8, options={"recipe": "delayed"})
    gradients(model, model, x)
    history = te_dynamo.scale_state(model).state_dict()["up.weight.amax_history"]
    assert history.count_nonzero() == 4


def test_a_change_of_format_or_margin_rescales():
    """A scale that was found for one range is converted to another at once: nothing saturates for a step."""
    model, x = Net(), torch.randn(32, SIZE)
    for recipe in (DelayedScaling(margin=0), DelayedScaling(fp8_format="E4M3"), DelayedScaling(), DelayedScaling(margin=0)):
        torch._dynamo.reset()
        call = torch.compile(model, backend=te_fp8, options={"recipe": recipe})
        assert all(sqnr(a, b) > 18 for a, b in zip(gradients(model, model, x), gradients(call, model, x), strict=True))


# --- what a recipe's fields do to scales


def test_the_margins_cost_nothing_in_the_steady_state():
    """At most 0.1 dB in outputs and gradients, compared with no margin, which scales each amax to the format's largest number."""
    model, noise = Net(), {}
    for margin in (None, 0):
        trained_model = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained_model.parameters(), lr=1e-3)
        call = torch.compile(trained_model, backend=te_fp8, options={"recipe": DelayedScaling(margin=margin)})
        generator, rows = torch.Generator().manual_seed(1), []
        for _ in range(40):
            x = torch.randn(32, SIZE, generator=generator)
            found, expected = gradients(call, trained_model, x), gradients(trained_model, trained_model, x)
            rows.append([sqnr(a, b) for a, b in zip(expected, found, strict=True)])
            optimizer.step()  # with the exact gradients, so that both train alike
        noise[margin] = torch.tensor(rows[10:]).mean(0)
    difference = noise[None] - noise[0]
    assert difference[0] > -0.1 and difference[1:].mean() > -0.1, difference


def trained(recipe: DelayedScaling, factors: list[float]) -> tuple[float, float]:
    """(the weight's scale, its largest magnitude at the start) after steps with the weight times each factor."""
    model = nn.Linear(SIZE, SIZE, bias=False)
    call = torch.compile(model, backend=te_fp8, options={"recipe": recipe})
    weight = model.weight.detach().clone()
    for factor in factors:
        with torch.no_grad():
            model.weight.copy_(weight * factor)
        call(torch.randn(8, SIZE)).sum().backward()
    return te_dynamo.scale_state(model).state_dict()["weight.scale"].item(), weight.abs().max().item()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (DelayedScaling(), 448 / 8 / 2),
        (DelayedScaling(margin=0), 448 / 8),
        (DelayedScaling(margin=2), 448 / 8 / 4),
        (DelayedScaling(amax_history_len=2, margin=0), 448 / 2),
        (DelayedScaling(amax_compute_algo="most_recent", margin=0), 448 / 1),
        (DelayedScaling(amax_compute_algo=lambda history: 2 * history[0] + history[1:].amax(0), margin=0), 448 / (2 * 1 + 8)),
        (DelayedScaling(scaling_factor_compute_algo=lambda amax, scale, fp8_max, recipe: fp8_max / amax / 16), 448 / 8 / 16),
        (DelayedScaling(amax_compute_algo="most_recent", scaling_factor_compute_algo=lambda a, s, m, r: s / 2), None),
    ],
)
def test_fields_of_delayed_scaling(recipe, expected):
    scale, amax = trained(recipe, [4.0, 8.0, 2.0, 1.0])
    if expected is None:  # the first scale, halved at each of the four rolls
        assert scale == pytest.approx(448 / (4 * amax) / 16)
    else:
        assert scale == pytest.approx(expected / amax, rel=1e-6)


def test_powers_of_two_and_the_least_amax():
    from te_dynamo.lowering.fp8 import casting_of

    amax = torch.tensor([3.0, 448.0, 1e-9])
    casting = casting_of(Float8CurrentScaling(power_2_scale=True).key)
    assert casting.scale_of(amax, "input", gradient=False)[:2].tolist() == [128.0, 1.0]
    casting = casting_of(Float8CurrentScaling(amax_epsilon=1e-4).key)
    assert casting.scale_of(amax, "input", gradient=False)[2] == torch.tensor(448.0) / torch.tensor(1e-4)
