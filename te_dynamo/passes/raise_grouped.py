"""Stage 2, experts: grouped GEMMs, and batches of matrices times a parameter with a matrix for each, become `ops.grouped_linear`."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from te_dynamo import ops
from te_dynamo.ir.graph import emit, emit_permuted, fake, is_call, tensor
from te_dynamo.ir.meta import PATH
from te_dynamo.passes.raise_linear import SPELLINGS, find_weight, path_of_linear, unusable
from te_dynamo.passes.rules import Declined, Match, Rule
from te_dynamo.passes.weights import is_owned, origin, weight_of

GATHERED = (
    "a matrix is gathered for each token, whose product has one row: there is no GEMM to compute in FP8. Remedy, with transformers: "
    "model.set_experts_implementation('grouped_mm')"
)
GROUPED: tuple[Any, ...] = tuple(f for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if f is not None)


def _emit(graph: Graph, like: Node, x: Any, weight: Any, offsets: Any, path: str) -> Node:
    node = emit(graph, ops.grouped_linear, (x, weight, offsets), {"out_dtype": fake(like).dtype}, like=like)
    node.meta[PATH] = path
    return node


class GroupedMM(Rule):
    """`grouped_mm(x [T, K], weight [E, K, N], offs=[E])`, and transformers' fallback for dtypes that lack it."""

    kind = "grouped_linear"
    ends_at = frozenset(GROUPED)

    def may_end_at(self, target: Any) -> bool:
        return target in self.ends_at or str(target).startswith("transformers.grouped_mm_fallback")

    def match(self, node: Node) -> Match | Declined | None:
        given: dict[str, Any] = dict(zip(("x", "weight", "offs", "bias"), node.args, strict=False)) | dict(node.kwargs)
        x, weight, offsets = (given.get(name) for name in ("x", "weight", "offs"))
        value, matrices = tensor(x), tensor(weight)
        if value is None or matrices is None or tensor(offsets) is None or (value.dim(), matrices.dim()) != (2, 3):
            return None
        ref = weight_of(weight)
        if ref is None:
            return Declined("the weights of a grouped GEMM are computed in the graph")
        if given.get("bias") is not None or given.get("out_dtype") is not None:
            return Declined("a grouped GEMM with a bias or a dtype of its own")
        values = {"x": x, "weight": weight, "offsets": offsets, "path": path_of_linear(node, ref.root)}
        return unusable(node, x, weight) or Match(node, [node], values)

    def rewrite(self, graph: Graph, match: Match) -> Node:
        node, v = match.output, match.values
        weight = emit(graph, torch.transpose, (v["weight"], -2, -1), like=node)
        return _emit(graph, node, v["x"], weight, v["offsets"], v["path"])


def _is_gathered(operand: Any) -> bool:
    """Whether an operand consists of matrices of a parameter [E, ...] selected by a tensor."""
    chosen, _ = origin(operand)
    if chosen is None or not is_call(chosen, operator.getitem, torch.index_select):
        return False
    source, _ = origin(chosen.args[0])
    return source is not None and is_owned(source) and fake(source).dim() == 3


class BatchedProduct(Rule):
    """A batch of matrices times a parameter with a matrix for each: all groups have the same size."""

    kind = "grouped_linear"
    ends_at = frozenset(SPELLINGS)

    def match(self, node: Node) -> Match | Declined | None:
        contraction = SPELLINGS[node.target](node)
        found = None if contraction is None else find_weight(contraction)
        if contraction is not None and found is None and any(map(_is_gathered, contraction.operands)):
            return Declined(GATHERED)
        if contraction is None or found is None:
            return None
        side, ref = found
        x, weight = contraction.operands[1 - side], contraction.operands[side]
        of_x, of_weight, out = contraction.labels[1 - side], contraction.labels[side], contraction.out
        groups = [label for label in of_weight if label in of_x and label in out]
        columns = [label for label in of_weight if label in of_x and label not in out]
        rows = [label for label in of_weight if label not in of_x]
        lead = [label for label in of_x if label not in of_weight]
        if (len(groups), len(columns), len(rows), len(lead)) != (1, 1, 1, 1) or set(out) != {*groups, *lead, *rows}:
            return None
        sizes = dict(zip(of_x, fake(x).shape, strict=True))
        experts, k = fake(weight).shape[of_weight.index(groups[0])], fake(weight).shape[of_weight.index(columns[0])]
        if sizes[groups[0]] != experts or sizes[columns[0]] != k:
            return None  # broadcast
        values = {
            "x": x,
            "x_order": [of_x.index(label) for label in (*groups, *lead, *columns)],
            "weight": weight,
            "weight_order": [of_weight.index(label) for label in (*groups, *rows, *columns)],
            "out_order": [[*groups, *lead, *rows].index(label) for label in out],
            "path": path_of_linear(node, ref.root),
        }
        return unusable(node, x, weight) or Match(node, [node], values)

    def rewrite(self, graph: Graph, match: Match) -> Node:
        node, v = match.output, match.values
        x = emit_permuted(graph, v["x"], v["x_order"], node)
        weight = emit_permuted(graph, v["weight"], v["weight_order"], node)
        experts, tokens = fake(x).shape[0], fake(x).shape[1]
        size = tokens if isinstance(tokens, int) else emit(graph, "size", (x, 1), like=node)
        ends = emit(graph, torch.arange, (1, experts + 1), {"dtype": torch.int32, "device": fake(x).device}, like=node)
        offsets = emit(graph, torch.mul, (ends, size), like=node)
        y = _emit(graph, node, emit(graph, torch.flatten, (x, 0, 1), like=node), weight, offsets, v["path"])
        return emit_permuted(graph, emit(graph, torch.unflatten, (y, 0, (experts, -1)), like=node), v["out_order"], node)


GROUPED_RULES: tuple[Rule, ...] = (GroupedMM(), BatchedProduct())
