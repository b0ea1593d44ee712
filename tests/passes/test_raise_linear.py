"""Every spelling of a linear: found, left alone where it must be, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from te_dynamo import ops
from te_dynamo.passes.canonicalize import canonicalize
from te_dynamo.passes.raise_linear import LINEAR_RULES
from te_dynamo.passes.rules import apply
from te_dynamo.report.sites import Sites
from tests.capture import capture


def raised(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[GraphModule, list[Node], list[str]]:
    """The graph after the linear rules, its linears, and the reasons of what was declined. Checks that nothing changed."""
    gm = capture(fn, *args, **kwargs)
    inputs = gm.meta["example_inputs"]
    canonicalize(gm)
    expected = gm(*inputs)
    sites = Sites(strict=True)
    apply(LINEAR_RULES, gm, sites)
    gm.graph.lint()
    gm.recompile()
    for actual, wanted in zip(gm(*inputs), expected, strict=True):
        assert actual.dtype == wanted.dtype
        torch.testing.assert_close(actual, wanted)
        assert actual.stride() == wanted.stride()
    return gm, [n for n in gm.graph.nodes if n.target is ops.linear], [s.reason or "" for s in sites]


def test_nn_linear():
    gm, (node,), declined = raised(nn.Sequential(nn.Linear(8, 16)), torch.randn(2, 3, 8))
    assert not declined
    assert node.meta["te_path"] == "0"
    assert node.kwargs == {"out_dtype": torch.float32}
    assert not any(n.target is torch._C._nn.linear for n in gm.graph.nodes)


def test_f_linear_without_bias():
    weight = nn.Parameter(torch.randn(16, 8))
    _, (node,), _ = raised(lambda x: F.linear(x, weight), torch.randn(8))
    assert node.args[2] is None
