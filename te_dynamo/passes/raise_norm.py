"""Stage 2, norms: `F.layer_norm`, `F.rms_norm` and norms written out by hand become `ops.norm`.

A norm is read backwards from where it ends, by a small grammar:

    shifted    = scaled | scaled + bias
    scaled     = normalized | normalized * weight              (a weight of `1 + w` is zero-centered)
    normalized = F.layer_norm(x) | F.rms_norm(x) | value / deviation | value * deviation ^ -1
    value      = x | x - mean(x)
    deviation  = sqrt(moment + eps) | std(x)
    moment     = mean(value ^ 2) | var(x) | mean(x ^ 2) - mean(x) ^ 2

with casts, `contiguous` and views that keep the order of the elements in between, and the weight also inside of the
quotient. Powers and means are read in every spelling that rounds differently (`canonicalize` has unified the others):
`x * x`, `pow`, `sqrt`, `rsqrt`, `reciprocal`; `mean`, a sum divided by its length, `var_mean`.

Where a norm is rounded before its weight is applied, so is its replacement. Roundings inside of the statistics are not
kept: these are computed in float32, as Inductor computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch._prims_common import is_contiguous_or_false
from torch.fx import Graph, Node

from te_dynamo import ops
from te_dynamo.ir.graph import emit, emit_contiguous, example, fake, is_call, is_method, operands, same_shape, same_size, tensor, upstream
from te_dynamo.passes.raise_norm_moment import (
    EPS_NOT_CONSTANT,
    VIEWS,
    Moment,
    centered_value,
    is_cast,
    is_contiguous,
    is_float,
    keeps_rows,
    root_of,
    same_value,
    source,
)
from te_dynamo.passes.regions import SET_GRAD, regions
from te_dynamo.passes.rules import Declined, Match, Rule


@dataclass(frozen=True)
class Norm:
    """How a node was read. dims: how many of the last dimensions are normalized; dtype: of the value; rounded: the narrowest dtype that the
    value had until its weight was applied; round_before_weight: as in `ops.norm`."""

    x: Node
    kind: ops.NormKind
    eps: float
    dims: int
    dtype: torch.dtype
    rounded: torch.dtype
    weight: Node | None = None
    bias: Node | None = None
    zero_centered: bool = False
    round_before_weight: torch.dtype | None = None

    @property
    def computed_in(self) -> torch.dtype:
        return torch.promote_types(fake(self.x).dtype, torch.float32)

    @property
    def rounds(self) -> torch.dtype | None:
        """The dtype that the value is rounded to before the weight; None if it is not."""
        return self.rounded if self.rounded.itemsize < self.computed_in.itemsize else None

    @property
    def normalized_shape(self) -> tuple[Any, ...]:
        return tuple(fake(self.x).shape[-self.dims :])


Reading = Norm | Declined | None


# The grammar.


def _quotients(node: Node) -> Iterator[tuple[Any, Any, Any, Moment]]:
    """Each way to read `node` as value / deviation or weight * value / deviation, in any order of the factors: (the value,
    the weight or None, the node that stands for the deviation or its inverse, its moment)."""
    divides = is_call(node, torch.div)
    for value, factor in operands(node, torch.div)[:1] if divides else operands(node, torch.mul):
        readings = [(value, None, factor), *((v, weight, factor) for weight, v in operands(value, torch.mul))]
        if not divides:
            readings += [(value, weight, inverse) for weight, inverse in operands(factor, torch.mul)]
        for v, weight, root in readings:
            moment = root_of(root, 0.5 if divides else -0.5)
            if moment is not None:
                yield v, weight, root, moment


def _normalized(node: Node) -> Reading:
    if is_call(node, F.layer_norm, F.rms_norm):
        return _called(node)
    for value, weight, root, moment in _quotients(node):
        x, centered = centered_value(value, moment.dims)
        if centered == moment.centered and same_value(x, moment.of):
            norm = _by_hand(node, root, moment)
            if weight is None or not isinstance(norm, Norm):
                return norm
            return _weighted(replace(norm, rounded=norm.computed_in), weight, norm.dtype)
    return None


def _called(node: Node) -> Reading:
    x, shape, weight, *bias, eps = node.args
    dtype = fake(node).dtype
    if eps is None:
        eps = torch.finfo(torch.promote_types(fake(x).dtype, torch.float32)).eps
    if not isinstance(eps, (int, float)):
        return Declined(EPS_NOT_CONSTANT)
    norm = Norm(x, "layer" if bias else "rms", float(eps), len(shape), dtype, dtype, bias=bias[0] if bias else None)
    centered = None if weight is None else _zero_centered(norm, weight)
    return replace(norm, weight=weight if centered is None else centered, zero_centered=centered is not None)


def _by_hand(node: Node, root: Any, moment: Moment) -> Reading:
    x, dtype, rank = moment.of, fake(node).dtype, fake(moment.of).dim()
    if not keeps_rows(root, x, moment.dims) or not same_shape(fake(node).shape, fake(x).shape) or not (is_float(x) and is_float(node)):
        return None
    norm = Norm(x, "layer" if moment.centered else "rms", moment.eps, len(moment.dims), dtype, dtype)
    if dtype.itemsize > norm.computed_in.itemsize:
        return None
    if moment.dims != tuple(range(rank - norm.dims, rank)):
        return Declined("it normalizes dimensions that are not the last ones")
    return norm if moment.fault is None else Declined(moment.fault)


def _scaled(node: Node) -> Reading:
    return _normalized(node) or _extended(node, torch.mul, _normalized, _weighted)


def _shifted(node: Node) -> Reading:
    return _scaled(node) or _extended(node, torch.add, _scaled, _biased)


def _extended(
    node: Node, by: Callable[..., Any], read: Callable[[Node], Reading], extend: Callable[[Norm, Any, torch.dtype], Norm | None]
) -> Norm | None:
    """A norm, cast or not, times a weight or plus a bias."""
    for operand, vector in operands(node, by):
        norm = _through_casts(operand, read)
        if norm is not None and same_shape(fake(node).shape, fake(norm.x).shape) and is_float(vector):
            return extend(norm, vector, fake(node).dtype)
    return None


def _through_casts(node: Any, read: Callable[[Node], Reading]) -> Norm | None:
    """The norm behind casts of its result."""
    if tensor(node) is None:
        return None
    if is_contiguous(node):
        return _through_casts(node.args[0], read)
    if is_cast(node):
        inner = _through_casts(node.args[0], read)
        return inner and _cast(inner, node)
    norm = read(node)
    return norm if isinstance(norm, Norm) else None


def _cast(norm: Norm, cast: Node) -> Norm | None:
    """The norm with its result cast. After the weight, a widening cast is not part of the norm."""
    dtype = fake(cast).dtype
    if dtype.itemsize < norm.dtype.itemsize and norm.rounded in (norm.dtype, norm.computed_in):
        return replace(norm, dtype=dtype, rounded=dtype)
    if dtype.itemsize > norm.dtype.itemsize and norm.weight is None and norm.bias is None:
        return replace(norm, dtype=dtype)
    return None


def _weighted(norm: Norm, weight: Any, dtype: torch.dtype) -> Norm | None:
    """The norm times a weight, with a result of `dtype`."""
    if norm.weight is not None or norm.bias is not None or not is_float(weight):
        return None
    centered = _zero_centered(norm, weight)
    weight = _vector(weight if centered is None else centered, norm)
    if weight is None:
        return None
    if norm.rounds is None:
        weight = source(weight)
    product = torch.promote_types(norm.rounds or norm.computed_in, fake(weight).dtype)
    if product.itemsize > norm.computed_in.itemsize or (product != dtype and norm.rounds is not None):
        return None
    return replace(norm, weight=weight, zero_centered=centered is not None, round_before_weight=norm.rounds, dtype=dtype, rounded=dtype)


def _zero_centered(norm: Norm, weight: Any) -> Any:
    """`w` where the weight is `1 + w`, added in the dtype in which `ops.norm` adds it; None otherwise."""
    added = source(weight) if norm.rounds is None else weight
    if not is_call(added, torch.add) or added.kwargs or added.args[1] != 1:
        return None
    w = added.args[0]
    if norm.rounds is None:
        return source(w) if fake(added).dtype == norm.computed_in else None
    return w if fake(added).dtype == fake(w).dtype else None


def _biased(norm: Norm, bias: Any, dtype: torch.dtype) -> Norm | None:
    """The norm plus a bias, with a result of `dtype`."""
    bias = _vector(bias, norm)
    if norm.kind != "layer" or norm.bias is not None or bias is None or dtype != norm.dtype:
        return None
    rounds = norm.round_before_weight if norm.weight is not None else norm.rounds
    added_in = rounds or norm.computed_in
    if norm.weight is not None and rounds is not None:
        added_in = torch.promote_types(rounds, fake(norm.weight).dtype)
    if torch.promote_types(added_in, fake(bias).dtype) != added_in:
        return None
    return replace(norm, bias=bias, rounded=dtype, round_before_weight=rounds)


def _vector(node: Any, norm: Norm) -> Any:
    """A weight or bias of the normalized shape, before it was made to broadcast; it may have leading dimensions of size 1. None if it is
    not one."""
    found = None
    while same_shape(fake(node).shape[-norm.dims :], norm.normalized_shape):  # each row of what is viewed or expanded is the vector
        extra = fake(node).dim() - norm.dims
        if all(same_size(size, 1) for size in fake(node).shape[:extra]):
            found = node
        if not extra or not (is_call(node, *VIEWS) or is_contiguous(node) or is_method(node, "expand")):
            break
        node = node.args[0]
    return found


# The rule.


def _nodes(output: Node, norm: Norm) -> list[Node]:
    """The nodes that compute `output` from the norm's tensors; sizes are left out."""
    leaves = {norm.x, norm.weight, norm.bias}

    def inputs(node: Node) -> list[Node]:
        return [n for n in node.all_input_nodes if n not in leaves and not isinstance(example(n), (int, torch.SymInt))]

    return list(upstream(output, inputs=inputs))


