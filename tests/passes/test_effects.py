"""What a node is said to write, against what its call actually writes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from te_dynamo.ir.graph import EXAMPLE
from te_dynamo.passes.effects import draws, writes, written_between

aten = torch.ops.aten
X, Y = "x", "y"  # stand for two inputs
CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "relu": (F.relu, (X,), {}),
    "relu in place, by position": (F.relu, (X, True), {}),
    "relu in place, by name": (F.relu, (X,), {"inplace": True}),
    "relu not in place, by position": (F.relu, (X, False), {}),
    "dropout": (F.dropout, (X, 0.5, True), {}),
    "dropout in place": (F.dropout, (X, 0.5, True, True), {}),
    "silu in place": (F.silu, (X, True), {}),
    "elu, alpha": (F.elu, (X, 2.0), {}),
    "elu in place": (F.elu, (X, 2.0, True), {}),
    "hardtanh, bounds": (F.hardtanh, (X, -1.0, 1.0), {}),
    "hardtanh in place": (F.hardtanh, (X, -1.0, 1.0, True), {}),
    "leaky_relu in place": (F.leaky_relu, (X, 0.1, True), {}),
    "a method in place": ("add_", (X, Y), {}),
    "a method": ("add", (X, Y), {}),
    "an operator's method in place": ("__iadd__", (X, Y), {}),
    "an operator's method": ("__add__", (X, Y), {}),
    "a list in place": (torch._foreach_mul_, ([X, Y], 2.0), {}),
    "a list": (torch._foreach_mul, ([X, Y], 2.0), {}),
    "a function in place": (torch.relu_, (X,), {}),
    "+=": (operator.iadd, (X, Y), {}),
    "+": (operator.add, (X, Y), {}),
    "and": (operator.and_, ("i", "i"), {}),
    "setitem": (operator.setitem, (X, 0, 1.0), {}),
    "getitem": (operator.getitem, (X, 0), {}),
    "out": (torch.add, (X, X), {"out": Y}),
    "outs": (torch.sort, (X,), {"out": (Y, "i")}),
    "an overload in place": (aten.mul_.Tensor, (X, Y), {}),
    "an overload": (aten.mul.Tensor, (X, Y), {}),
    "a packet in place": (aten.mul_, (X, Y), {}),
    "an overload that writes its second argument": (aten._foreach_copy_.default, ([X], [Y]), {}),
}


def node_of(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Node, dict[Node, Tensor]]:
    """The call as a node, and a tensor for each of its inputs."""
    graph = Graph()
    values = {X: torch.randn(4), Y: torch.randn(4), "i": torch.arange(4)}
    nodes = {name: graph.placeholder(name) for name in values}
    for name, node in nodes.items():
        node.meta[EXAMPLE] = values[name]

    def given(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(given, value))
        return nodes[value] if isinstance(value, str) else value

    kind = "call_method" if isinstance(target, str) else "call_function"
    made = graph.create_node(kind, target, given(args), {k: given(v) for k, v in kwargs.items()})
    return made, {nodes[name]: value for name, value in values.items()}


@pytest.mark.parametrize("name", CALLS)
def test_it_writes_what_the_call_writes(name):
    node, values = node_of(*CALLS[name])
    versions = {n: t._version for n, t in values.items()}
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    function: Callable[..., Any] = node.target if callable(node.target) else getattr(Tensor, node.target)
    function(*args, **kwargs)
    assert set(writes(node)) == {n for n, t in values.items() if t._version != versions[n]}


def test_a_write_to_a_view_lies_between():
    graph, x = Graph(), torch.randn(4)
    source = graph.placeholder("x")
    nodes = [graph.call_function(torch.exp, (source,)), graph.call_function(operator.getitem, (source, slice(2)))]
    nodes += [graph.call_function(F.relu, (nodes[1], True)), graph.call_function(torch.mul, (nodes[0], source))]
    for node, value in zip((source, *nodes), (x, x.exp(), x[:2], x[:2], x), strict=True):
        node.meta[EXAMPLE] = value
    exp, _, relu, product = nodes
    assert written_between([exp, product]) is relu
    relu.args = (relu.args[0], False)
    assert written_between([exp, product]) is None


DRAWS = {
    "dropout": (lambda x: F.dropout(x, 0.5), True),
    "dropout of channels": (lambda x: F.dropout1d(x, 0.5), True),
    "gumbel": (lambda x: F.gumbel_softmax(x), True),
    "a method": (lambda x: x.bernoulli(), True),
    "made": (lambda x: x + torch.rand(3), True),
    "attention with dropout": (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), True),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.0), False),
    "nothing": (lambda x: torch.relu(x) + torch.zeros(3), False),
}


@pytest.mark.parametrize("name", DRAWS)
def test_what_draws_random_numbers(name):
    function, expected = DRAWS[name]
    graphs: list[Graph] = []
    torch._dynamo.reset()
    torch.compile(function, backend=lambda gm, _: graphs.append(gm.graph) or gm, fullgraph=True)(torch.rand(2, 3, 3))
    assert draws(graphs[0]) == expected
