"""The transformer layer that is timed: Hugging Face's Llama layer with random weights, built from a config."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

Shape = tuple[int, int]  # batch, length


@dataclass(frozen=True)
class LayerSize:
    hidden: int
    ffn: int
    heads: int
    kv_heads: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def gemms(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the layer's GEMMs, with those of the same input merged."""
        kv = self.kv_heads * self.head_size
        return {
            "qkv": (self.hidden + 2 * kv, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate and up": (2 * self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
        }

    def flops(self, shape: Shape) -> int:
        """FLOPs of forward and backward, which is twice forward: of the linears, and of causal attention's two products (half of
        each is masked and not counted). Recomputation in backward does not count."""
        batch, length = shape
        linears = 2 * batch * length * sum(n * k for n, k in self.gemms.values())
        attention = 2 * 2 * batch * length * length * self.hidden // 2
        return 3 * (linears + attention)


LLAMA_3_8B = LayerSize(hidden=4096, ffn=14336, heads=32, kv_heads=8)
TINY = LayerSize(hidden=64, ffn=128, heads=4, kv_heads=2)
SHAPES: tuple[Shape, ...] = ((1, 4096), (4, 2048), (16, 512), (1, 512))
TINY_SHAPES: tuple[Shape, ...] = ((1, 32),)
HOST_SHAPE: Shape = (1, 512)  # little work for the device: host overhead dominates


def spelled(shape: Shape) -> str:
    """
    >>> spelled((4, 2048))
    '4x2048'
    """
    return f"{shape[0]}x{shape[1]}"


class Layer(nn.Module):
    """A decoder layer that takes its rotary embedding as arguments: x [B, S, hidden] -> [B, S, hidden]."""

    def __init__(self, size: LayerSize) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        config = LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.ffn,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            head_dim=size.head_size,
            attn_implementation="sdpa",
        )
        self.layer = LlamaDecoderLayer(config, 0)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = self.layer(x, position_embeddings=(cos, sin))
        return out[0] if isinstance(out, tuple) else out


def llama_layer(size: LayerSize, device: torch.device) -> Layer:
    """A layer in bf16, with the same weights at every call."""
    torch.manual_seed(0)
    return Layer(size).to(device=device, dtype=torch.bfloat16)


def rotary(size: LayerSize, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [1, length, head_size] of Llama 3's rotary embedding (base 500000), bf16."""
    steps = torch.arange(0, size.head_size, 2, device=device, dtype=torch.float32) / size.head_size
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] / 500_000.0**steps
    whole = torch.cat([angles, angles], -1)[None]
    return whole.cos().bfloat16(), whole.sin().bfloat16()


def inputs(size: LayerSize, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """x, which requires grad as inside a stack of layers, and the gradient of the layer's output; both [B, S, hidden]."""
    generator = torch.Generator(device).manual_seed(1)
    x, dy = (torch.randn(*shape, size.hidden, device=device, generator=generator).bfloat16() for _ in range(2))
    return x.requires_grad_(), dy
