"""Models, and helpers to run, compare and inspect them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_dynamo.backend import observing, te_fp8
from te_dynamo.sites import Site
from tests.gpu.device import DEVICE


class MLP(nn.Module):
    """A norm, a gated activation, a residual: linears that share an input, with and without bias."""

    def __init__(self, hidden: int = 256, inner: int = 512) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def mlps(blocks: int = 2, dtype: torch.dtype = torch.bfloat16, hidden: int = 256) -> nn.Module:
    """A model with the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(*[MLP(hidden, 2 * hidden) for _ in range(blocks)]).to(DEVICE, dtype)


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=te_fp8, fullgraph=True, dynamic=False, options=options)


def sites_of(run: Callable[[], object]) -> list[Site]:
    """The sites that te_fp8 takes in the graphs that `run` compiles."""
    found: list[Site] = []
    with observing(lambda gm, sites, options: found.extend(sites.taken())):
        run()
    return found


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output of one forward and backward, and every gradient, by name."""
    model.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    y = run(leaf)
    y.backward(dy)
    assert leaf.grad is not None
    weights = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach().clone(), "dx": leaf.grad, **weights}
