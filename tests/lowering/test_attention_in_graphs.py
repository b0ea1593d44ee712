"""An attention's scale, mask, causality and heads reach the kernel that computes it, through the whole pipeline."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from te_dynamo.backend import observing, te_fp8
from te_dynamo.sites import Site
from te_dynamo.state import STATE
from tests import te_on_cpu
from tests.numerics import sqnr

BATCH, LENGTH, HEADS, SIZE = 2, 16, 4, 16
WIDTH = HEADS * SIZE


@pytest.fixture(autouse=True)
def fresh(no_codegen: None) -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with STATE.set_aside():
        yield


class Attention(nn.Module):
    def __init__(self, kv_heads: int = HEADS, **how: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, SIZE * heads, bias=False) for heads in (HEADS, kv_heads, kv_heads))
        self.o, self.how = nn.Linear(WIDTH, WIDTH, bias=False), how
        for p in self.parameters():
            nn.init.normal_(p, std=WIDTH**-0.5)  # q, k and v are about 1, so scores are about 4 times the scale

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        return self.o(scaled_dot_product_attention(q, k, v, mask, **self.how).transpose(1, 2).flatten(2))


def padding() -> Tensor:
    """The second sample is half as long as the first."""
    return (torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH // 2]]))[:, None, None]


def distances() -> Tensor:
    """An additive mask: each head prefers another direction."""
    step = torch.arange(LENGTH, dtype=torch.float32)
    return (step - step[:, None]) * torch.linspace(-1, 1, HEADS)[:, None, None]


HOW: dict[str, tuple[dict[str, Any], Any]] = {
    "scale": ({"scale": 1.0}, None),
    "causal, scale": ({"is_causal": True, "scale": 0.5}, None),
    "padding": ({}, padding),
    "distances, scale": ({"scale": 0.05}, distances),
    "shared heads": ({"enable_gqa": True, "kv_heads": 2, "scale": 0.6}, None),
}


def results(call: Any, model: nn.Module, x: Tensor, *given: Any) -> list[Tensor]:
    model.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    y = call(leaf, *given)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad for p in model.parameters())]


def compare(how: str, **options: Any) -> Site:
    """The site of the attention, after its results were compared with float64."""
    keywords, make = HOW[how]
    model, x = Attention(**keywords).bfloat16(), torch.randn(BATCH, LENGTH, WIDTH).bfloat16()
    mask = None if make is None else make()
    mask = mask.bfloat16() if mask is not None and mask.is_floating_point() else mask
    exact = copy.deepcopy(model).double()
    call, found = torch.compile(model, backend=te_fp8, fullgraph=True, options=options), list[Site]()
    with observing(lambda gm, sites, _: found.extend(s for s in sites.taken() if s.kind == "attention")):
        for _ in range(2):
            ours = results(call, model, x, mask)
    wanted = results(exact, exact, x.double(), mask if mask is None or mask.dtype == torch.bool else mask.double())
    # With linears and attention in FP8, a gradient passes four E5M2 roundings: above 11 dB. With a lost scale or mask: below 5.
    errors = [sqnr(a, b) for a, b in zip(wanted, ours, strict=True)]
    assert errors[0] > 17 and all(e > 10 for e in errors), errors
    (site,) = found
    return site


@pytest.mark.parametrize(("how", "recipe"), [*((how, "delayed") for how in HOW), ("scale", "current"), ("padding", "current")])
def test_fp8_by_definition(how, recipe):
    site = compare(how, provider="reference", attention="fp8", recipe=recipe)
    assert (site.provider, site.detail["precision"]) == ("reference", "fp8")


@pytest.mark.parametrize("attention", ["fp8", "high_precision"])
@pytest.mark.parametrize("how", HOW)
def test_by_te(how, attention):
    reason = te_on_cpu.missing()
    if reason is not None:
        pytest.skip(reason)
    te_on_cpu.install()
    with te_on_cpu.pretended((10, 0)):  # its FP8 attention can train heads of this size
        site = compare(how, provider="te", attention=attention)
    taken = site.detail.get("kernel", "").startswith("TE's fused attention")
    if attention == "fp8":
        assert taken == (HOW[how][1] is None), site.detail
        assert site.detail["precision"] == "fp8"
    else:
        assert taken == (how in ("scale", "causal, scale")), site.detail
