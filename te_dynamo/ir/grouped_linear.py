"""A linear for each group of rows: the experts of a mixture, each applied to the tokens that were routed to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from te_dynamo.ir.graph import fake, fake_like
from te_dynamo.ir.op import Gemm, Invariant, operation
from te_dynamo.ir.sizes import same


def _fake(x: Tensor, weight: Tensor, offsets: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    return fake_like(x, (x.shape[0], weight.shape[1]), out_dtype)


def _fits(x: Tensor, weight: Tensor, offsets: Tensor) -> bool:
    return x.dim() == 2 and weight.dim() == 3 and same(x.shape[1:], weight.shape[2:]) and same(offsets.shape, weight.shape[:1])


def _gemms(node: Node) -> list[Gemm]:
    return [Gemm(node.args[0], node.args[1], None)]


def _attributes(node: Node, recipe: Any) -> dict[str, Any]:
    """inputs_first: whether the weights are stored as [E, K, N], as their gradients then should be."""
    weight = fake(node.args[1])
    return {"in_features": int(weight.shape[2]), "inputs_first": weight.stride(1) == 1 and weight.stride(2) != 1}


@operation(
    kind="grouped_linear",
    fake=_fake,
    forward=("input", "weight"),
    gradient=("grad_output",),
    gemms=_gemms,
    attributes_of=_attributes,
    invariants=(
        Invariant("x is [T, K], weight [E, N, K], offsets [E]", lambda a: _fits(a.x, a.weight, a.offsets)),
        Invariant("the result is [T, N] in out_dtype", lambda a: same(a.out.shape, (a.x.shape[0], a.weight.shape[1]))),
    ),
)
def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """Rows [offsets[e - 1], offsets[e]) of x times weight[e].T, like `torch.nn.functional.grouped_mm` with `weight.mT`.

    x: [T, K]; weight: [E, N, K]; offsets: int32 [E], where each group ends. Returns [T, N] in `out_dtype`. Rows after the last group are
    not read, and their results are unspecified, as in `grouped_mm`: zeros here.
    """
    x, weight = x.to(out_dtype), weight.to(out_dtype)
    group = torch.searchsorted(offsets.long(), torch.arange(x.shape[0], device=x.device), right=True)  # E after the last
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for e in range(weight.shape[0]):
        y = torch.where((group == e).unsqueeze(-1), x @ weight[e].t(), y)
    return y
