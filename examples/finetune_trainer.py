"""Fine-tunes a classifier with transformers' Trainer, in FP8: the program of Hugging Face's tutorial with one more argument.

    python examples/finetune_trainer.py [--model NAME] [--epochs N] [--out FOLDER] [--resume]

The task: which topic of Python's `help()` is a passage from? By default the model is a small BERT with random weights that reads bytes,
so nothing is downloaded; --model loads a pretrained classifier and its tokenizer, from the hub or a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from help_topics import labelled_passages
from small_models import small_bert
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from te_dynamo.integrations.transformers import TEFP8Callback

CLASSES = 4


def main() -> None:
    arguments = parse_arguments()
    set_seed(0)
    train, test = labelled_passages(CLASSES, arguments.length, arguments.passages)
    model, collator = small_bert(arguments.length, CLASSES), None
    if arguments.model is not None:
        model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=CLASSES)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        train, test = ([tokenized(passage, tokenizer) for passage in passages] for passages in (train, test))
        collator = DataCollatorWithPadding(tokenizer)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.out),
            num_train_epochs=arguments.epochs,
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=5e-4 if arguments.model is None else 5e-5,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_steps=10,
            report_to=[],
        ),
        train_dataset=train,
        eval_dataset=test,
        data_collator=collator,
        compute_metrics=accuracy,
        callbacks=[TEFP8Callback()],  # the one argument
    )
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    print(f"accuracy: {trainer.evaluate()['eval_accuracy']:.3f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pretrained model: a name of the hub or a folder")
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many steps instead")
    parser.add_argument("--passages", type=int, help="the number of passages (default: all)")
    parser.add_argument("--length", type=int, default=128, help="bytes of a passage (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("finetune_out"), help="folder for checkpoints (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in that folder")
    return parser.parse_args()


def tokenized(passage: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    text = bytes(passage["input_ids"]).decode(errors="ignore")
    return {**tokenizer(text, truncation=True), "label": passage["label"]}


def accuracy(result: Any) -> dict[str, float]:
    logits, labels = result
    return {"accuracy": float((np.argmax(logits, axis=-1) == labels).mean())}


if __name__ == "__main__":
    main()
