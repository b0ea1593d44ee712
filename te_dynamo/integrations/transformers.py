"""transformers' Trainer: `Trainer(..., callbacks=[TEFP8Callback(recipe=...)])`, and nothing else about the program changes."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from te_dynamo.integrations.accelerate import TEFP8Plugin
from te_dynamo.integrations.generation import compile_config
from te_dynamo.integrations.scale_file import NAME, load_scales, metadata_of, save_scales

__all__ = ["TEFP8Callback", "compile_config"]

RUN = "run"  # the metadata key that identifies the run whose checkpoint a file belongs to


class TEFP8Callback(TrainerCallback):
    """Makes a Trainer compute in FP8 and keep the scale state in its checkpoints, as `scale_state.safetensors`: a resumed run is
    bit-equal to one that was not interrupted.

        trainer = Trainer(model, args, train_dataset=..., callbacks=[TEFP8Callback(recipe="current")])

    Args:
        resume_from: The checkpoint that `train(resume_from_checkpoint=...)` is given, if that is not a folder `checkpoint-<step>` in
            `output_dir`: a Trainer does not pass it to its callbacks.
        compile: False if you compile the model, or its layers, yourself; then this class only handles checkpoints.
        plugin: The arguments of `TEFP8Plugin`: te_fp8's options, fullgraph, dynamic, use_regional_compilation, ...

    It warns if a checkpoint has no scale state, and raises ValueError if that state is another run's. With
    `load_best_model_at_end` the best checkpoint's scales are loaded too.
    """

    def __init__(self, *, resume_from: str | Path | None = None, compile: bool = True, **plugin: Any) -> None:
        if plugin and not compile:
            raise ValueError(f"te_fp8: TEFP8Callback(compile=False) does not compile, and has no use for {', '.join(plugin)}")
        self.resume_from = resume_from
        self.plugin = TEFP8Plugin(**plugin) if compile else None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Makes the Trainer's Accelerator, which compiles when training or evaluation begins, use te_fp8."""
        if self.plugin is not None:
            if args.torch_compile_backend not in (None, "te_fp8"):
                raise ValueError(
                    f"te_fp8: TEFP8Callback compiles with te_fp8, TrainingArguments(torch_compile_backend={args.torch_compile_backend!r}) "
                    "with another backend. Remedy: leave out one of them."
                )
            AcceleratorState().dynamo_plugin = self.plugin

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        if self.plugin is not None and AcceleratorState().dynamo_plugin is not self.plugin:
            raise RuntimeError("te_fp8: TEFP8Callback came too late to compile. Remedy: Trainer(callbacks=[...]), not add_callback.")
        if state.global_step > 0:  # a fresh run begins at 0
            named = self.resume_from or (args.resume_from_checkpoint if Path(args.resume_from_checkpoint or "").is_dir() else None)
            _load(model, Path(named) if named else _folder(args, state), state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        if args.should_save:
            save_scales(model, _folder(args, state) / NAME, {RUN: _run(state)})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            _load(model, Path(state.best_model_checkpoint), None)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint of this step; in a hyperparameter search the newest one, since each of its runs has its own folder."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    out = Path(args.output_dir or "")
    runs = out.glob(f"*/{name}") if state.is_hyper_param_search else ()
    return max(runs, key=lambda folder: folder.stat().st_mtime, default=out / name)


def _run(state: TrainerState) -> str:
    """A fingerprint of a run, from the state that a Trainer saves and loads: its step and its log history."""
    return hashlib.sha256(json.dumps([state.global_step, state.log_history], sort_keys=True).encode()).hexdigest()


def _load(model: Any, folder: Path, state: TrainerState | None) -> None:
    """Loads a checkpoint's scales. state: the Trainer's, if it was loaded from that checkpoint."""
    path = folder / NAME
    if not path.exists():
        warnings.warn(
            f"te_fp8: {folder} has no {NAME}: the scales begin with the next batch, so the run is not bit-equal to one that was not "
            "interrupted. Checkpoints have it if TEFP8Callback is among the Trainer's callbacks. A checkpoint elsewhere is named by "
            "TEFP8Callback(resume_from=...).",
            stacklevel=2,
        )
        return
    if state is not None and metadata_of(path).get(RUN) != _run(state):
        raise ValueError(
            f"te_fp8: {path} belongs to another run than the one that is resumed. Remedy: TEFP8Callback(resume_from=...) with the "
            "checkpoint that train(resume_from_checkpoint=...) is given."
        )
    load_scales(model, path)