def _in_one_grad_mode(nodes: list[Node]) -> bool:
    """Whether gradients are enabled for all of `nodes` or for none."""
    graph = nodes[0].graph
    if not graph.find_nodes(op="call_function", target=SET_GRAD):
        return True
    modes = [regions(graph, enabled) for enabled in (True, False)]  # before the first switch it may be either
    return all(len({mode[n][1] for n in nodes}) == 1 for mode in modes)


def _goes_on(node: Node) -> bool:
    """Whether a larger pattern, with the weight or the bias, contains the one that ends at `node`."""
    users = list(node.users)
    for user in users:  # grows
        if is_cast(user) or is_contiguous(user):
            users += user.users
        elif is_call(user, torch.mul, torch.div, torch.add):
            norm = _shifted(user)
            if isinstance(norm, Norm) and node in _nodes(user, norm):
                return True
    return False


class RaiseNorm(Rule):
    """A norm, however it is spelled, from its input to its weight, its bias and the last cast down."""

    kind = "norm"
    ends_at = frozenset({F.layer_norm, F.rms_norm, torch.mul, torch.div, torch.add})

    def match(self, node: Node) -> Match | Declined | None:
        norm = _shifted(node)
        if not isinstance(norm, Norm):
            return norm
        if _goes_on(node):
            return None
        output, last = node, next(iter(node.users)) if len(node.users) == 1 else None
        if last is not None and is_cast(last) and _in_one_grad_mode([node, last]):
            rounded = _cast(norm, last)
            if rounded is not None and rounded.dtype.itemsize < norm.dtype.itemsize:
                output, norm = last, rounded
        nodes = _nodes(output, norm)
        if not _in_one_grad_mode(nodes):
            return Declined("a part of it is computed without gradients")
        return Match(output, nodes, {"norm": norm})

    def rewrite(self, graph: Graph, match: Match) -> Node:
        norm: Norm = match.values["norm"]
        x, like = norm.x, match.output
        if is_contiguous_or_false(fake(like)) and not is_contiguous_or_false(fake(x)):
            x = emit_contiguous(graph, x, like)
        weight, bias = (_flat(graph, vector, norm, like) for vector in (norm.weight, norm.bias))
        attributes = {
            "kind": norm.kind,
            "eps": norm.eps,
            "out_dtype": norm.dtype,
            "dims": norm.dims,
            "zero_centered": norm.zero_centered,
            "round_before_weight": norm.round_before_weight,
        }
        return emit(graph, ops.norm, (x, weight, bias), attributes, like=like)


def _flat(graph: Graph, vector: Node | None, norm: Norm, like: Node) -> Node | None:
    """A weight or bias without its leading dimensions of size 1."""
    extra = 0 if vector is None else fake(vector).dim() - norm.dims
    return emit(graph, torch.squeeze, (vector, tuple(range(extra))), like=like) if extra > 0 else vector


NORM_RULES: tuple[Rule, ...] = (RaiseNorm(),)
