"""A byte-level language model, its data, its training loop and a plot of its losses: all that the demos need except FP8."""

from __future__ import annotations

import pydoc_data.topics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LAST = 20  # a run's final loss is the mean over this many steps
TOLERANCE = 0.01  # of the final loss


@dataclass(frozen=True)
class Setup:
    """One training run: the model's size, the amount of data, and the seed of weights and data.

    At this learning rate two float32 runs whose initial weights differ by 0.1% end within 0.1% of each other, so that a
    difference of 1% is significant. At 2e-3 they end 0.8% apart.
    """

    steps: int = 150
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    length: int = 128
    batch: int = 2
    lr: float = 1e-3
    seed: int = 0


@dataclass
class Run:
    """The result of a training run: loss and seconds of each step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def final_loss(self) -> float:
        """The mean over the last steps."""
        tail = self.losses[-LAST:]
        return sum(tail) / len(tail)

    def step_time(self) -> float:
        """The median in seconds, without the first step, which compiles."""
        steps = sorted(self.seconds[1:] or self.seconds)
        return steps[len(steps) // 2]


def python_help() -> Tensor:
    """The text behind Python's `help()`, about half a megabyte, as bytes: int64 [n]."""
    topics: dict[str, str] = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def build_model(setup: Setup) -> LlamaForCausalLM:
    """A Hugging Face Llama with random weights and one token per byte."""
    torch.manual_seed(setup.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=setup.hidden,
        intermediate_size=setup.hidden * 11 // 4,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        num_key_value_heads=setup.heads,
        max_position_embeddings=setup.length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def draw_batches(data: Tensor, setup: Setup) -> Tensor:
    """All batches of a run, equal for equal setups: int64 [steps, batch, length]."""
    generator = torch.Generator().manual_seed(setup.seed)
    starts = torch.randint(len(data) - setup.length, (setup.steps, setup.batch, 1), generator=generator)
    return data[starts + torch.arange(setup.length)]


def train_with_progress(
    console: Console, name: str, batches: Tensor, setup: Setup, backend: str, options: dict[str, Any] | None = None
) -> Run:
    """Trains a new model behind a progress bar called `name`."""
    text, note = TextColumn("{task.description:>8}"), TextColumn("{task.fields[note]}")
    with Progress(text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note, console=console) as progress:
        task = progress.add_task(name, total=setup.steps, note="compiling")

        def on_step(loss: float) -> None:
            progress.update(task, advance=1, note=f"loss {loss:.3f}")

        return train(build_model(setup), batches, setup, backend, on_step, options)


def train(
    model: LlamaForCausalLM,
    batches: Tensor,
    setup: Setup,
    backend: str,
    on_step: Callable[[float], None],
    options: dict[str, Any] | None = None,
) -> Run:
    """Trains with AdamW on float32 weights and bfloat16 autocast; `on_step` gets each step's loss."""
    run = Run()
    torch.compiler.reset()
    model.compile(backend=backend, options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, setup.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.1, (setup.steps - step) / (setup.steps - warmup + 1)))
    )
    for tokens in batches:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        run.losses.append(loss.item())
        run.seconds.append(time.perf_counter() - start)
        on_step(run.losses[-1])
    return run


def draw(runs: dict[str, Run], path: Path, unit: str = "byte") -> None:
    """Plots all loss curves, and below them their differences from the first run's, to a PNG. unit: a loss is in nats per unit."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(9, 7), height_ratios=(2, 1), layout="constrained")
    base, *_ = runs.values()
    for name, run in runs.items():
        (line,) = top.plot(run.losses, label=name, linewidth=1.6 if run is base else 0.9)
        if run is not base:
            difference = [(b / a - 1) * 100 for a, b in zip(base.losses, run.losses, strict=True)]
            bottom.plot(difference, color=line.get_color(), linewidth=0.9)
    top.set_ylabel(f"loss (nats a {unit})")
    top.legend()
    bottom.axhspan(-100 * TOLERANCE, 100 * TOLERANCE, alpha=0.15)
    bottom.set_ylabel(f"difference from {next(iter(runs))}, %")
    bottom.set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
