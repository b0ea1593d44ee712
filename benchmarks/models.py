"""The models to measure, with random weights."""

from __future__ import annotations

import torch
from torch import nn


def tiny_llama(layers: int, hidden: int = 64, length: int = 32) -> tuple[nn.Module, torch.Tensor]:
    """A Llama with small layers, which compile as slowly as large ones, and its input."""
    return _tiny("Llama", layers, hidden, length)


def tiny_mixtral(layers: int, hidden: int = 64, length: int = 32) -> tuple[nn.Module, torch.Tensor]:
    """A Mixtral with small layers, each of four experts, of which two compute a token, and its input."""
    return _tiny("Mixtral", layers, hidden, length, num_local_experts=4, num_experts_per_tok=2)


def _tiny(architecture: str, layers: int, hidden: int, length: int, **experts: int) -> tuple[nn.Module, torch.Tensor]:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=layers,
        vocab_size=256,
        use_cache=False,
        attn_implementation="sdpa",
        **experts,
    )
    return getattr(transformers, f"{architecture}ForCausalLM")(config).bfloat16(), torch.randint(0, 256, (2, length))


def llama(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """A Llama that spends its time in GEMMs, and 4 x 256 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=4,
        vocab_size=256,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype), torch.randint(0, 256, (4, 256))


class Chain(nn.Module):
    """A sequence of linears."""

    def __init__(self, sites: int, size: int = 16, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, dtype=dtype) for _ in range(sites))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
