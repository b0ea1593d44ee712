"""Inline regions of a Dynamo graph: autocast, grad mode and torch.func's transforms are calls that precede the nodes they govern."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from te_dynamo.ir.graph import is_call

AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
SET_GRAD = torch._C._set_grad_enabled


def regions(graph: Graph, grad_enabled: bool) -> dict[Node, tuple[int, bool]]:
    """For each node, (a number that changes with every switch of autocast or grad mode, whether grad is enabled there)."""
    number, result = 0, {}
    for node in graph.nodes:
        if is_call(node, SET_GRAD):
            number, grad_enabled = number + 1, bool(node.args[0])
        elif is_call(node, *AUTOCAST):
            number += 1
        result[node] = (number, grad_enabled)
    return result


def transformed(graph: Graph) -> set[Node]:
    """The nodes inside torch.func's transforms (vmap, grad, vjp, jvp, jacrev, ...) or at a level of forward-mode derivatives."""
    depth, result = 0, set()
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        depth += name.endswith(("_increment_nesting", "_enter_dual_level"))
        depth -= name.endswith(("_decrement_nesting", "_exit_dual_level"))
        if depth:
            result.add(node)
    return result
