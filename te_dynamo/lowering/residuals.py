"""A pass over the joint graph that saves a residual sum for backward rather than the FP8 GEMM's result in it.

Both take as many bytes, and a sum costs nothing to recompute, so the partitioner saves the result, which is in memory anyway. But each
kernel of the next norm's backward reads the sum, and would then read two matrices instead of one. Forward writes the sum, and reads it at
the next sum instead of its terms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from te_dynamo.lowering.aten import JointPass, alike, aten, calls, is_backward

GEMMS = ("aten::_scaled_mm", "te_dynamo::te_gemm", "te_dynamo::te_block_gemm")


class ResidualSums(JointPass):
    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
            if not is_backward(node) and "recompute" not in node.meta and _adds_a_gemm(node):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _adds_a_gemm(node: Node) -> bool:
    """Whether it adds the result of a GEMM, which nothing else reads, to something else, of the same shape and dtype."""
    terms = node.all_input_nodes
    if len(node.args) != 2 or len(terms) != 2 or node.kwargs or not alike(node, *terms):
        return False
    if any(calls(n, aten.expand) for n in terms):  # smaller in memory than the sum
        return False
    return _is_of_a_gemm(terms[0]) != _is_of_a_gemm(terms[1])


def _is_of_a_gemm(node: Any) -> bool:
    while len(node.users) == 1 and calls(node, aten.view, aten._unsafe_view, aten.slice):
        node = node.args[0]
    in_a_checkpoint = "recompute" in node.meta
    return len(node.users) == 1 and not in_a_checkpoint and isinstance(node.target, torch._ops.OpOverload) and node.target.name() in GEMMS
