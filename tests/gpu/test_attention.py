"""Attention in the layout that is chosen for its length, and that it computes the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.gpu.device import DEVICE
from tests.gpu.helpers import compiled, gradients, random, sites_of
from tests.numerics import sqnr

pytestmark = pytest.mark.gpu
HIDDEN, HEAD = 512, 64
HEADS = HIDDEN // HEAD


class Attention(nn.Module):
    def __init__(self, kv_heads: int, causal: bool) -> None:
        super().__init__()
        self.kv_heads, self.causal = kv_heads, causal
        self.q, self.o = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.k, self.v = (nn.Linear(HIDDEN, kv_heads * HEAD) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).view(*x.shape[:2], -1, HEAD).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.kv_heads != HEADS)
        return self.o(y.transpose(1, 2).reshape(x.shape))


CASES = [
    (HEADS, 256, "bs3hd", False),
    (HEADS, 1024, "bsh3d", True),
    (2, 256, "bshd_bs2hd", True),
    (2, 1024, "bshd_bsh2d", False),
]


@pytest.mark.parametrize(("kv_heads", "length", "layout", "causal"), CASES)
def test_layouts(provider, kv_heads, length, layout, causal):
    torch.manual_seed(0)
    model = Attention(kv_heads, causal).to(DEVICE, torch.bfloat16)
    x, dy = random(2, length, HIDDEN), random(2, length, HIDDEN, seed=2)
    exact = gradients(model, model, x, dy)
    run = compiled(model, provider=provider)
    (site,) = [s for s in sites_of(lambda: gradients(model, run, x, dy)) if s.kind == "attention"]
    assert site.layout == layout
    for _ in range(2):
        found = gradients(model, run, x, dy)
        for name, value in exact.items():
            if name != "k.bias":  # shifts all scores of a row equally: its gradient is noise
                assert sqnr(value, found[name]) > 14, name


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_layouts_alone_change_nothing(small_sites_too, kv_heads):
    """The linears are the same, and the attention is left alone."""
    torch.manual_seed(0)
    model = Attention(kv_heads, causal=True).to(DEVICE, torch.bfloat16)
    x, dy = random(2, 1024, HIDDEN), random(2, 1024, HIDDEN, seed=2)
    found = []
    for attention in ("high_precision", "off"):
        torch._dynamo.reset()
        found.append(gradients(model, compiled(model, provider="native", recipe="current", attention=attention), x, dy))
    for name, value in found[1].items():
        if name != "k.bias":
            assert sqnr(value, found[0][name]) > 20, name
