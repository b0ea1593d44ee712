"""Stage 2, linears: every spelling of an activation times a weight becomes `ops.linear`.

`F.linear` and `addmm` say which operand is the weight. All the others (`matmul`, `einsum`, `tensordot`, ...) are read as
one contraction: a label for each dimension of both operands and of the result. What may be taken is decided once, for
all spellings, in `unusable`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._prims_common import is_contiguous_or_false
from torch._subclasses import FakeTensor
from torch.fx import Graph, Node

from te_dynamo import ops
from te_dynamo.fp8_weight import FP8Weight
from te_dynamo.ir.graph import EXAMPLE, emit, emit_contiguous, emit_permuted, fake, is_call, operands, same_size, tensor
from te_dynamo.ir.meta import PATH
from te_dynamo.passes.rules import Declined, Match, Rule
from te_dynamo.passes.weights import WeightRef, depends_on_weights_only, is_buffer, is_owned, origin, path_of, weight_of, weight_of_gemm
from te_dynamo.sites import module_path

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, FakeTensor, FP8Weight})
Labels = tuple[Hashable, ...]


def _not_a_weight(operand: Any) -> Declined | None:
    """Why a matrix at the weight's place cannot be a weight; None where it is an activation."""
    root, _ = origin(operand)
    value = tensor(operand)
    if root is None or value is None or value.dim() != 2:
        return None
    if root.op == "get_attr":
        remedy = "Remedy: torch._inductor.config.freezing = False; FP8 weights are kept in eval anyway"
        return Declined(f"the weight is a constant, frozen in the graph. {remedy}")
    if root.op == "placeholder" and is_buffer(root):
        return Declined("the weight is a buffer, not a parameter")
    return Declined("the weight is computed in the graph") if depends_on_weights_only(operand) else None


def unusable(node: Node, x: Any, weight: Any) -> Declined | None:
    """Why a linear of `x` by `weight`, whose result is `node`, may not be taken."""
    for value in map(tensor, (node, x, weight)):
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


def path_of_linear(node: Node, root: Node) -> str:
    """The path of a linear: that of the `nn.Linear` called (its weight may be tied to another module's), else of the module
    that owns the weight, else of the module that uses it."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    called = stack[-1][1] if stack else None
    if isinstance(called, type) and issubclass(called, torch.nn.Linear):
        return module_path(node)
    return path_of(root) or module_path(node)


def _emit_linear(graph: Graph, like: Node, x: Any, weight: Any, bias: Any, path: str) -> Node:
    node = emit(graph, ops.linear, (x, weight, bias), {"out_dtype": fake(like).dtype}, like=like)
    node.meta[PATH] = path
    return node


def _is_transpose(node: Any) -> bool:
    """Whether `node` is a 2-D tensor's transpose."""
    value = tensor(node)
    if value is None or value.dim() != 2:
        return False
    return is_call(node, torch.t) or (is_call(node, torch.transpose) and {d % 2 for d in node.args[1:]} == {0, 1})


class Linear(Rule):
    """`F.linear(x, weight, bias)`."""

    kind = "linear"
    ends_at = frozenset({torch._C._nn.linear})

    def match(self, node: Node) -> Match | Declined | None:
        x, weight, bias = node.args
        ref = weight_of_gemm(weight)
        if ref is None:
            root, _ = origin(weight)
            argument = root is not None and root.op == "placeholder"
            return _not_a_weight(weight) or (Declined("the weight is an argument, not a parameter") if argument else None)
        if fake(weight).dim() != 2:
            return None
        return unusable(node, x, weight) or Match(
            node, [node], {"x": x, "weight": weight, "bias": bias, "path": path_of_linear(node, ref.root)}
        )

    def rewrite(self, graph: Graph, match: Match) -> Node:
        return _emit_linear(graph, match.output, **match.values)


