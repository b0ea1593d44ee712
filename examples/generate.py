"""Generates text in FP8: `generate` with a static cache, whose decoding step te_fp8 compiles.

    python examples/generate.py [--model NAME] [--prompt TEXT] [--tokens N]

By default the model is a small Llama with random weights that writes bytes. te_fp8 decodes; transformers runs the prompt uncompiled, in
high precision.
"""

from __future__ import annotations

import argparse
import time

import torch
from small_models import small_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import te_dynamo


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    if arguments.model is None:
        model, tokenizer = small_llama(), None
        inputs = {"input_ids": torch.tensor([list(arguments.prompt.encode())])}
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(arguments.model), AutoTokenizer.from_pretrained(arguments.model)
        inputs = tokenizer(arguments.prompt, return_tensors="pt")

    for name, config in {"uncompiled": None, "te_fp8": te_dynamo.compile_config(recipe="current")}.items():
        how = {"compile_config": config} if config is not None else {}
        settings = {"max_new_tokens": arguments.tokens, "do_sample": False, "cache_implementation": "static", **how}
        model.generate(**inputs, **{**settings, "max_new_tokens": 3})  # compiles
        start = time.perf_counter()
        ids = model.generate(**inputs, **settings)[0].tolist()
        seconds = time.perf_counter() - start
        text = bytes(ids).decode(errors="replace") if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)
        print(f"{name}, {arguments.tokens / seconds:.1f} tokens a second: {text!r}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pretrained model: a name of the hub or a folder")
    parser.add_argument("--prompt", default="The best thing about a scale is", help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=40, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
