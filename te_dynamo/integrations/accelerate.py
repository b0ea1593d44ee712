"""Accelerate: `Accelerator(dynamo_plugin=TEFP8Plugin(recipe=...))`, and nothing else about the program changes.

Importing this module does two things to Accelerate, once:

- its `DynamoBackend` accepts the name of every backend that torch knows (`dynamo_names.py`), for code that names one: `dynamo_backend=
  "te_fp8"`, `TrainingArguments(torch_compile_backend="te_fp8")`, `ACCELERATE_DYNAMO_BACKEND=te_fp8`;
- each Accelerator whose backend is te_fp8 keeps the scale state in the folders of `save_state` and `load_state`, as
  `scale_state.safetensors` (`scale_state_1.safetensors` for a second model, as with its weights).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn

from te_dynamo.config import Options
from te_dynamo.integrations.dynamo_names import take_registered_names
from te_dynamo.integrations.fp8_kwargs import options_of
from te_dynamo.integrations.scale_file import NAME, load_scales, save_scales

__all__ = ["TEFP8Plugin", "checkpoint_scales"]


class TEFP8Plugin(TorchDynamoPlugin):
    """Makes an Accelerator compile with te_fp8 and these options.

        accelerator = Accelerator(mixed_precision="bf16", dynamo_plugin=TEFP8Plugin(recipe="current"))

    fullgraph, dynamic, disable: as in `torch.compile`; use_regional_compilation: compile the repeated layers with one shared graph,
    and every other module by itself, instead of the whole model; mode, options: te_fp8's (see `te_dynamo.Options`). Arguments that
    are not given come from `accelerate launch`, else the default.

    Raises ValueError for an option that is unknown or not allowed.
    """

    def __init__(
        self,
        *,
        fullgraph: bool | None = None,
        dynamic: bool | None = None,
        disable: bool = False,
        use_regional_compilation: bool | None = None,
        mode: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            backend="te_fp8",
            mode=mode,
            fullgraph=fullgraph,
            dynamic=dynamic,
            disable=disable,
            use_regional_compilation=use_regional_compilation,
        )
        if self.mode != "default":
            options["mode"] = self.mode
        chosen = Options.from_user(options)  # an error now, not at the first step
        if self.use_regional_compilation and not chosen.include_logits:
            options["skip"] = (*chosen.skip, "")  # the path of a linear compiled by itself, as the model's head is
        self.options = options

    @classmethod
    def from_accelerate(cls, settings: Any, model: nn.Module | None = None, **more: Any) -> TEFP8Plugin:
        """From Accelerate's FP8 settings: TERecipeKwargs, AORecipeKwargs or FP8RecipeKwargs. more: this class's own arguments.

            plugin = TEFP8Plugin.from_accelerate(TERecipeKwargs(amax_history_len=16))
            accelerator = Accelerator(mixed_precision="bf16", dynamo_plugin=plugin)    # not "fp8": that is Accelerate's own way

        model: needed for AORecipeKwargs(module_filter_func=...). Raises ValueError for a setting without a counterpart.
        """
        return cls(**(options_of(settings, model) | more))

    def to_kwargs(self) -> dict[str, Any]:
        """The arguments for `torch.compile`. `mode` is among the options, since torch rejects both."""
        return {
            "backend": "te_fp8",
            "fullgraph": self.fullgraph,
            "dynamic": self.dynamic,
            "disable": self.disable,
            "options": dict(self.options),
        }


def checkpoint_scales(accelerator: Accelerator) -> None:
    """Saves and loads the scale state of an accelerator's prepared models with `save_state` and `load_state`, in the same folder.

    An Accelerator whose backend is te_fp8 does so by itself. Call this for one whose models you compile yourself.
    """
    if not getattr(accelerator, "_te_fp8_scales", False):
        accelerator._te_fp8_scales = True
        accelerator.register_save_state_pre_hook(functools.partial(_save, accelerator))
        accelerator.register_load_state_pre_hook(functools.partial(_load, accelerator))


def _save(accelerator: Accelerator, models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
    each_node = accelerator.project_configuration.save_on_each_node
    if accelerator.is_local_main_process if each_node else accelerator.is_main_process:
        for path, model in _files(accelerator, folder):
            save_scales(model, path)


def _load(accelerator: Accelerator, models: list[nn.Module], folder: str) -> None:
    for path, model in _files(accelerator, folder):
        if path.exists():
            load_scales(model, path)
        else:
            warnings.warn(
                f"te_fp8: {folder} has no {path.name}: the scales begin with the next batch, so this run is not bit-equal to one that was "
                "not interrupted. Checkpoints have it where te_dynamo.integrations.accelerate was imported when they were saved.",
                stacklevel=2,
            )


def _files(accelerator: Accelerator, folder: str) -> list[tuple[Path, nn.Module]]:
    """The file of each model. Not based on the models that hooks get: `load_state`'s hook gets no sharded ones."""
    names = [NAME, *(NAME.replace(".", f"_{i}.") for i in range(1, len(accelerator._models)))]
    return [(Path(folder) / name, model) for name, model in zip(names, accelerator._models, strict=False)]


def _checkpointing(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapped(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.state.dynamo_plugin.backend == DynamoBackend("TE_FP8"):
            checkpoint_scales(self)

    return wrapped


take_registered_names()
Accelerator.__init__ = _checkpointing(Accelerator.__init__)
