"""Reading graphs in ATen's operators, as AOTAutograd makes them, and the base of the passes over its graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Node

from te_dynamo.ir.graph import same_shape

aten = torch.ops.aten
COPIES = {aten.cat, aten.constant_pad_nd, aten._unsafe_view, aten._to_copy}  # element for element, though their tags do not say so


class GraphPass(CustomGraphPass):
    """version: of our code, which the caches' key must include."""

    def __init__(self, version: str) -> None:
        self.version = version

    def uuid(self) -> Any:
        return self.version


def calls(node: Any, *packets: Any) -> bool:
    """Whether it is a node that calls an overload of one of these operators."""
    return isinstance(node, Node) and isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in packets


def is_backward(node: Node) -> bool:
    return node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def is_elementwise(node: Node) -> bool:
    """Whether each element of its result is computed from single elements of its inputs, and the same each time."""
    if node.target is getattr or not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", "") == "getitem"
    pointwise = torch.Tag.pointwise in node.target.tags and torch.Tag.nondeterministic_seeded not in node.target.tags
    return pointwise or node.target.is_view or node.target.overloadpacket in COPIES


def alike(node: Node, *others: Node) -> bool:
    """Whether their values have one shape and one dtype."""
    value = node.meta["val"]
    return all(same_shape(o.meta["val"].shape, value.shape) and o.meta["val"].dtype == value.dtype for o in others)


def is_gathered(node: Any) -> bool:
    """Whether it consists of rows of a parameter."""
    return calls(node, aten.index, aten.embedding) and node.args[0].op == "placeholder"


def keeps_shape(node: Any) -> bool:
    """Whether it views something in its own shape."""
    return calls(node, aten.view) and same_shape(node.meta["val"].shape, node.args[0].meta["val"].shape)
