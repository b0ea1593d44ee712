"""A program of a user of Accelerate: `main(folder, ...)` trains a tiny Llama for six steps and prints the final state."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from te_dynamo.integrations.accelerate import TEFP8Plugin
from tests.integrations.trainer_program import SAVED, STEPS, digest, model
from tests.models import VOCABULARY


def batches(size: int = 2, count: int = 2 * STEPS) -> DataLoader[Tensor]:
    """Batches of int64 [size, 16]."""
    ids = torch.randint(3, VOCABULARY, (count, 16), generator=torch.Generator().manual_seed(3))
    return DataLoader(list(ids), batch_size=size)  # type: ignore[arg-type]


def train(accelerator: Accelerator, trained: nn.Module, optimizer: Any, schedule: Any, data: Any, **at: Any) -> list[float]:
    """The losses. at: what to do after a step, by the step's name: `step_3`, ..."""
    losses = []
    for step, ids in enumerate(data, start=1):
        with accelerator.accumulate(trained):
            loss = trained(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        at.get(f"step_{step}", lambda: None)()
    return losses


def main(folder: str, *, dies: bool = False, resumes: bool = False, accumulation: int = 1, **plugin: Any) -> None:
    set_seed(0)
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16", gradient_accumulation_steps=accumulation, dynamo_plugin=TEFP8Plugin(recipe="delayed", **plugin)
    )
    made = model()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)
    trained, optimizer, schedule, data = accelerator.prepare(made, optimizer, schedule, batches())
    checkpoint = str(Path(folder) / "checkpoint")
    if resumes:
        accelerator.load_state(checkpoint)
        data = accelerator.skip_first_batches(data, SAVED)
    after = {f"step_{SAVED}": lambda: accelerator.save_state(checkpoint)} if not resumes else {}
    if dies:
        after[f"step_{SAVED + 1}"] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    losses = train(accelerator, trained, optimizer, schedule, data, **after)
    print(json.dumps({"digest": digest(accelerator.unwrap_model(trained, keep_torch_compile=False)), "losses": losses[-SAVED:]}))
