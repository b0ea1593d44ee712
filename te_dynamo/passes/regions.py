"""Inline regions of a Dynamo graph: autocast and grad mode are calls that stand before the nodes they govern."""

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
