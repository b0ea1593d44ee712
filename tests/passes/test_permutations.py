"""Rows indexed by a permutation: found in every way that mixtures write it, with the gradients of torch's index; and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from te_dynamo import ops
from te_dynamo.backend import te_fp8
from te_dynamo.ir.graph import is_call
from te_dynamo.ir.permute import permute
from tests.pipeline import stages_of

T, H, E, K = 24, 16, 4, 2


class Experts(nn.Module):
    """A mixture: `there` sorts its tokens by expert, `back` restores their order."""

    def __init__(self, there: Callable[..., Any], back: Callable[..., Tensor]) -> None:
        super().__init__()
        self.there, self.back = there, back
        self.weight = nn.Parameter(torch.randn(E, H, H, dtype=torch.bfloat16) / 4)

    def forward(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        x = x * 2
        rows, shares, order, ends = self.there(x, experts, shares * 1.0)
        y = torch.nn.functional.grouped_mm(rows.bfloat16(), self.weight.transpose(-2, -1), offs=ends).float() * shares.unsqueeze(-1)
        return self.back(y, order).view(T, K, H).sum(1)


def ends_of(experts: Tensor) -> Tensor:
    return torch.cumsum(torch.histc(experts.float(), bins=E, min=0, max=E - 1), 0, dtype=torch.int32)


def by_sort(x: Tensor, experts: Tensor, shares: Tensor) -> Any:
    chosen, order = torch.sort(experts.reshape(-1))
    return x[order // K], shares.reshape(-1)[order], order, ends_of(chosen)


def by_argsort(x: Tensor, experts: Tensor, shares: Tensor) -> Any:
    order = experts.reshape(-1).argsort(stable=True)
    rows = x.index_select(0, torch.floor_divide(order, K))
    return rows, torch.index_select(shares.reshape(-1), 0, order), order, ends_of(experts.reshape(-1))


def written_out(y: Tensor, order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return y[inverse]


def sorted_again(y: Tensor, order: Tensor) -> Tensor:
    return y[order.argsort()]


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    scores = torch.rand(T, E)
    shares, experts = scores.topk(K)
    return torch.randn(T, H, requires_grad=True), experts, shares.detach().requires_grad_()


def found(model: nn.Module) -> list[Any]:
    recorded = stages_of(model, *inputs())
    return [n for n in recorded.graphs["fuse"].graph.nodes if is_call(n, ops.permute)]


@pytest.mark.parametrize("there", [by_sort, by_argsort])
@pytest.mark.parametrize("back", [written_out, sorted_again])
def test_each_spelling_is_read_and_right(there, back):
    torch.manual_seed(0)
    model = Experts(there, back)
    recorded = stages_of(model, *inputs())
    nodes = [n for n in recorded.graphs["fuse"].graph.nodes if is_call(n, ops.permute)]
    assert [n.kwargs["copies"] for n in nodes] == [K, 1, 1]
    assert nodes[2].args[2] is nodes[0].args[1]  # the inverse is passed
    results = []
    for stage in ("dynamo", "fuse"):
        gm = recorded.graphs[stage]
        given = {n.name: n for n in gm.graph.nodes if n.op == "placeholder"}
        x, experts, shares = inputs()
        values = [
            model.weight if "weight" in name else experts if "experts" in name else shares if "shares" in name else x for name in given
        ]
        (y,) = gm(*values)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, shares, model.weight])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)  # grouped_linear's definition rounds differently


def test_a_training_step_is_verified(no_codegen):
    torch.compiler.reset()
    x, experts, shares = inputs()
    torch.compile(Experts(by_sort, written_out), backend=te_fp8, options={"verify": True})(x, experts, shares).sum().backward()
    assert x.grad is not None


def test_transformers_mixtral_has_three():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, use_cache=False))
    recorded = stages_of(model, input_ids=torch.randint(0, 32, (2, 8)))
    assert sum(is_call(n, ops.permute) for n in recorded.graphs["fuse"].graph.nodes) == 3


def repeated(x: Tensor, experts: Tensor, shares: Tensor) -> Any:
    order = experts.reshape(-1)
    return x[order // K], shares.reshape(-1)[order], order, ends_of(order)


def shorter(x: Tensor, experts: Tensor, shares: Tensor) -> Any:
    _, shares, order, ends = by_sort(x, experts, shares)
    first = order[: T * K // 2].repeat(2)
    return x[first // K], shares, order, ends


def written_later(y: Tensor, order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    inverse[0] = 1
    return y[inverse]


def other_places(y: Tensor, order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(1, order.shape[0] + 1, device=order.device) - 1
    return y[inverse % 3]


def test_what_is_no_permutation_is_left():
    assert [n.kwargs["copies"] for n in found(Experts(repeated, lambda y, order: y))] == []
    assert [n.kwargs["copies"] for n in found(Experts(shorter, sorted_again))] == [1, 1]
    for back in (written_later, other_places):
        assert [n.kwargs["copies"] for n in found(Experts(by_sort, back))] == [K, 1]


def test_in_inference_it_is_inductor_s():
    model = Experts(by_sort, sorted_again).requires_grad_(False)
    x, experts, shares = inputs()
    with torch.no_grad():
        recorded = stages_of(model, x, experts, shares)
    assert not [n for n in recorded.graphs["fuse"].graph.nodes if is_call(n, ops.permute)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(1, 8), st.integers(0, 2**31), st.booleans())
def test_it_is_an_index_and_its_gradient(tokens, copies, seed, known):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tokens * copies, generator=generator)
    x = torch.randn(tokens, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    y = permute(x, order, order.argsort() if known else None, copies=copies)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    assert torch.equal(y, x[order // copies])
    torch.testing.assert_close(torch.autograd.grad(y, x, grad), torch.autograd.grad(x[order // copies], x, grad))


def test_copies_are_summed_in_float32():
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.tensor([[256.0], *[[0.75]] * 7], dtype=torch.bfloat16)
    (total,) = torch.autograd.grad(permute(x, torch.arange(8), copies=8), x, grad)
    assert total.item() == 262  # 261.25; summed one by one in bfloat16, each 0.75 would be lost or counted as 2


def test_there_and_back_is_the_identity():
    order = torch.randperm(50)
    x = torch.randn(50, 4)
    assert torch.equal(permute(permute(x, order), order.argsort(), order), x)
