"""One spelling for each operation, with bitwise equal values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from te_dynamo.passes.canonicalize import canonicalize
from te_dynamo.passes.spec import CANONICAL, check
from tests.capture import capture

SPELLINGS: dict[str, tuple[Callable[[Tensor], Any], tuple[Any, ...]]] = {
    "square": (lambda x: x.square(), (torch.pow, 2)),
    "torch.square": (lambda x: torch.square(input=x), (torch.pow, 2)),
    "**": (lambda x: x**2, (torch.pow, 2)),
    "x.__mul__": (lambda x: x.__mul__(3), (torch.mul, 3)),
    "1 / x": (lambda x: 1.0 / x, (torch.reciprocal,)),
    "1 + x": (lambda x: 1 + x, (torch.add, 1)),
    "torch.mul, number first": (lambda x: torch.mul(2.5, x), (torch.mul, 2.5)),
    "mean": (lambda x: x.mean(-1), (torch.mean, (2,), False)),
    "mean of several": (lambda x: torch.mean(x, dim=[-1, 0], keepdim=True), (torch.mean, (0, 2), True)),
    "sum": (lambda x: x.sum(dim=1, keepdim=True), (torch.sum, (1,), True)),
    "[:, None]": (lambda x: x[:, None], (torch.unsqueeze, 1)),
    "[..., None, :]": (lambda x: x[..., None, :], (torch.unsqueeze, 2)),
    "permute": (lambda x: x.permute(2, 0, 1), (torch.permute, (2, 0, 1))),
    "permute, keyword": (lambda x: torch.permute(x, dims=[2, 0, 1]), (torch.permute, (2, 0, 1))),
    "view": (lambda x: x.view(2, -1), (torch.reshape, (2, -1))),
    "reshape": (lambda x: torch.reshape(x, shape=(6, 4)), (torch.reshape, (6, 4))),
    "swapaxes": (lambda x: torch.swapaxes(x, 0, 1), (torch.transpose, 0, 1)),
    "unflatten": (lambda x: x.unflatten(-1, (2, 2)), (torch.unflatten, -1, (2, 2))),
    "softmax": (lambda x: F.softmax(x, dim=-1), (torch.softmax, -1)),
    "layer_norm": (lambda x: torch.layer_norm(x, (4,)), (F.layer_norm, (4,), None, None, 1e-5)),
}
VARIANCES: dict[str, tuple[Callable[[Tensor], Any], dict[str, Any]]] = {
    "default": (lambda x: x.var(-1), {"correction": 1, "keepdim": False}),
    "unbiased, by position": (lambda x: torch.var(x, 2, False, True), {"correction": 0, "keepdim": True}),
    "unbiased, keyword": (lambda x: x.std(-1, unbiased=False), {"correction": 0, "keepdim": False}),
    "correction": (lambda x: x.var(dim=(-1,), correction=2, keepdim=True), {"correction": 2, "keepdim": True}),
}


def one_call(fn: Callable[[Tensor], Any]) -> Any:
    """The one call in the canonical graph of `fn`, after a check that the graph's result is bitwise equal to that of `fn`."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        gm = capture(fn, x)
        canonicalize(gm)
        assert not check(gm, CANONICAL)
        results = [(y, *torch.autograd.grad(y, x, torch.randn_like(y))) for y in _runs(lambda a, gm=gm: gm(a)[0], fn, x)]
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*results, strict=True))
    (call,) = (n for n in gm.graph.nodes if n.op.startswith("call"))
    return call


def _runs(first: Callable[[Tensor], Any], second: Callable[[Tensor], Any], x: Tensor) -> Any:
    for fn in (first, second):
        torch.manual_seed(1)
        yield fn(x)


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_spelling(name: str):
    fn, expected = SPELLINGS[name]
    call = one_call(fn)
    assert (call.target, *call.args[1:]) == expected and not call.kwargs


@pytest.mark.parametrize("name", VARIANCES)
def test_variances(name: str):
    fn, expected = VARIANCES[name]
    call = one_call(fn)
    assert call.args[1] == (2,) and call.kwargs == expected


@pytest.mark.parametrize(
    ("fn", "target"),
    [
        (lambda x: x * x, torch.mul),  # its gradient is the sum of two
        (lambda x: x**0.5, torch.pow),  # and so is not sqrt
        (lambda x: x.sum(), torch.sum),
        (lambda x: x[:, None, 0], None),
    ],
)
def test_what_would_change_the_bits_stays(fn: Callable[[Tensor], Any], target: Any):
    x = torch.rand(2, 3, 4).requires_grad_()
    gm = capture(fn, x)
    before = [(n.args, n.kwargs) for n in gm.graph.nodes if n.op.startswith("call")]
    canonicalize(gm)
    calls = [n for n in gm.graph.nodes if n.op.startswith("call")]
    assert [(n.args, n.kwargs) for n in calls] == before and target in (None, calls[0].target)