def _before_flattening(x: Node) -> Node:
    """The [..., K] tensor that x [T, K] was flattened from, for an operator that takes matrices; else x. So a norm or an activation before
    it is recognized."""
    source = x.args[0] if is_call(x, torch.reshape, torch.flatten) else None
    whole = tensor(source)
    return source if whole is not None and whole.dim() > 2 and same_size(whole.shape[-1], fake(x).shape[-1]) else x  # type: ignore[return-value]


class Addmm(Rule):
    """`addmm(bias, x, weight[K, N])`, as GPT-2's Conv1D spells it. What is added may also be a matrix."""

    kind = "linear"
    ends_at = frozenset({torch.addmm})

    def match(self, node: Node) -> Match | Declined | None:
        added, x, weight = node.args
        ref = weight_of(weight)
        if ref is None:
            return _not_a_weight(weight)
        if any(node.kwargs.get(factor, 1) != 1 for factor in ("alpha", "beta")):
            return Declined("addmm with an alpha or beta other than 1")
        is_bias = tuple(fake(added).shape) == (fake(weight).shape[1],)
        if not is_bias and fake(added).dtype != fake(node).dtype:
            return Declined("addmm adds a matrix of another dtype")
        values = {"added": added, "x": x, "weight": weight, "is_bias": is_bias, "path": path_of_linear(node, ref.root)}
        nodes = [node] if _before_flattening(x) is x else [x, node]
        return unusable(node, x, weight) or Match(node, nodes, values)

    def rewrite(self, graph: Graph, match: Match) -> Node:
        node, v = match.output, match.values
        transposed = emit(graph, torch.t, (v["weight"],), like=node)
        x = _before_flattening(v["x"])
        linear = _emit_linear(graph, node, x, transposed, v["added"] if v["is_bias"] else None, v["path"])
        flat = linear
        if x is not v["x"]:
            flat = emit(graph, torch.flatten, (linear, 0, -2), like=node)
            linear.meta[EXAMPLE] = fake(node).view(fake(linear).shape)  # later views alias the memory of what is replaced
        return flat if v["is_bias"] else emit(graph, torch.add, (flat, v["added"]), like=node)


class AddBias(Rule):
    """A parameter of one dimension added to a linear that has no bias and no other user, in the linear's dtype."""

    kind = "linear"
    ends_at = frozenset({torch.add})

    def match(self, node: Node) -> Match | None:
        for linear, bias in operands(node, torch.add):
            if not is_call(linear, ops.linear) or linear.args[2] is not None or len(linear.users) != 1:
                continue
            same_dtype = fake(node).dtype == linear.kwargs["out_dtype"]
            if same_dtype and weight_of(bias) is not None and tuple(fake(bias).shape) == (fake(linear.args[1]).shape[0],):
                return Match(node, [linear, node], {"linear": linear, "bias": bias})
        return None

    def rewrite(self, graph: Graph, match: Match) -> Node:
        linear = match.values["linear"]
        x, weight, _ = linear.args
        return _emit_linear(graph, match.output, x, weight, match.values["bias"], linear.meta[PATH])


@dataclass(frozen=True)
class Contraction:
    """A product of two tensors: `operands`, and a label for each dimension of them and of the result. Equal labels are one
    dimension; a label of the operands that is not in the result is summed over."""

    operands: tuple[Any, Any]
    labels: tuple[Labels, Labels]
    out: Labels


def _rank(node: Any) -> int:
    return fake(node).dim()


def _matmul(node: Node) -> Contraction:
    a, b = node.args
    batch = tuple(range(max(_rank(a), _rank(b)) - 2))
    rows, columns = ("m",) * (_rank(a) > 1), ("n",) * (_rank(b) > 1)
    batch_a, batch_b = (batch[len(batch) - max(_rank(o) - 2, 0) :] for o in (a, b))
    return Contraction((a, b), (batch_a + rows + ("k",), batch_b + ("k",) + columns), batch + rows + columns)


