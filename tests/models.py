"""Tiny Hugging Face models with random weights, and inputs for them. Dropout is off, so that runs are comparable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY, HIDDEN, LENGTH = 320, 64, 24
DECODER = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "use_cache": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ENCODER = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class Case:
    """A model: how it is built, and how many FP8 linears and attentions it has; the logits are not among the linears."""

    build: Callable[[str], nn.Module]
    linears: int
    attentions: int
    kind: str = "text"

    def model(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return self.build(attention).to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float32, batch: int = 2, length: int = LENGTH) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        if self.kind == "image":
            return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator).to(dtype)}
        ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if self.kind == "seq2seq" else {"input_ids": ids}


def output(result: Any) -> Tensor:
    """A model's main output: its logits, else its last hidden state."""
    return result.logits if "logits" in result else result.last_hidden_state


def decoder(layers: int, model: str, config: str, **extra: Any) -> Case:
    def build(attention: str) -> nn.Module:
        return getattr(hf, model)(getattr(hf, config)(**DECODER, **extra, num_hidden_layers=layers, attn_implementation=attention))

    return Case(build, 7 * layers, layers)


def gpt2(layers: int) -> Case:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False, "bos_token_id": 0, "eos_token_id": 1}

    def build(attention: str) -> nn.Module:
        sizes = {"n_embd": HIDDEN, "n_head": 4, "n_layer": layers, "vocab_size": VOCABULARY}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, attn_implementation=attention, **off))

    return Case(build, 4 * layers, layers)


def encoder(layers: int, model: str, config: str, kind: str = "text", **extra: Any) -> Case:
    def build(attention: str) -> nn.Module:
        return getattr(hf, model)(getattr(hf, config)(**ENCODER, **extra, num_hidden_layers=layers, attn_implementation=attention))

    return Case(build, 6 * layers + 1, layers, kind)


def t5(layers: int) -> Case:
    sizes = {"d_model": HIDDEN, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": layers, "vocab_size": VOCABULARY}

    def build(attention: str) -> nn.Module:
        config = hf.T5Config(**sizes, decoder_start_token_id=0, use_cache=False, dropout_rate=0.0)
        config._attn_implementation = attention
        return hf.T5ForConditionalGeneration(config)

    return Case(build, (6 + 10) * layers, 3 * layers, "seq2seq")


def cases(layers: int) -> dict[str, Case]:
    return {
        "llama": decoder(layers, "LlamaForCausalLM", "LlamaConfig"),
        "mistral": decoder(layers, "MistralForCausalLM", "MistralConfig"),
        "qwen3": decoder(layers, "Qwen3ForCausalLM", "Qwen3Config", head_dim=16),
        "gemma3": decoder(layers, "Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=16),
        "gpt2": gpt2(layers),
        "bert": encoder(layers, "BertModel", "BertConfig", vocab_size=VOCABULARY),
        "vit": encoder(layers, "ViTModel", "ViTConfig", "image", image_size=32, patch_size=8),
        "t5": t5(layers),
    }


CASES = cases(layers=2)
# The time to trace and compile grows with the layers. T5 keeps two: its second reads the first's bias, and both the same memory.
SMALL = cases(layers=1) | {"t5": CASES["t5"]}
