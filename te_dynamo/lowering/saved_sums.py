"""A pass over the joint graph that decides what is saved for backward of a sum with a GEMM's result: the sum or the result, which take as
many bytes.

A residual sum costs nothing to recompute, so the partitioner saves the result, which is in memory anyway. But each kernel of the next
norm's backward reads the sum, and would then read two matrices instead of one. Forward writes the sum, and reads it at the next sum instead
of its terms.

Of the sum with a bias that the router chose for each row (gpt-oss) the result is saved: the biases are small, so that whoever reads the sum
can as well add them, and the sum is not written at all.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from te_dynamo.lowering.aten import GraphPass, alike, aten, calls, is_backward, is_gathered

GEMMS = ("aten::_scaled_mm", "te_dynamo::te_gemm", "te_dynamo::te_block_gemm")
OF_EXPERTS = ("aten::_scaled_grouped_mm", "te_dynamo::te_grouped_gemm")


class SavedSums(GraphPass):
    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
            if is_backward(node) or "recompute" in node.meta:
                continue
            if _adds(node, GEMMS):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            elif _adds(node, OF_EXPERTS) and (biases := [*filter(is_gathered, node.args)]) and _backward_reads(node):
                for again in (node, *biases):
                    again.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def _backward_reads(node: Node) -> bool:
    """Whether backward reads it, and it is no result of forward, which has to be written."""
    reads = any(is_backward(user) or (calls(user, aten.view) and _backward_reads(user)) for user in node.users)
    return reads and all(user.op != "output" for user in node.users)


def _adds(node: Node, gemms: Collection[str]) -> bool:
    """Whether it adds the result of one of these GEMMs, which nothing else reads, to something else, of the same shape and dtype."""
    terms = node.all_input_nodes
    if len(node.args) != 2 or len(terms) != 2 or node.kwargs or not alike(node, *terms):
        return False
    if any(calls(n, aten.expand) for n in terms):  # smaller in memory than the sum
        return False
    return _is_of(terms[0], gemms) != _is_of(terms[1], gemms)


def _is_of(node: Any, gemms: Collection[str]) -> bool:
    while len(node.users) == 1 and calls(node, aten.view, aten._unsafe_view, aten.slice):
        node = node.args[0]
    in_a_checkpoint = "recompute" in node.meta
    return len(node.users) == 1 and not in_a_checkpoint and isinstance(node.target, torch._ops.OpOverload) and node.target.name() in gemms
