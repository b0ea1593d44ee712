"""A byte-level language model, its data and its training loop: all that the demo needs and nothing about FP8."""

from __future__ import annotations

import pydoc_data.topics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Setup:
    """One training run: the model's size, how much it sees, and the seed of weights and data.

    At this learning rate two float32 runs whose first weights differ by 0.1% end within 0.1% of each other, so that a
    difference of 1% means something. At 2e-3 they end 0.8% apart.
    """

    steps: int
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    length: int = 128
    batch: int = 2
    lr: float = 1e-3
    seed: int = 0


@dataclass
class Run:
    """What came of it: a loss and the seconds of each step."""

    backend: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def final_loss(self, last: int = 20) -> float:
        """The mean over the last steps."""
        tail = self.losses[-last:]
        return sum(tail) / len(tail)

    def step_time(self) -> float:
        """The median, without the first step: that one compiles."""
        steps = sorted(self.seconds[1:] or self.seconds)
        return steps[len(steps) // 2]


def python_help() -> Tensor:
    """The text behind Python's `help()`, about half a megabyte, as bytes: int64 [n]."""
    topics: dict[str, str] = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def build_model(setup: Setup) -> LlamaForCausalLM:
    """A Hugging Face Llama with random weights and one token a byte."""
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


def train(
    model: LlamaForCausalLM,
    batches: Tensor,
    setup: Setup,
    backend: str,
    on_step: Callable[[float], None],
    options: dict[str, Any] | None = None,
) -> Run:
    """Train with AdamW on float32 weights and bfloat16 autocast; `on_step` gets each step's loss."""
    run = Run(backend)
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
