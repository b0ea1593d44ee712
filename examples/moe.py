"""Trains a small mixture of experts in FP8 and in float32: a Mixtral with random weights learns Python's help as bytes.

    python examples/moe.py [--steps N]

Nothing is downloaded. Prints what te_fp8 took, including experts and routers, and both losses.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from help_topics import BYTES, passages
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import te_dynamo

BATCH, LENGTH, LAST = 8, 64, 10


def main() -> None:
    arguments = parse_arguments()
    tokens = torch.tensor(passages(LENGTH))
    print_sites(tokens[:BATCH])
    for name in ("float32", "te_fp8"):
        model = small_mixtral()
        if name == "te_fp8":
            for layer in model.model.layers:  # one graph for all of them
                layer.compile(backend="te_fp8")
        losses = train(model, tokens, arguments.steps)
        last = losses[-LAST:]
        print(f"{name}: loss {losses[0]:.3f} at first, {sum(last) / len(last):.3f} in the last {len(last)} steps", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
    return parser.parse_args()


def small_mixtral() -> MixtralForCausalLM:
    """Two layers of four experts; each token goes to two of them."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=BYTES,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        use_cache=False,
        experts_implementation="grouped_mm",  # one grouped GEMM for all experts; a loop over them breaks the graph
    )
    return MixtralForCausalLM(config)


def print_sites(ids: Tensor) -> None:
    """Prints each linear and attention of a layer once, with its number of sites."""
    report = te_dynamo.explain(small_mixtral(), input_ids=ids, labels=ids, backward=True)
    sites = [site for site in report.sites if site.kind != "norm"]
    found = Counter((site.path.split(".", 3)[-1], site.provider or f"not in FP8: {site.reason}") for site in sites)
    for (path, how), count in found.items():
        print(f"{count} x {path}: {how}")
    print(f"{report.fp8_flop_fraction:.1%} of the weight GEMMs' FLOPs in FP8, graphs: {report.graph_count}", flush=True)


def train(model: MixtralForCausalLM, tokens: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        ids = tokens[torch.randint(len(tokens), (BATCH,), generator=generator)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main()
