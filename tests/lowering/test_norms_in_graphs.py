"""A norm's attributes reach its implementation: each stage gives bitwise the result of the one before, and TE's kernel right gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_dynamo import ops
from te_dynamo.backend import observing, te_fp8
from te_dynamo.ir.graph import is_call
from te_dynamo.state import STATE
from tests import te_on_cpu
from tests.numerics import sqnr
from tests.pipeline import stages_of

SIZE = 32


@pytest.fixture(autouse=True)
def fresh(no_codegen: None) -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with STATE.set_aside():
        yield


class Llama(nn.Module):
    """Rounds before and after its weight is applied."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(SIZE) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * h.to(x.dtype)


class Gemma(nn.Module):
    """Rounds once; its weight is stored minus one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (h * (1.0 + self.weight.float())).type_as(x)


class Layer(nn.LayerNorm):
    def __init__(self) -> None:
        super().__init__(SIZE, eps=1e-3)
        nn.init.normal_(self.weight)
        nn.init.normal_(self.bias)


class Attends(nn.Module):
    """A norm before the fused q, k and v of an attention; and one whose result is used elsewhere too."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = norm(), norm()
        self.q, self.k, self.v, self.o, self.up = (nn.Linear(SIZE, SIZE) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = (linear(h).unflatten(-1, (2, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.second(x)
        return self.up(h) + h


@pytest.mark.parametrize("norm", [Llama, Gemma, Layer])
def test_fusing_planning_and_lowering_change_no_bit_of_a_norm(norm):
    """A graph of semantic operations runs in high precision. In the lowered graph, only the norms are compared, which Inductor computes."""
    x = torch.randn(2, 8, SIZE).bfloat16() * 3
    model = Attends(norm).bfloat16()
    recorded = stages_of(model, x)
    given = recorded.inputs
    (raised,) = recorded.graphs["raise"](*given)
    assert sqnr(model(x), raised) > 40
    for stage in ("fuse", "plan"):
        (found,) = recorded.graphs[stage](*given)
        assert torch.equal(found, raised), stage
    said = {
        stage: [{**n.kwargs} for n in gm.graph.nodes if is_call(n, ops.norm)]
        for stage, gm in recorded.graphs.items()
        if stage in ("raise", "lower")
    }
    assert len(said["raise"]) == 2 and said["lower"] == said["raise"]
    assert said["raise"][0]["round_before_weight"] is (torch.bfloat16 if norm is Llama else None)
    assert said["raise"][0]["zero_centered"] is (norm is Gemma)


@pytest.mark.parametrize("norm", [Gemma, Layer, lambda: nn.RMSNorm(SIZE, eps=0.1)], ids=["zero-centered", "layer", "rms"])
def test_te_s_norm_in_a_graph_has_the_gradients_of_the_model(norm: Any):
    reason = te_on_cpu.missing()
    if reason is not None:
        pytest.skip(reason)
    te_on_cpu.install()
    model, x, dy = nn.Sequential(norm(), nn.Linear(SIZE, 48)), torch.randn(64, SIZE), torch.randn(64, 48)
    exact = copy.deepcopy(model).double()
    sites: list[Any] = []
    call = torch.compile(model, backend=te_fp8, fullgraph=True, options={"provider": "te", "recipe": "delayed"})

    def results(run: Any, of: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
        of.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.backward(dy)
        return [y.detach(), leaf.grad, *(p.grad for p in of.parameters())]

    with observing(lambda gm, found, _: sites.extend(found.taken())):
        for _ in range(2):
            ours = results(call, model, x, dy)
    assert [s.detail["norm"] for s in sites if s.kind == "norm_linear"] == ["TE's kernel"]
    assert all(sqnr(a, b) > 21 for a, b in zip(results(exact, exact, x.double(), dy.double()), ours, strict=True))


class ReadBefore(nn.Module):
    """Another operation reads the norm's result, before the linear or after."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.norm, self.linear, self.before = nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE), before

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.before:
            return torch.relu(h) + self.linear(h)
        y = self.linear(h)
        return torch.relu(h) + y


@pytest.mark.parametrize("before", [False, True])
def test_a_norm_is_one_site_with_its_first_reader(before):
    found: list[Any] = []
    with observing(lambda gm, sites, _: found.extend(s.kind for s in sites.taken())):
        torch.compile(ReadBefore(before), backend=te_fp8, fullgraph=True)(torch.randn(16, SIZE))
    assert [kind for kind in found if "linear" in kind] == ["linear" if before else "norm_linear"]
