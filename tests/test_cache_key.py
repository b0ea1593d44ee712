"""Everything that compiled code depends on is in its key in torch's caches."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from te_dynamo.config import KEYS, Options
from te_dynamo.recipe import RECIPES, Recipe, from_key
from te_dynamo.runtime import compile_inductor

# Another value for each option. A new option must be added here, or below with the reason.
OTHER: dict[str, Any] = {
    "recipe": "current",
    "provider": "reference",
    "skip": ("*.up",),
    "attention": "fp8",
    "padding": "skip",
    "short_sequence": 64,
    "include_logits": True,
    "include_routers": True,
    "like_te": True,
    "memory": "saving",
    "keep_weights": True,
    "verify": True,
    "strict": True,
    "mode": "max-autotune",
    "inductor": {"max_autotune": True},
}
IN_THE_GRAPH = {"amax_group": "its name stands in each call", "debug_dir": "changes nothing that is compiled"}
# Recipe fields that only the state and the planner read, or that are among a call's attributes.
NOT_FOR_KERNELS = {
    "amax_history_len",
    "amax_compute_algo",
    "scaling_factor_compute_algo",
    "reduce_amax",
    "fp8_dpa",
    "fp8_mha",
}


def key_of(options: Options, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Our functions' part of the keys of Inductor's caches when a graph is compiled."""
    told: list[dict[str, str]] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: Any = None) -> Any:
        told.append(dict(torch._inductor.config.unsafe_marked_cacheable_functions))
        return gm

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    compile_inductor(torch.fx.symbolic_trace(torch.nn.Identity()), [], options)
    return told[0]


def test_every_option_is_there():
    assert {*OTHER, *IN_THE_GRAPH} == set(KEYS)


@pytest.mark.parametrize("key", OTHER)
def test_every_option_changes_the_key(key, monkeypatch):
    before, after = (key_of(options, monkeypatch) for options in (Options(), Options(**{key: OTHER[key]})))
    assert before and before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)
    assert key_of(Options(**{key: OTHER[key]}), monkeypatch) == after


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a.*": "current"}, {"b.*": "current"}),
        ({"a": "current", "*": "delayed"}, {"*": "delayed", "a": "current"}),  # the first that matches decides
        ({"a": "current"}, {"a": None}),
        (RECIPES["rowwise"](), RECIPES["rowwise"](high_precision_wgrad=True)),
    ],
)
def test_so_does_every_recipe_of_a_pattern(one, other):
    assert Options(recipe=one).cache_key() != Options(recipe=other).cache_key()


def others(recipe: Recipe, name: str) -> Any:
    """A different value for a recipe's field."""
    value = getattr(recipe, name)
    if name == "fp8_format":
        return "E4M3" if value.name == "HYBRID" else "HYBRID"
    if value is None:
        return 1
    if isinstance(value, bool):
        return not value
    return {1: 2, 2: 1}.get(value, value + 1) if not isinstance(value, float) else value + 0.5


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_of_a_recipe_that_kernels_read_is_in_its_key(name):
    recipe = RECIPES[name]()
    for field in fields(recipe):
        if field.name in NOT_FOR_KERNELS or (name, field.name) == ("nvfp4", "fp8_format"):  # nvfp4 has one format
            continue
        try:
            changed = replace(recipe, **{field.name: others(recipe, field.name)})
        except ValueError:  # two operands with square blocks
            changed = replace(recipe, **{field.name: others(recipe, field.name)}, w_block_scaling_dim=1)
        assert changed.key != recipe.key, field.name
        assert getattr(from_key(changed.key), field.name) == getattr(changed, field.name)
