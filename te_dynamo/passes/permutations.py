"""Stage 3, experts: selecting rows by a permutation becomes `ops.permute`, whose gradient selects them in the inverse order.

A permutation is the result of `sort` or `argsort` of a vector, or its inverse: by `argsort`, or as `inverse[order] = arange(n)`.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from te_dynamo import ops
from te_dynamo.ir.graph import emit, erase_if_dead, fake, is_call, is_method, same_size, tensor
from te_dynamo.passes.effects import writes, written_between
from te_dynamo.passes.regions import transformed

EMPTY = (torch.empty_like, torch.zeros_like)
FLOOR = (operator.floordiv, torch.floor_divide)


class _Permutation(NamedTuple):
    """nodes: those that `order` is computed from, besides what it sorts."""

    order: Node
    inverse: Node | None
    nodes: tuple[Node, ...]


def use_permutations(graph: Graph, where: dict[Node, tuple[int, bool]]) -> None:
    """Rewrites a graph that has experts, in place. where: of each node, its region and whether gradients are enabled there."""
    if not any(is_call(node, ops.grouped_linear) for node in graph.nodes):
        return
    inside = transformed(graph)
    for node in list(graph.nodes):
        chosen = _chosen(node) if node not in inside else None
        if chosen is None or not where[node][1] or not fake(node).requires_grad:
            continue
        x, copies = chosen[0], 1
        index: Any = chosen[1]
        if is_call(index, *FLOOR) and isinstance(index.args[1], int) and index.args[1] > 0:
            index, copies = index.args
        found = _permutation(index, node)
        rows = fake(x).shape[0] * copies
        if found is None or not same_size(rows, fake(index).shape[0]) or written_between([*found.nodes, node]) is not None:
            continue
        with graph.inserting_before(node):
            new = emit(graph, ops.permute, (x, found.order, found.inverse), {"copies": copies}, like=node, value=fake(node))
        node.replace_all_uses_with(new)
        erase_if_dead(graph, [chosen[1], node])


def _chosen(node: Node) -> tuple[Node, Node] | None:
    """x and index of `x[index]`, a vector of rows."""
    x: Any
    index: Any
    if is_call(node, operator.getitem):
        x, index = node.args
    elif (is_call(node, torch.index_select) or is_method(node, "index_select")) and len(node.args) == 3 and node.args[1] == 0:
        x, _, index = node.args
    else:
        return None
    value = tensor(index) if isinstance(index, Node) else None
    return (x, index) if value is not None and value.dim() == 1 and value.dtype == torch.int64 and tensor(x) is not None else None


def _permutation(node: Any, reader: Node) -> _Permutation | None:
    """The permutation that an index is when `reader` reads it; None if it is not known to be one."""
    if (sorted_by := _sorted(node)) is not None:
        before = _permutation(sorted_by, reader)  # sorting a permutation inverts it
        return _Permutation(node, before and before.order, (node, *(before.nodes if before else ())))
    if not is_call(node, *EMPTY):
        return None
    writers = [user for user in node.users if any(written is node for written in writes(user))]
    if len(writers) != 1 or not is_call(writers[0], operator.setitem) or not writers[0] < reader:
        return None
    _, order, places = writers[0].args
    before = _permutation(order, writers[0])
    if before is None or not _counts(places) or not same_size(fake(node).shape[0], fake(order).shape[0]):
        return None
    return _Permutation(node, before.order, (node, writers[0], *before.nodes))


def _sorted(node: Any) -> Node | None:
    """The vector whose sorting order `node` is."""
    if is_call(node, operator.getitem) and node.args[1] == 1 and (is_call(node.args[0], torch.sort) or is_method(node.args[0], "sort")):
        given = node.args[0].args[0]
    elif is_call(node, torch.argsort) or is_method(node, "argsort"):
        given = node.args[0]
    else:
        return None
    value = tensor(given)
    return given if value is not None and value.dim() == 1 else None


def _counts(node: Any) -> bool:
    """Whether a vector is 0, 1, 2, ..."""
    return is_call(node, torch.arange) and (len(node.args) == 1 or (len(node.args) == 2 and node.args[0] == 0))
