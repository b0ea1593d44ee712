"""Fine-tunes a language model with LoRA (PEFT), in FP8: the frozen weights are quantized once, the adapters learn from the first step.

    python examples/lora_peft.py [--model NAME] [--steps N] [--dora] [--out FOLDER]

Without --model it is a small Llama with random weights that reads bytes; a name of the hub or a folder loads a pretrained model and its
tokenizer. The text is Python's help. Needs `pip install peft`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from help_topics import passages
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import small_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import te_dynamo

LENGTH, BATCH = 128, 4


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    base = small_llama() if arguments.model is None else AutoModelForCausalLM.from_pretrained(arguments.model)
    tokens = torch.tensor(passages(LENGTH))
    if arguments.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        ids = tokenizer("".join(bytes(row).decode(errors="ignore") for row in tokens.tolist()))["input_ids"]
        tokens = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=arguments.dora))
    model.print_trainable_parameters()
    model.compile(backend="te_fp8", options={"keep_weights": True})  # keep_weights: what is frozen is quantized once
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    for step in range(1, arguments.steps + 1):
        rows = torch.randint(len(tokens), (BATCH,))
        loss = model(input_ids=tokens[rows], labels=tokens[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step in (1, arguments.steps):
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    model.save_pretrained(arguments.out)  # the adapters, as always
    torch.save(te_dynamo.scale_state(model).state_dict(), arguments.out / "scales.pt")
    torch.manual_seed(0)
    again = small_llama() if arguments.model is None else AutoModelForCausalLM.from_pretrained(arguments.model)
    loaded = PeftModel.from_pretrained(again, arguments.out)
    with torch.no_grad():
        check = loaded(input_ids=tokens[:BATCH], labels=tokens[:BATCH]).loss.item()
        here = model.eval()(input_ids=tokens[:BATCH], labels=tokens[:BATCH]).loss.item()
    print(f"loss of the saved adapters in float32: {check:.3f}, of these in FP8: {here:.3f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pretrained model: a name of the hub or a folder")
    parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--out", type=Path, default=Path("lora_out"), help="folder for the adapters (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
