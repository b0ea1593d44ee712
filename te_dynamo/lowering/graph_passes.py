"""The passes over the joint graph that AOTAutograd makes, forward and backward together, before it is partitioned, and over what Inductor
lowers."""

from __future__ import annotations

import operator
from itertools import groupby
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from te_dynamo.lowering import opaque, scalars  # noqa: F401  (register their operators)
from te_dynamo.lowering.aten import GraphPass
from te_dynamo.lowering.inline import InlineGradients
from te_dynamo.lowering.kept_inputs import ActivationsInFP8
from te_dynamo.lowering.quantize_rows import Apart
from te_dynamo.lowering.saved_sums import SavedSums

SITES = (torch.ops.te_dynamo.site_fwd.default, torch.ops.te_dynamo.site_bwd.default)


def joint_graph_passes(version: str, before: Any) -> CustomGraphPass:
    """All of them, after those in `config.joint_custom_pre_pass` (`before`). version: of our code, which the caches' key must include."""
    return _after(before, *(each(version) for each in (OneMeasurement, Apart, ActivationsInFP8, SavedSums)))


def last_passes(version: str, before: Any) -> CustomGraphPass:
    """Those over each graph that Inductor lowers, after those in `config.post_grad_custom_post_pass`."""
    return _after(before, InlineGradients(version))


def _after(before: Any, *passes: CustomGraphPass) -> CustomGraphPass:
    given = [] if before is None else before if isinstance(before, (list, tuple)) else [before]
    return InOrder(*given, *passes)


class InOrder(CustomGraphPass):
    """Several passes as one: torch 2.11's configuration takes only one."""

    def __init__(self, *passes: Any) -> None:
        self.passes = passes

    def uuid(self) -> Any:
        """None, which means "do not cache", if a pass is a plain function."""
        known = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return None if None in known else tuple(known)

    def __call__(self, graph: Graph) -> None:
        for each in self.passes:
            each(graph)


class OneMeasurement(GraphPass):
    """Merges the last step of computing a graph's amaxes, a small kernel for each site, into one for each direction:
    `cat([largest(a), largest(b), ...])` becomes `largest(a + b + ...)`, and a `cat` of amaxes that operators on a CPU computed becomes one
    call. Otherwise Inductor would generate a loop for each part, as much code as for the rest of a model with many layers.

    Sites cannot do it themselves: autograd requires each to return its own gradients' amaxes.
    """

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
            _measure_once(graph, node)
            _join_once(node)
        graph.lint()


def _measure_once(graph: Graph, cat: Node) -> None:
    inputs = [_source(n) for n in cat.args[0]]
    if sum(_is_largest(n) for n in inputs) < 2:
        return
    joined: list[Node] = []
    for measured, run in groupby(inputs, _is_largest):
        nodes = list(run)
        joined += [_join(graph, cat, nodes)] if measured else nodes
    cat.args = (joined, *cat.args[1:])
    for node in inputs:
        if not node.users:
            graph.erase_node(node)


def _join_once(cat: Node) -> None:
    joined = cat.meta["val"]
    if joined.device.type == "cpu" and joined.dim() == 1 and sum(_is_measured(_source(n)) for n in cat.args[0]) > 1:
        cat.target, cat.args = torch.ops.te_dynamo.joined.default, cat.args[:1]


def _is_measured(node: Node) -> bool:
    """Whether it is the amaxes of an opaque site: the first result of its operator."""
    return bool(node.target is operator.getitem and node.args[1] == 0 and getattr(node.args[0], "target", None) in SITES)


def _join(graph: Graph, cat: Node, nodes: list[Node]) -> Node:
    parts = list(dict.fromkeys(p for n in nodes for p in n.args[0]))
    which = [parts.index(n.args[0][i]) for n in nodes for i in n.args[1]]
    with graph.inserting_before(cat):
        node = graph.call_function(torch.ops.te_dynamo.largest.default, (parts, which))
    node.meta["val"] = nodes[0].meta["val"].new_empty(len(which))
    return node


def _is_largest(node: Node) -> bool:
    return node.target is torch.ops.te_dynamo.largest.default


def _source(node: Node) -> Node:
    while node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
        node = node.args[0]  # type: ignore[assignment]
    return node
