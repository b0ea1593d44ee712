"""Stage 2, linears: every spelling of an activation times a weight becomes `ops.linear`.

A rule finds which operand is the weight and in which order its dimensions stand; what may be taken is decided once,
for all spellings, in `_unusable`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.fx import Graph, Node

from te_dynamo import ops
from te_dynamo.passes.graph import emit, tensor
from te_dynamo.passes.rules import Declined, Match, Rule
from te_dynamo.passes.weights import depends_on_weights_only, origin, path_of, weight_of
from te_dynamo.report.sites import module_path

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, FakeTensor})


def _not_a_weight(weight: Any) -> Declined | None:
    """Why an operand that stands where a weight would is none that can be taken; None where it is an activation."""
    root, _ = origin(weight)
    if root is not None and root.op == "get_attr":
        return Declined("the weight is a constant, frozen in the graph")
    return Declined("the weight is computed in the graph") if depends_on_weights_only(weight) else None


def _unusable(node: Node, x: Any, weight: Any) -> Declined | None:
    """Why a linear of `x` by `weight`, whose result is `node`, may not be taken."""
    for operand in (node, x, weight):
        value = tensor(operand)
        if value is None:
            return Declined("an operand is not a tensor")
        if type(value) not in PLAIN:
            return Declined(f"a tensor subclass ({type(value).__name__})")
        if value.layout != torch.strided:
            return Declined(f"a tensor of layout {value.layout}")
        if value.dtype not in DTYPES:
            return Declined(f"the dtype {str(value.dtype).removeprefix('torch.')} has no FP8 linear")
        if any(isinstance(size, int) and size == 0 for size in value.shape):
            return Declined("an empty batch")
    return None


def _emit_linear(graph: Graph, like: Node, x: Any, weight: Any, bias: Any, root: Node) -> Node:
    node = emit(graph, ops.linear, (x, weight, bias), {"out_dtype": tensor(like).dtype}, like=like)  # type: ignore[union-attr]
    node.meta["te_path"] = path_of(root) or module_path(like)
    return node


class Linear(Rule):
    """`F.linear(x, weight, bias)`."""

    kind = "linear"
    ends_at = frozenset({torch._C._nn.linear})

    def match(self, node: Node) -> Match | Declined | None:
        x, weight, bias = node.args
        ref = weight_of(weight)
        if ref is None:
            return _not_a_weight(weight)
        if tensor(weight).dim() != 2:  # type: ignore[union-attr]
            return None
        return _unusable(node, x, weight) or Match(node, [node], {"x": x, "weight": weight, "bias": bias, "root": ref.root})

    def rewrite(self, graph: Graph, match: Match) -> Node:
        return _emit_linear(graph, match.output, **match.values)


LINEAR_RULES: tuple[Rule, ...] = (Linear(),)
