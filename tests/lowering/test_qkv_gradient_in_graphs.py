"""QK-norm and RoPE between a GEMM and the attention: in backward one kernel takes the gradient through both and writes it as that GEMM's
FP8 gradient. The graphs after AOTAutograd's partition, made and run on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_dynamo.backend import te_fp8
from te_dynamo.lowering.fp8 import E5M2
from te_dynamo.lowering.native.qkv import QKV
from tests.lowering.test_qkv_in_place import graphs, ours, results  # noqa: F401  (a fixture)
from tests.numerics import sqnr
from tests.partitioned import calls, casts

B, S, HEADS, GROUPS = 2, 32, 4, 2


class Attention(nn.Module):
    """norm: of each head of q and k, before RoPE, or after it if `last`."""

    def __init__(self, size: int = 64, norm: str = "", rope: bool = True, last: bool = False) -> None:
        super().__init__()
        self.size, self.norm, self.rope, self.last = size, norm, rope, last
        self.q, self.k, self.v = (nn.Linear(64, n * size, bias=False) for n in (HEADS, GROUPS, GROUPS))
        self.q_norm, self.k_norm = ({"rms": nn.RMSNorm, "layer": nn.LayerNorm}[norm](size) if norm else None for _ in range(2))
        self.o = nn.Linear(HEADS * size, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)) for f in (self.q, self.k, self.v))
        q, k = self.prepared(q, self.q_norm), self.prepared(k, self.k_norm)
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))

    def prepared(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        normed = x if norm is None or self.last else norm(x)
        turned = self.turned(normed.transpose(1, 2)) if self.rope else normed.transpose(1, 2)
        return norm(turned) if norm is not None and self.last else turned

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[2]), 1 / 10 ** torch.linspace(0, 1, self.size // 2)).repeat(1, 2).to(x.dtype)
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-b, a), -1) * angles.sin()


def made(**how: Any) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    model = Attention(**how).bfloat16()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2, mean=float(p.dim() == 1))
    return model, torch.randn(B, S, 64).bfloat16().requires_grad_()


def compiled(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch._dynamo.reset()
    return results(torch.compile(model, backend=te_fp8, fullgraph=True), model, x, steps=3)


@pytest.mark.parametrize("how", [{}, {"norm": "rms"}, {"norm": "layer", "size": 128}, {"norm": "rms", "rope": False}], ids=str)
def test_one_kernel_writes_it_both_ways(how, graphs, monkeypatch):  # noqa: F811
    model, x = made(**how)
    exact = Attention(**how).double()
    exact.load_state_dict(model.state_dict())
    expected = results(exact, exact, x.detach().double().requires_grad_())
    found = compiled(model, x)
    backward = graphs[1]
    assert len(calls(backward, ours.qkv_gradient.default)) == 1 and len(casts(backward, E5M2)) == 0
    monkeypatch.setattr(QKV, "hands_gradient_of", lambda self, case: False)
    without = compiled(model, x)
    assert not calls(graphs[3], ours.qkv_gradient.default)
    for e, f, w in zip(expected, found, without, strict=True):
        # No score depends on a bias that all keys share: its gradient is 0 plus noise.
        assert e.abs().max() < 1e-6 or sqnr(e, f) > sqnr(e, w) - 0.5, (sqnr(e, f), sqnr(e, w))


@pytest.mark.parametrize("how", [{"norm": "rms", "size": 32}, {"norm": "rms", "last": True}], ids=["half a tile", "norm last"])
def test_other_norms_are_left_to_inductor(how, graphs):  # noqa: F811
    model, x = made(**how)
    exact = Attention(**how).double()
    exact.load_state_dict(model.state_dict())
    expected = results(exact, exact, x.detach().double().requires_grad_())
    found = compiled(model, x)
    assert len(calls(graphs[0], ours.qkv.default)) == 1 and not calls(graphs[1], ours.qkv_gradient.default)
    assert min(sqnr(e, f) for e, f in zip(expected, found, strict=True)) > 17


def test_token_counts_of_any_size(graphs):  # noqa: F811
    model, _ = made(norm="rms")
    x, longer = (torch.randn(B, n * S + 9, 64).bfloat16().requires_grad_() for n in (2, 3))
    expected = compiled(model, x)
    torch._dynamo.reset()
    run = torch.compile(model, backend=te_fp8, fullgraph=True, dynamic=True)
    found = results(run, model, x, steps=3)
    known = len(graphs)
    assert len(calls(graphs[known - 1], ours.qkv_gradient.default)) == 1
    assert all(sqnr(e, f) > 40 for e, f in zip(expected, found, strict=True))
    assert all(t.isfinite().all() for t in results(run, model, longer)) and len(graphs) == known


def test_weights_that_learn_nothing_get_no_gradient(graphs):  # noqa: F811
    model, x = made(norm="rms")
    learned = compiled(model, x)
    model.q_norm.weight.requires_grad_(False)
    torch._dynamo.reset()
    run = torch.compile(model, backend=te_fp8, fullgraph=True)
    for _ in range(3):
        y = run(x)
        grad = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
        model.zero_grad()
        y.backward(grad)
    assert model.q_norm.weight.grad is None
    names = [name for name, _ in model.named_parameters()]
    assert sqnr(learned[2 + names.index("k_norm.weight")], model.k_norm.weight.grad) > 40
