"""What a node writes, whether a write comes between the nodes of a pattern, and whether a graph draws random numbers."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from te_dynamo.ir.graph import tensor

INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul", "ilshift", "irshift")
)
INPLACE_METHODS = frozenset(f"__{function.__name__.strip('_')}__" for function in INPLACE_OPERATORS)  # `x.__iadd__(y)`


RANDOM = {"gumbel_softmax", "fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices"}  # functions of several operators


@cache
def _is_random(name: str) -> bool:
    """Whether a function or method of this name draws random numbers whatever its arguments are."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, o) for o in packet.overloads()] if isinstance(packet, torch._ops.OpOverloadPacket) else []
    return "dropout" in name or name in RANDOM or any(torch.Tag.nondeterministic_seeded in o.tags for o in overloads)


def draws(graph: Graph) -> bool:
    """Whether a graph draws random numbers. Inactive dropout has been removed from it."""
    return any(_draws(node) for node in graph.nodes if node.op in ("call_function", "call_method"))


def _draws(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == F.scaled_dot_product_attention.__name__:
        return bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0))
    return bool(node.kwargs.get("dropout_p")) or _is_random(name)


@cache
def _inplace_position(target: Any) -> int | None:
    """Where a Python function such as `F.relu` takes its `inplace` flag."""
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def writes(node: Node) -> list[Node]:
    """The argument nodes whose memory `node` writes."""
    if node.op not in ("call_function", "call_method"):
        return []
    written = _nodes(node.kwargs.get("out"))
    first = _nodes(node.args[0]) if node.args else []  # a list of tensors in torch._foreach_mul_
    target = node.target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        overload = target if isinstance(target, torch._ops.OpOverload) else getattr(target, target.overloads()[0])
        for i, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += _nodes(node.args[i] if i < len(node.args) else node.kwargs.get(argument.name))
        return written
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    by_name = name.endswith("_") and not name.endswith("__") and getattr(operator, name, None) is not target  # operator.and_
    if by_name or name in INPLACE_METHODS or target in INPLACE_OPERATORS or target is operator.setitem:
        written += first
    elif first and node.op == "call_function":
        position = _inplace_position(target)
        if position is not None and (node.kwargs.get("inplace") or (len(node.args) > position and node.args[position])):
            written += first
    return written


def written_memory(graph: Graph) -> set[int | None]:
    """The memory that a graph writes, as `storage` has it."""
    return {storage(w) for n in graph.nodes for w in writes(n)}


def _nodes(argument: Any) -> list[Node]:
    """The nodes of an argument: itself, or those in a list."""
    return [n for n in (argument if isinstance(argument, (list, tuple)) else [argument]) if isinstance(n, Node)]


def storage(node: Any) -> int | None:
    """An identity of the memory behind a node's fake value: equal for a tensor and its views."""
    value = tensor(node)
    try:
        return None if value is None else value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, or a wrapper subclass without storage
        return None


def written_between(nodes: Iterable[Node]) -> Node | None:
    """The first node that writes memory of a pattern's values or inputs after the pattern's first node and before its last.
    None where there is no such write."""
    members = set(nodes)
    memory = {storage(n) for m in members for n in (m, *m.all_input_nodes)} - {None}
    node, last = min(members), max(members)
    while node is not last:
        if node not in members and any(storage(w) is None or storage(w) in memory for w in writes(node)):
            return node
        node = node.next
    return None
