"""Accelerate's own FP8 settings become te_fp8's options, or are rejected with the reason."""

from __future__ import annotations

import enum
from types import SimpleNamespace

import accelerate.utils.dataclasses as settings
import pytest
from accelerate.utils import FP8RecipeKwargs, MSAMPRecipeKwargs, TERecipeKwargs
from torch import nn

from te_dynamo.integrations.accelerate import TEFP8Plugin
from te_dynamo.integrations.fp8_kwargs import options_of
from te_dynamo.recipe import DelayedScaling, Float8CurrentScaling, Float8RowwiseScaling, Format, MXFP8BlockScaling


@pytest.fixture(autouse=True)
def with_te_and_torchao(monkeypatch):
    """Pretends that TE and torchao are installed: their settings cannot be made without them, though nothing of them is used."""
    for name in ("is_transformer_engine_available", "is_torchao_available"):
        monkeypatch.setattr(settings, name, lambda: True)


def test_te_s_defaults_are_accelerate_s():
    recipe = options_of(TERecipeKwargs())["recipe"]
    assert recipe == DelayedScaling(margin=0, amax_history_len=1024, amax_compute_algo="most_recent", fp8_format="HYBRID")


def test_te_s_settings_are_kept():
    recipe = options_of(TERecipeKwargs(margin=2, fp8_format="e4m3", amax_history_len=16, amax_compute_algo="max"))["recipe"]
    assert recipe == DelayedScaling(margin=2, amax_history_len=16, amax_compute_algo="max", fp8_format=Format.E4M3)


def test_mxfp8():
    assert options_of(TERecipeKwargs(use_mxfp8_block_scaling=True)) == {"recipe": MXFP8BlockScaling()}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"interval": 2}, "interval=2.*Transformer Engine has removed it.*Remedy: 1"),
        ({"override_linear_precision": (False, False, True)}, "override_linear_precision=.*high_precision_wgrad=True"),
        ({"fp8_format": "E5M2"}, "E5M2 in forward is not supported"),
        ({"use_mxfp8_block_scaling": True, "fp8_format": "E5M2"}, "MXFP8 is E4M3"),
        ({"use_mxfp8_block_scaling": True, "margin": 1}, "margin=1.*needs none"),
    ],
)
def test_te_s_settings_without_a_counterpart(given, reason):
    with pytest.raises(ValueError, match=reason):
        options_of(TERecipeKwargs(**given))


@pytest.mark.filterwarnings("ignore:FP8RecipeKwargs is deprecated")
def test_the_old_class_is_te_s_or_refused():
    assert options_of(FP8RecipeKwargs(backend="te", amax_history_len=3))["recipe"].amax_history_len == 3
    for ms_amp in (FP8RecipeKwargs(backend="msamp", opt_level="O1"), MSAMPRecipeKwargs(opt_level="O1")):
        with pytest.raises(ValueError, match="MS-AMP.*'O1'.*Remedy"):
            options_of(ms_amp)


def test_what_is_none_of_them():
    with pytest.raises(TypeError, match="dict is none of Accelerate's FP8 settings"):
        options_of({"margin": 0})


def test_the_plugin_takes_them_and_its_own_arguments():
    plugin = TEFP8Plugin.from_accelerate(TERecipeKwargs(amax_history_len=5), skip=["head"], fullgraph=True)
    assert plugin.options["recipe"].amax_history_len == 5 and plugin.options["skip"] == ["head"]
    assert plugin.to_kwargs()["fullgraph"]


# -- torchao's. `Of` has the members that torchao's enums have.


class Of(enum.Enum):
    TENSORWISE, AXISWISE, DYNAMIC, DISABLED = "tensorwise", "axiswise", "dynamic", "disabled"


def torchao(granularity: Of = Of.TENSORWISE, wgrad: Of = Of.DYNAMIC, weight: Of | None = None, **more: bool) -> SimpleNamespace:
    """The fields of torchao's Float8LinearConfig that are read."""

    def cast(granularity: Of, scaling: Of = Of.DYNAMIC) -> SimpleNamespace:
        return SimpleNamespace(scaling_granularity=granularity, scaling_type=scaling)

    casts = {f"cast_config_{name}": cast(granularity) for name in ("input", "grad_output")}
    casts["cast_config_weight"] = cast(weight or granularity)
    casts["cast_config_input_for_grad_weight"] = cast(Of.TENSORWISE, wgrad)
    return SimpleNamespace(**({"emulate": False, "round_scales_to_power_of_2": False} | more), **casts)


def of_torchao(config: SimpleNamespace, **more):
    return settings.AORecipeKwargs(config=config, **more)


@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        (torchao(), Float8CurrentScaling()),
        (torchao(round_scales_to_power_of_2=True), Float8CurrentScaling(power_2_scale=True)),
        (torchao(Of.AXISWISE, round_scales_to_power_of_2=True), Float8RowwiseScaling(power_2_scale=True)),
        (torchao(Of.AXISWISE, wgrad=Of.DISABLED), Float8RowwiseScaling(high_precision_wgrad=True, power_2_scale=False)),
    ],
)
def test_torchao_s_recipes(config, recipe):
    assert options_of(of_torchao(config)) == {"recipe": recipe}


def test_torchao_s_emulation_is_the_reference():
    assert options_of(of_torchao(torchao(emulate=True)))["provider"] == "reference"


def test_torchao_s_mixture_is_refused():
    with pytest.raises(ValueError, match="not that of all operands"):
        options_of(of_torchao(torchao(weight=Of.AXISWISE)))


def test_torchao_s_choice_of_linears_is_asked_of_the_model():
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 20), nn.Linear(32, 32), nn.Linear(32, 16))
    assert options_of(of_torchao(torchao()), model)["skip"] == ("0", "1", "3")  # first, not a multiple of 16, last
    by_name = of_torchao(torchao(), module_filter_func=lambda module, path: path == "1")
    assert options_of(by_name, model)["skip"] == ("0", "2", "3")
    with pytest.raises(ValueError, match="module_filter_func.*pass the model"):
        options_of(by_name)