def _inner(node: Node) -> Contraction:
    a, b = node.args
    free_a, free_b = (tuple((side, i) for i in range(_rank(o) - 1)) for side, o in enumerate((a, b)))
    return Contraction((a, b), (free_a + ("k",), free_b + ("k",)), free_a + free_b)


def _tensordot(node: Node) -> Contraction:
    a, b = node.args[:2]
    dims: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dims", 2)
    dims_a, dims_b = (list(range(_rank(a) - dims, _rank(a))), list(range(dims))) if isinstance(dims, int) else dims
    labels_a: list[Hashable] = [(0, i) for i in range(_rank(a))]
    labels_b: list[Hashable] = [(1, i) for i in range(_rank(b))]
    for summed, (i, j) in enumerate(zip(dims_a, dims_b, strict=True)):
        labels_a[i] = labels_b[j] = summed
    out = tuple(label for label in labels_a + labels_b if not isinstance(label, int))
    return Contraction((a, b), (tuple(labels_a), tuple(labels_b)), out)


def _einsum(node: Node) -> Contraction | None:
    """None where there are not two operands."""
    args: tuple[Any, ...] = node.args
    first, *rest = args
    if isinstance(first, str):
        operands: Sequence[Any] = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
        left, arrow, right = first.replace(" ", "").replace("...", ".").partition("->")
        terms: list[list[Any]] = [list(term) for term in left.split(",")]
        out: list[Any] | None = list(right) if arrow else None
        ellipsis: Any = "."
    else:  # operand, its labels, operand, its labels, ..., the result's labels
        end = len(args) // 2 * 2
        operands, terms = args[:end:2], [list(term) for term in args[1:end:2]]
        out = list(args[-1]) if len(args) % 2 else None
        ellipsis = ...
    if len(operands) != 2:
        return None
    hidden = [_rank(o) - len(t) + 1 if ellipsis in t else 0 for o, t in zip(operands, terms, strict=True)]

    def spelled_out(term: list[Any], count: int) -> Labels:
        """The ellipsis replaced by one label a dimension, numbered from the right."""
        labels: list[Hashable] = []
        for label in term:
            labels += [("...", i) for i in range(count - 1, -1, -1)] if label is ellipsis or label == ellipsis else [label]
        return tuple(labels)

    if out is None:
        named = [label for term in terms for label in term if label is not ellipsis and label != ellipsis]
        out = [ellipsis] + sorted(label for label in named if named.count(label) == 1)
    a, b = (spelled_out(t, n) for t, n in zip(terms, hidden, strict=True))
    return Contraction((operands[0], operands[1]), (a, b), spelled_out(out, max(hidden)))


SPELLINGS: dict[Callable[..., Any], Callable[[Node], Contraction | None]] = {
    torch.matmul: _matmul,
    torch.linalg.matmul: _matmul,
    torch.mm: _matmul,
    torch.bmm: _matmul,
    torch.mv: _matmul,
    torch.inner: _inner,
    torch.tensordot: _tensordot,
    torch.einsum: _einsum,
}


