"""The models of the lab: each a function of batch and length that returns a model of one or two layers, and the arguments of a call.

They are built from fake tensors, with the sizes of the published models; embeddings are left out, so that only layers are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.model import LLAMA_3_8B, Layer

BF16 = torch.bfloat16
Made = tuple[nn.Module, Any]


@dataclass(frozen=True)
class Case:
    """name, shape: as in the table; target: the smallest acceptable speedup over Inductor, or None."""

    name: str
    make: Callable[[int, int], Made]
    batch: int
    length: int
    target: float | None

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.length}"


def embedded(batch: int, length: int, hidden: int) -> torch.Tensor:
    return torch.empty(batch, length, hidden, dtype=BF16, requires_grad=True)


def llama_layer(batch: int, length: int) -> Made:
    """One decoder layer with causal attention, as a stack of layers would call it."""
    tables = [torch.empty(1, length, LLAMA_3_8B.head_size, dtype=BF16) for _ in range(2)]
    return Layer(LLAMA_3_8B).to(BF16), (embedded(batch, length, LLAMA_3_8B.hidden), *tables)


def _hf(name: str, config: Any, hidden: int, batch: int, length: int, **inputs: Any) -> Made:
    import transformers

    model = getattr(transformers, name)._from_config(config, attn_implementation="sdpa", dtype=BF16)
    return model, {"inputs_embeds": embedded(batch, length, hidden), **inputs}


EIGHT_B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "use_cache": False,
}


def llama(batch: int, length: int) -> Made:
    """Hugging Face's model, which builds its own mask."""
    from transformers import LlamaConfig

    return _hf("LlamaModel", LlamaConfig(**EIGHT_B), 4096, batch, length)


def padded_llama(batch: int, length: int) -> Made:
    """The same with an `attention_mask`, whose values are not known."""
    from transformers import LlamaConfig

    mask = torch.empty(batch, length, dtype=torch.int64)
    return _hf("LlamaModel", LlamaConfig(**EIGHT_B), 4096, batch, length, attention_mask=mask)


def mistral(batch: int, length: int) -> Made:
    """Every layer has a sliding window."""
    from transformers import MistralConfig

    return _hf("MistralModel", MistralConfig(**EIGHT_B, sliding_window=1024), 4096, batch, length)


def qwen3(batch: int, length: int) -> Made:
    from transformers import Qwen3Config

    config = Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        num_hidden_layers=1,
        vocab_size=16,
        use_cache=False,
    )
    return _hf("Qwen3Model", config, 4096, batch, length)


def gemma3(batch: int, length: int) -> Made:
    """A layer with a sliding window, and one without."""
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=3840,
        intermediate_size=15360,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        sliding_window=1024,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size=16,
        use_cache=False,
    )
    return _hf("Gemma3TextModel", config, 3840, batch, length)


def gpt2_xl(batch: int, length: int) -> Made:
    from transformers import GPT2Config

    config = GPT2Config(n_embd=1600, n_head=25, n_layer=1, n_positions=length, vocab_size=16, use_cache=False)
    return _hf("GPT2Model", config, 1600, batch, length)


def bert_large(batch: int, length: int) -> Made:
    from transformers import BertConfig

    config = BertConfig(hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=1, vocab_size=16)
    return _hf("BertModel", config, 1024, batch, length)


def vit_large(batch: int, length: int) -> Made:
    """length: the side of the images, in pixels."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=1, image_size=length, patch_size=16
    )
    model = transformers.ViTModel._from_config(config, attn_implementation="sdpa", dtype=BF16)
    return model, {"pixel_values": torch.empty(batch, 3, length, length, dtype=BF16)}


def whisper_large(batch: int, length: int) -> Made:
    """length: of the text; the encoder has 1500 positions."""
    import transformers

    config = transformers.WhisperConfig(
        d_model=1280,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=20,
        decoder_attention_heads=20,
        encoder_ffn_dim=5120,
        decoder_ffn_dim=5120,
        num_mel_bins=128,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        use_cache=False,
    )
    model = transformers.WhisperModel._from_config(config, attn_implementation="sdpa", dtype=BF16)
    inputs = {"input_features": torch.empty(batch, 128, 3000, dtype=BF16), "decoder_inputs_embeds": embedded(batch, length, 1280)}
    return model, inputs


class _WithTables(nn.Module):
    """A Hugging Face decoder layer that takes the tables of its rotary embedding."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        out = self.layer(x, position_embeddings=(cos, sin))
        return out[0] if isinstance(out, tuple) else out


def _moe(family: str, hidden: int, rotary: int, **sizes: Any) -> Callable[[int, int], Made]:
    """A layer with experts, whose products are grouped GEMMs."""

    def make(batch: int, length: int) -> Made:
        import transformers

        config = getattr(transformers, f"{family}Config")(hidden_size=hidden, attn_implementation="sdpa", use_cache=False, **sizes)
        config._experts_implementation = "grouped_mm"
        modeling = import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
        layer = getattr(modeling, f"{family}DecoderLayer")(config, 0).to(BF16)
        tables = [torch.empty(1, length, rotary, dtype=BF16) for _ in range(2)]
        return _WithTables(layer), (embedded(batch, length, hidden), *tables)

    return make


mixtral = _moe(
    "Mixtral",
    4096,
    128,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    num_local_experts=8,
    num_experts_per_tok=2,
)
qwen3_moe = _moe(
    "Qwen3Moe",
    2048,
    128,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    moe_intermediate_size=768,
    intermediate_size=6144,
    num_experts=128,
    num_experts_per_tok=8,
    decoder_sparse_step=1,
    norm_topk_prob=True,
)
gpt_oss = _moe(
    "GptOss",
    2880,
    32,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    intermediate_size=2880,
    num_local_experts=32,
    num_experts_per_tok=4,
    sliding_window=128,
)
deepseek = _moe("DeepseekV3", 7168, 64, n_routed_experts=32, num_experts_per_tok=8, n_group=4, topk_group=2, first_k_dense_replace=0)


CASES = (
    Case("Llama-3-8B layer", llama_layer, 1, 4096, 1.50),
    Case("Llama-3-8B layer", llama_layer, 4, 2048, 1.60),
    Case("Llama-3-8B layer", llama_layer, 1, 512, 1.0),
    Case("Llama-3-8B", llama, 1, 4096, 1.70),
    Case("Llama-3-8B, padded batch", padded_llama, 8, 2048, None),
    Case("Mistral-7B, window of 1024", mistral, 1, 4096, None),
    Case("Qwen3-8B", qwen3, 1, 4096, 1.68),
    Case("Gemma3-12B", gemma3, 1, 4096, 1.66),
    Case("GPT-2 XL", gpt2_xl, 4, 1024, 1.42),
    Case("BERT-large", bert_large, 8, 512, 1.25),
    Case("ViT-L", vit_large, 64, 224, 1.2),
    Case("Whisper-large", whisper_large, 8, 448, 1.2),
    Case("Mixtral-8x7B layer", mixtral, 1, 4096, 1.40),
    Case("Mixtral-8x7B layer", mixtral, 4, 4096, 1.55),
    Case("DeepSeek-V3 layer, 32 experts", deepseek, 1, 4096, 1.30),
    Case("Qwen3-30B-A3B layer", qwen3_moe, 1, 4096, 1.0),
    Case("gpt-oss-20b layer", gpt_oss, 4, 4096, None),
)
