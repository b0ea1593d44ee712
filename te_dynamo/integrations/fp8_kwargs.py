"""Accelerate's FP8 settings (`TERecipeKwargs`, `AORecipeKwargs`, `FP8RecipeKwargs`) as te_fp8's options.

Settings without a counterpart are rejected with the reason. Three things differ by design:

- Accelerate's default for Transformer Engine is `amax_compute_algo="most_recent"`; TE's own and ours is "max". Accelerate's is kept.
- `use_autocast_during_eval=False` makes Accelerate evaluate in high precision. A model compiled with te_fp8 evaluates in FP8, with the
  scales of its training.
- For torchao, Accelerate skips the first and the last linear; te_fp8 skips the logits. Given the model, these options skip what
  Accelerate skips.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from accelerate.utils.ao import filter_linear_layers, find_first_last_linear_layers
from torch import nn

from te_dynamo.recipe import DelayedScaling, Float8CurrentScaling, Float8RowwiseScaling, MXFP8BlockScaling, Recipe


def options_of(settings: Any, model: nn.Module | None = None) -> dict[str, Any]:
    """te_fp8's options for an object of Accelerate's FP8 settings.

    model: used to find the linears that torchao would convert; needed if a function selects them (`module_filter_func`).

    Raises ValueError for a setting that has no counterpart, TypeError for an object of another kind.
    """
    kinds = [cls.__name__ for cls in type(settings).__mro__]
    if "TERecipeKwargs" in kinds and getattr(settings, "backend", "TE") == "TE":
        return {"recipe": _recipe_of_te(settings)}
    if "AORecipeKwargs" in kinds:
        return _options_of_ao(settings, model)
    if "MSAMPRecipeKwargs" in kinds:
        raise ValueError(
            f"te_fp8: MS-AMP (opt_level={settings.opt_level!r}) keeps weights, gradients and optimizer states in FP8, which te_fp8 does "
            "not: it computes GEMMs in FP8. Remedy: TERecipeKwargs, or TEFP8Plugin(recipe=...)."
        )
    raise TypeError(f"te_fp8: {type(settings).__name__} is none of Accelerate's FP8 settings (TERecipeKwargs, AORecipeKwargs, ...)")


def _recipe_of_te(settings: Any) -> Recipe:
    refused = partial(_refused, "TERecipeKwargs", settings)
    if settings.interval != 1:
        raise refused("interval", "Transformer Engine has removed it: scales are computed at every step", "1")
    if any(settings.override_linear_precision):
        reason = "no recipe with one scale a tensor keeps one of a linear's three GEMMs in high precision"
        raise refused("override_linear_precision", reason, "recipe=te_dynamo.recipe.Float8RowwiseScaling(high_precision_wgrad=True)")
    if settings.use_mxfp8_block_scaling:
        if settings.fp8_format == "E5M2":
            raise refused("fp8_format", "MXFP8 is E4M3, forward and backward", "'E4M3'")
        if settings.margin:
            raise refused("margin", "a scale of MXFP8 belongs to 32 values and needs none", "0")
        return MXFP8BlockScaling()  # also for "HYBRID": it is Accelerate's default, which it does not pass on
    return DelayedScaling(
        fp8_format=settings.fp8_format,
        margin=settings.margin,
        amax_history_len=settings.amax_history_len,
        amax_compute_algo=settings.amax_compute_algo,
    )


def _options_of_ao(settings: Any, model: nn.Module | None) -> dict[str, Any]:
    options: dict[str, Any] = {"recipe": _recipe_of_ao(settings.config)}
    if settings.config.emulate:
        options["provider"] = "reference"
    if model is not None:
        first_and_last = list(find_first_last_linear_layers(model))
        converts = settings.module_filter_func or partial(filter_linear_layers, layers_to_filter=first_and_last)
        linears = ((path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear))
        options["skip"] = tuple(path for path, module in linears if not converts(module, path))
    elif settings.module_filter_func is not None:
        raise _refused("AORecipeKwargs", settings, "module_filter_func", "it is asked about each module", "pass the model too")
    return options


def _recipe_of_ao(config: Any) -> Recipe:
    """Padded inner dimensions and FP8 all-gathers do not change torchao's numbers: these settings have no counterpart and need none."""
    operands = (config.cast_config_input, config.cast_config_weight, config.cast_config_grad_output)
    granularities = {operand.scaling_granularity.value for operand in operands}
    if granularities == {"tensorwise"}:
        return Float8CurrentScaling(power_2_scale=config.round_scales_to_power_of_2)
    if granularities == {"axiswise"}:
        in_high_precision = config.cast_config_input_for_grad_weight.scaling_type.value == "disabled"
        return Float8RowwiseScaling(high_precision_wgrad=in_high_precision, power_2_scale=config.round_scales_to_power_of_2)
    raise _refused("Float8LinearConfig", config, "cast_config_input", "its scaling_granularity is not that of all operands", "one for all")


def _refused(what: str, settings: Any, field: str, reason: str, remedy: str) -> ValueError:
    return ValueError(f"te_fp8: {what}({field}={getattr(settings, field)!r}) has no counterpart: {reason}. Remedy: {remedy}.")
