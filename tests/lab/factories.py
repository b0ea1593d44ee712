"""Factories for `python -m te_dynamo estimate` in the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """Its table is not a buffer, but must be on the GPU all the same."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.up, self.down = nn.Linear(hidden, 2 * hidden, bias=False), nn.Linear(2 * hidden, hidden, bias=False)
        self.tables = [torch.ones(hidden, dtype=torch.bfloat16)]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x)))) * self.tables[0]
        return y


def mlp(tokens: int = 4096, hidden: int = 2048) -> tuple[nn.Module, Tensor]:
    return Mlp(hidden).bfloat16(), torch.randn(tokens, hidden).bfloat16().requires_grad_()


def model_alone() -> nn.Module:
    return nn.Linear(16, 16)


def needs_values() -> Any:
    return nn.Linear(16, 16), torch.ones(1, 16) * torch.ones(()).item()


def keywords_of_no_dict() -> Any:
    return nn.Linear(16, 16), (), [1]


def by_keywords() -> Any:
    return nn.Linear(16, 16), {"input": torch.ones(2, 16)}


NUMBER = 3


class Windowed(nn.Module):
    """Attention with a sliding window of 256."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(512, 3 * 512, bias=False), nn.Linear(512, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:-1], 3, 8, 64).permute(2, 0, 3, 1, 4).unbind(0)
        row, column = (torch.arange(x.shape[1], device=x.device) for _ in range(2))
        mask = (column <= row[:, None]) & (column > row[:, None] - 256)
        y: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return y


def windowed() -> tuple[nn.Module, Tensor]:
    return Windowed().bfloat16(), torch.randn(2, 1024, 512).bfloat16().requires_grad_()


class Experts(nn.Module):
    """SwiGLU experts, their tokens already sorted."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * 0.02)
        self.down = nn.Parameter(torch.randn(experts, hidden, inner) * 0.02)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        gate, up = torch._grouped_mm(x, self.gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        y: Tensor = torch._grouped_mm(nn.functional.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        return y


def experts(count: int = 4, tokens: int = 8192, hidden: int = 2048, inner: int = 4096) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    ends = torch.arange(1, count + 1, dtype=torch.int32) * (tokens // count)
    return Experts(count, hidden, inner).bfloat16(), (torch.randn(tokens, hidden).bfloat16().requires_grad_(), ends)
