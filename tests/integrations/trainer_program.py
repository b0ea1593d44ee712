"""A program of a user of the Trainer: `main(folder, ...)` trains a tiny Llama for six steps and prints the final state."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import te_dynamo
from te_dynamo.integrations.transformers import TEFP8Callback
from tests.models import SMALL, VOCABULARY

STEPS, SAVED = 6, 3


class Killed(TrainerCallback):
    """Kills the process in the step after a checkpoint, as if the machine had died."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == SAVED + 1:
            os.kill(os.getpid(), signal.SIGKILL)


def tokens(count: int, length: int = 16) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(3)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": SAVED,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**(settings | more))


def model() -> nn.Module:
    return SMALL["llama"].model()


def digest(trained: nn.Module) -> str:
    """A hash of the bits of every weight and scale."""
    found = hashlib.sha256()
    for name, tensor in sorted({**trained.state_dict(), **te_dynamo.scale_state(trained).state_dict()}.items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def main(folder: str, *, dies: bool = False, resumes: bool = False) -> None:
    trained = model()
    callbacks = [TEFP8Callback(recipe="delayed"), *([Killed()] if dies else [])]
    trainer = Trainer(trained, arguments(Path(folder)), train_dataset=tokens(2 * STEPS), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resumes or None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"digest": digest(trained), "losses": losses}))
