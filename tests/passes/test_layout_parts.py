"""The helpers that find layouts and masks, each against what torch does."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule

from te_dynamo import ops
from te_dynamo.ir.graph import EXAMPLE, copy_graph_module
from te_dynamo.ir.layout import in_memory
from te_dynamo.passes.layout import _indexed
from te_dynamo.passes.masks.proof import compare
from te_dynamo.passes.memory import first_copy

FULL = slice(None)


@pytest.mark.parametrize(
    "index",
    [
        0,
        FULL,
        None,
        (0, FULL),
        (FULL, 1),
        (FULL, None, 1),
        (None, FULL, 2),
        (..., 1),
        (..., None),
        (1, ..., None, 0),
        (FULL, FULL, 0, None),
    ],
    ids=str,
)
def test_where_a_dimension_was_before_it_was_indexed(index: Any):
    """Checked by strides: each dimension of x has a different one."""
    x = torch.empty(3, 5, 7, 11)
    y = x[index]
    for dim in range(y.dim()):
        before = _indexed(index, x.dim(), dim)
        assert y.stride(dim) == x.stride(before) if before is not None else y.shape[dim] == 1


def test_the_first_copy_is_the_one_next_to_the_gemm():
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    gemm = graph.call_function(ops.linears, (x, [w], [None]), {"out_dtype": torch.float32})
    y = graph.call_function(operator.getitem, (gemm, 0))
    view = graph.call_function(torch.unflatten, (y, -1, (2, 4)))
    first = graph.call_function(torch.mul, (view, 2.0))
    moved = graph.call_function(torch.transpose, (first, 0, 1))
    second = graph.call_function(torch.add, (moved, 1.0))
    for node in graph.nodes:
        node.meta[EXAMPLE] = torch.empty(4, 2, 4)
    assert first_copy(view) is None
    assert first_copy(moved).split()[0] == first.name
    assert first_copy(second).split()[0] == first.name


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("window", [0, 1, 3, 6])
def test_a_window_is_as_wide_as_it_is(window, added):
    """Row i attends to i - window up to i."""
    i, j = torch.arange(8)[:, None], torch.arange(8)
    sees = (j <= i) & (i - j <= window)
    mask = torch.zeros(8, 8).masked_fill(~sees, -torch.inf) if added else sees
    proof = compare(mask, 8, 8)
    assert proof is not None and (proof.kind, proof.window) == ("window", window)
    assert compare(mask[:, :7], 8, 7) is None and compare(~sees, 8, 8) is None
    assert compare(torch.ones(8, 8).tril().bool(), 8, 8).kind == "causal"


@pytest.mark.parametrize(("order", "name"), [((0, 1, 2), "bs3hd"), ((2, 1, 0), None), ((0, 2, 1), None), ((1, 0, 2), None)])
def test_parts_of_a_buffer_in_another_order_have_no_name(order, name):
    """Given a name, a kernel reads q, k and v one after the other."""
    parts = torch.randn(2, 8, 3, 4, 16).unbind(2)
    found = in_memory(*(parts[i].transpose(1, 2) for i in order))
    assert (None if found is None else found.name) == name


def test_what_is_noted_on_a_copy_is_not_noted_on_the_graph():
    graph = Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.relu, (x,)),))
    for node in graph.nodes:
        node.meta["list"] = 1
    gm = GraphModule({}, graph)
    for node in copy_graph_module(gm).graph.nodes:
        node.meta["list"] = node.meta["other"] = 2
    assert all(node.meta == {"list": 1} for node in gm.graph.nodes)
