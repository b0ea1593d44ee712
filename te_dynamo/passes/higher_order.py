"""The higher-order operators whose sub-graphs are rewritten: activation checkpointing and compiled regions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from te_dynamo.ir.graph import submodules
from te_dynamo.ir.meta import PARAMETER
from te_dynamo.passes.weights import is_parameter, source_of

# Where the operands of the sub-graph begin among the operator's arguments.
OPERANDS = {torch.ops.higher_order.tag_activation_checkpoint: 1, torch.ops.higher_order.invoke_subgraph: 2}


@dataclass(frozen=True)
class BodyCall:
    """A call of a sub-graph: the node, the sub-graph, and its operands."""

    node: Node
    body: GraphModule
    operands: tuple[Node, ...]


def calls(gm: GraphModule) -> Iterator[BodyCall]:
    """The calls in `gm` of sub-graphs that are rewritten, in order."""
    bodies = {node: sub for node, _, sub in submodules(gm)}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in OPERANDS and node.args[0] in bodies:
            yield BodyCall(node, bodies[node.args[0]], tuple(node.args[OPERANDS[node.target] :]))


def rewritable_units(gm: GraphModule) -> list[GraphModule]:
    """`gm` and the sub-graphs that are rewritten, each once, innermost first."""
    found: list[GraphModule] = []

    def visit(module: GraphModule) -> None:
        for call in calls(module):
            if not any(call.body is other for other in found):
                visit(call.body)
        if not any(module is other for other in found):
            found.append(module)

    visit(gm)
    return found


def mark_parameters(gm: GraphModule) -> None:
    """Marks those placeholders of sub-graphs, which have no source of their own, that are parameters, and notes whose."""
    by_body: dict[int, list[BodyCall]] = {}
    for call in calls(gm):
        by_body.setdefault(id(call.body), []).append(call)
    for group in by_body.values():
        placeholders = [n for n in group[0].body.graph.nodes if n.op == "placeholder"]
        for i, placeholder in enumerate(placeholders):
            fed = [c.operands[i] if i < len(c.operands) else None for c in group]
            if all(isinstance(n, Node) and n.op == "placeholder" and is_parameter(n) for n in fed):
                placeholder.meta[PARAMETER] = True
                if len({source_of(n) for n in fed}) == 1:
                    placeholder._dynamo_source = getattr(fed[0], "_dynamo_source", None)
        mark_parameters(group[0].body)
