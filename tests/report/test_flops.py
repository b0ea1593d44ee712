"""The FLOPs of a report, against those that torch counts in the eager model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import te_dynamo

pytestmark = pytest.mark.usefixtures("no_codegen")


def llama_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(32), nn.Linear(32, 48)
        self.scale, self.second = nn.Parameter(torch.ones(48)), nn.Linear(48, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(llama_norm(torch.tanh(self.first(self.norm(x))), self.scale))


LEARNS = {
    "all": ["norm.weight", "norm.bias", "first.weight", "first.bias", "scale", "second.weight", "second.bias"],
    "the first norm": ["norm.weight"],
    "the second norm": ["scale"],
    "a norm's bias and the last linear": ["norm.bias", "second.weight"],
    "the last linear": ["second.weight"],
    "a bias": ["first.bias"],
}


@pytest.mark.parametrize("skip", [(), ("*",), ("first",)], ids=["FP8", "high precision", "mixed"])
@pytest.mark.parametrize("learns", LEARNS)
def test_what_learns_decides_how_many_gemms_backward_has(learns, skip):
    torch._dynamo.reset()
    model, x = Model(), torch.randn(16, 32)
    for name, p in model.named_parameters():
        p.requires_grad_(name in LEARNS[learns])
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    report = te_dynamo.explain(model, x, backward=True, options={"skip": skip})
    assert report.counted_flops == counter.get_total_flops()
