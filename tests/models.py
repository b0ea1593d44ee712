"""Tiny Hugging Face models with random weights, and inputs for them. Dropout is off, so that two runs compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY, HIDDEN, LAYERS, LENGTH = 320, 64, 2, 24
DECODER = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "use_cache": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ENCODER = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
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
    """What a model is for: its logits, else its last hidden state."""
    return result.logits if "logits" in result else result.last_hidden_state


def decoder(model: str, config: str, linears: int = 7 * LAYERS, **extra: Any) -> Case:
    def build(attention: str) -> nn.Module:
        return getattr(hf, model)(getattr(hf, config)(**DECODER, **extra, attn_implementation=attention))

    return Case(build, linears, LAYERS)


def gpt2(attention: str) -> nn.Module:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False, "bos_token_id": 0, "eos_token_id": 1}
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=HIDDEN, n_head=4, n_layer=LAYERS, vocab_size=VOCABULARY, attn_implementation=attention, **off)
    )


def bert(attention: str) -> nn.Module:
    return hf.BertModel(hf.BertConfig(vocab_size=VOCABULARY, attn_implementation=attention, **ENCODER))


def vit(attention: str) -> nn.Module:
    return hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, attn_implementation=attention, **ENCODER))


def t5(attention: str) -> nn.Module:
    sizes = {"d_model": HIDDEN, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": LAYERS, "vocab_size": VOCABULARY}
    config = hf.T5Config(**sizes, decoder_start_token_id=0, use_cache=False, dropout_rate=0.0)
    config._attn_implementation = attention
    return hf.T5ForConditionalGeneration(config)


CASES = {
    "llama": decoder("LlamaForCausalLM", "LlamaConfig"),
    "mistral": decoder("MistralForCausalLM", "MistralConfig"),
    "qwen3": decoder("Qwen3ForCausalLM", "Qwen3Config", head_dim=16),
    "gemma3": decoder("Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=16),
    "gpt2": Case(gpt2, 4 * LAYERS, LAYERS),
    "bert": Case(bert, 6 * LAYERS + 1, LAYERS),
    "vit": Case(vit, 6 * LAYERS + 1, LAYERS, "image"),
    "t5": Case(t5, (6 + 10) * LAYERS, 3 * LAYERS, "seq2seq"),
}
