"""Fine-tunes a classifier with Accelerate, in FP8: the training loop of Hugging Face's tutorial with one more argument.

    python examples/finetune_accelerate.py [--epochs N] [--out FOLDER] [--resume]
    accelerate launch --num_processes 2 examples/finetune_accelerate.py

The task and the model are those of `finetune_trainer.py`: which topic of Python's `help()` is a passage from?
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from finetune_trainer import CLASSES
from help_topics import labelled_passages
from small_models import small_bert
from torch.utils.data import DataLoader
from transformers import default_data_collator, get_scheduler

from te_dynamo.integrations.accelerate import TEFP8Plugin

BATCH = 16


def main() -> None:
    arguments = parse_arguments()
    set_seed(0)
    accelerator = Accelerator(mixed_precision="bf16", dynamo_plugin=TEFP8Plugin())  # the one argument

    train, test = labelled_passages(CLASSES, arguments.length, arguments.passages)
    model = small_bert(arguments.length, CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    train_data = DataLoader(train, batch_size=BATCH, shuffle=True, drop_last=True, collate_fn=default_data_collator)  # type: ignore[arg-type]
    test_data = DataLoader(test, batch_size=BATCH, collate_fn=default_data_collator)  # type: ignore[arg-type]
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=arguments.epochs * len(train_data))
    model, optimizer, train_data, test_data, schedule = accelerator.prepare(model, optimizer, train_data, test_data, schedule)

    done = 0
    if arguments.resume:
        done = last_epoch(arguments.out)
        accelerator.load_state(str(arguments.out / f"epoch_{done}"))
    for epoch in range(done + 1, arguments.epochs + 1):
        model.train()
        train_data.set_epoch(epoch)
        for step, batch in enumerate(train_data, start=1):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step == arguments.steps:
                break
        accelerator.save_state(str(arguments.out / f"epoch_{epoch}"))  # has scale_state.safetensors
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, accuracy {accuracy(accelerator, model, test_data):.3f}")
    accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(
        arguments.out / "model", is_main_process=accelerator.is_main_process
    )
    accelerator.end_training()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=0, help="stop each epoch after so many steps (default: its end)")
    parser.add_argument("--passages", type=int, help="the number of passages (default: all)")
    parser.add_argument("--length", type=int, default=128, help="bytes of a passage (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("finetune_out"), help="folder for checkpoints (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on after the last epoch in that folder")
    return parser.parse_args()


def last_epoch(folder: Path) -> int:
    epochs = [int(path.name.removeprefix("epoch_")) for path in folder.glob("epoch_*")]
    if not epochs:
        raise SystemExit(f"there is no checkpoint in {folder}: run without --resume first")
    return max(epochs)


@torch.no_grad()
def accuracy(accelerator: Accelerator, model: torch.nn.Module, data: Any) -> float:
    model.eval()
    right, seen = 0, 0
    for batch in data:
        predicted = model(**batch).logits.argmax(-1)
        predicted, labels = accelerator.gather_for_metrics((predicted, batch["labels"]))
        right, seen = right + int((predicted == labels).sum()), seen + len(labels)
    return right / seen


if __name__ == "__main__":
    main()