class Product(Rule):
    """A product of an activation and a weight in any other spelling, the weight on either side.

    The weight's dimensions are summed over with the activation's (K) or go to the result (N). Where K or N is several
    dimensions, views of the weight merge them.
    """

    kind = "linear"
    ends_at = frozenset(SPELLINGS)

    def match(self, node: Node) -> Match | Declined | None:
        contraction = SPELLINGS[node.target](node)
        if contraction is None:
            return None
        found = find_weight(contraction)
        if found is None:
            return _not_a_weight(contraction.operands[1])
        side, ref = found
        x, weight = contraction.operands[1 - side], contraction.operands[side]
        labels, weight_labels = contraction.labels[1 - side], contraction.labels[side]
        split = _split(labels, weight_labels, contraction.out)
        if split is None or isinstance(split, Declined):
            return split
        if depends_on_weights_only(x):
            return Declined("a product of parameters, without an activation")
        lead, rows, columns = split
        sizes = dict(zip(weight_labels, fake(weight).shape, strict=True))
        if any(sizes[label] != size for label, size in zip(labels, fake(x).shape, strict=True) if label in columns):
            return Declined("a dimension that is summed over is broadcast")
        if len(sizes) > 2 and not all(isinstance(size, int) for size in sizes.values()):
            return Declined("a weight of more than two dimensions, of unknown size")
        nodes = [node]
        if _is_transpose(weight):
            nodes.insert(0, weight)
            weight, weight_labels = weight.args[0], weight_labels[::-1]
        values = {
            "x": x,
            "x_order": tuple(labels.index(label) for label in lead + columns),
            "weight": weight,
            "weight_order": tuple(weight_labels.index(label) for label in rows + columns),
            "rows": tuple(sizes[label] for label in rows),
            "columns": tuple(sizes[label] for label in columns),
            "out_order": tuple((lead + rows).index(label) for label in contraction.out),
            "path": path_of_linear(node, ref.root),
        }
        return unusable(node, x, weight) or Match(node, nodes, values)

    def rewrite(self, graph: Graph, match: Match) -> Node:
        node, v = match.output, match.values
        x = _permuted(graph, node, v["x"], v["x_order"])
        rows, columns = v["rows"], v["columns"]
        if len(columns) > 1:
            x = emit(graph, torch.flatten, (x, -len(columns)), like=node)
        weight = _permuted(graph, node, v["weight"], v["weight_order"])
        if (len(rows), len(columns)) != (1, 1):
            weight = emit(graph, torch.reshape, (weight, (math.prod(rows), math.prod(columns))), like=node)
        out = _emit_linear(graph, node, x, weight, None, v["path"])
        if len(rows) != 1:
            out = emit(graph, torch.unflatten, (out, -1, rows), like=node)
        permuted = _permuted(graph, node, out, v["out_order"])
        if permuted is not out and is_contiguous_or_false(fake(node)):  # einsum's own result may be permuted too
            permuted = emit_contiguous(graph, permuted, node)
        return permuted


def find_weight(contraction: Contraction) -> tuple[int, WeightRef] | None:
    """Which operand is the weight, 0 or 1; None where neither is. A module's parameter comes before an argument that merely
    requires grad, and such an argument counts only on the right, where a weight is usual."""
    left, right = (weight_of(operand) for operand in contraction.operands)
    if right is not None and is_owned(right.root):
        return 1, right
    if left is not None and is_owned(left.root):
        return 0, left
    return (1, right) if right is not None and (left is None or left.root is not right.root) else None


def _split(labels: Labels, weight_labels: Labels, out: Labels) -> tuple[Labels, Labels, Labels] | Declined | None:
    """The labels of the activation alone, of the weight alone (its N), and of both, summed over (its K). The first two are in the order of
    the result; K is in that of the activation, which then only needs a view."""
    columns = tuple(label for label in labels if label in weight_labels and label not in out)
    rows = tuple(label for label in out if label not in labels)
    lead = tuple(label for label in out if label not in weight_labels)
    if not columns or set(weight_labels) == set(columns):  # an outer product, or a dot with a vector
        return None
    if set(weight_labels) & set(labels) & set(out):
        return Declined("a weight matrix for each entry of a batch (a grouped GEMM)")
    if Counter(labels) != Counter(lead + columns) or Counter(weight_labels) != Counter(rows + columns):
        return Declined("a product that takes a diagonal, or sums over a dimension of one operand alone")
    return lead, rows, columns


def _permuted(graph: Graph, like: Node, x: Any, order: tuple[int, ...]) -> Any:
    return emit(graph, torch.t, (x,), like=like) if order == (1, 0) else emit_permuted(graph, x, order, like)


LINEAR_RULES: tuple[Rule, ...] = (Linear(), Addmm(), Product(), AddBias())
