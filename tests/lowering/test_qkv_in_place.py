"""q, k and v that go from the GEMM to the attention unchanged: one kernel writes their gradient as that GEMM's FP8 gradient. The graphs
after AOTAutograd's partition, made and run on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from te_dynamo import ops
from te_dynamo.backend import te_fp8
from te_dynamo.ir.graph import is_call
from te_dynamo.lowering.fp8 import E5M2
from tests.numerics import sqnr
from tests.partitioned import calls, casts, interpreted
from tests.pipeline import stages_of

ours = torch.ops.te_dynamo
B, S, HEADS, SIZE = 2, 32, 4, 16
WIDTH = HEADS * SIZE


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("te_dynamo.passes.fuse.kernels_write_gradients", lambda attention: True)


class Attention(nn.Module):
    """packed: q, k and v are one linear."""

    def __init__(self, *, packed: bool = False, bias: bool = True, reads_q: bool = False, cross: bool = False) -> None:
        super().__init__()
        self.packed, self.reads_q, self.cross = packed, reads_q, cross
        sizes = (3,) if packed else (1, 1, 1)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, n * WIDTH, bias=bias) for n in sizes)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv[0](x).split(WIDTH, -1) if self.packed else [f(x * 2 if self.cross and i else x) for i, f in enumerate(self.qkv)]
        q, k, v = (t.unflatten(-1, (-1, SIZE)).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2)) + (parts[0].mean() if self.reads_q else 0)


def made(**how: Any) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    model = Attention(**how).bfloat16()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model, torch.randn(B, S, WIDTH).bfloat16().requires_grad_()


def results(run: Any, model: nn.Module, x: Tensor, steps: int = 1) -> list[Tensor]:
    for _ in range(steps):
        y = run(x)
        grad = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
        found = [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], grad)]
    return found


@pytest.fixture
def graphs() -> Iterator[list[GraphModule]]:
    with interpreted("qkv") as given:
        yield given


@pytest.mark.parametrize("how", [{}, {"packed": True}, {"bias": False}], ids=["three linears", "one", "no bias"])
def test_one_kernel_writes_it_both_ways(how, graphs, monkeypatch):
    model, x = made(**how)
    exact = Attention(**how).double()
    exact.load_state_dict(model.state_dict())
    expected = results(exact, exact, x.detach().double().requires_grad_())
    torch._dynamo.reset()
    found = results(torch.compile(model, backend=te_fp8, fullgraph=True), model, x, steps=3)
    backward = graphs[1]
    assert len(calls(backward, ours.qkv_gradient.default)) == 1
    assert not calls(backward, torch.ops.aten.cat.default) and len(casts(backward, E5M2)) == 0
    assert not calls(graphs[0], ours.qkv.default)  # nothing is copied before the attention
    monkeypatch.setattr("te_dynamo.passes.fuse.kernels_write_gradients", lambda attention: False)
    torch._dynamo.reset()
    without = results(torch.compile(model, backend=te_fp8, fullgraph=True), model, x, steps=3)
    assert not calls(graphs[3], ours.qkv_gradient.default)
    for e, f, w in zip(expected, found, without, strict=True):
        # No score depends on a bias of k: its gradient is 0 plus noise.
        assert e.abs().max() < 1e-6 or sqnr(e, f) > sqnr(e, w) - 0.5, (sqnr(e, f), sqnr(e, w))


def in_place(model: nn.Module, x: Tensor, **options: Any) -> int:
    fused = stages_of(model, x, options=options).graphs["fuse"]
    return sum(is_call(n, ops.qkv) and n.kwargs["in_place"] for n in fused.graph.nodes)


def test_only_where_the_gradient_could_be_handed_over():
    assert in_place(*made()) == in_place(*made(packed=True)) == 1
    assert in_place(*made(reads_q=True)) == 0  # q's gradient has another source too
    assert in_place(*made(cross=True)) == 0  # two GEMMs
    assert in_place(*made(), skip=["qkv.0"]) == 0
    model, x = made()
    with torch.no_grad():
        assert in_place(model, x) == 0
    model, x = made()
    model.forward = lambda x: Attention.forward(model, x.repeat(1, 20, 1))  # above the short length heads interleave
    assert in_place(model, x) == 0


@pytest.mark.parametrize(("batch", "read"), [(2, slice(None, None, 2)), (1, slice(16))], ids=["every second", "the first"])
def test_the_gradient_of_some_of_the_tokens_is_inductor_s(batch, read, graphs):
    class Sliced(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x)[:, read].unflatten(-1, (-1, SIZE)).transpose(1, 2) for f in self.qkv)
            return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, x = Sliced().bfloat16(), torch.randn(batch, S, WIDTH).bfloat16().requires_grad_()
    exact = Sliced().double()
    exact.load_state_dict(model.state_dict())
    expected = results(exact, exact, x.detach().double().requires_grad_())
    torch._dynamo.reset()
    found = results(torch.compile(model, backend=te_fp8, fullgraph=True), model, x, steps=3)
    assert not calls(graphs[1], ours.qkv_gradient.default)
    assert all(e.abs().max() < 1e-6 or sqnr(e, f) > 14 for e, f in zip(expected, found, strict=True))


def test_the_graph_is_what_it_was():
    model, x = made(packed=True)
    recorded = stages_of(model, x)
    outputs = []
    for stage in ("dynamo", "fuse"):
        gm = recorded.graphs[stage]
        names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
        state = dict(model.named_parameters())
        given = [
            next((p for name, p in state.items() if name.replace(".", "_modules_") in n.replace("_parameters_", "_modules_")), x)
            for n in names
        ]
        outputs.append(gm(*given)[0])
    assert torch.equal(*outputs)
