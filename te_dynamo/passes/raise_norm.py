"""Stage 2, norms: `F.layer_norm`, `F.rms_norm` and norms written out by hand become `ops.norm`.

A norm is read backwards from where it ends, by a small grammar:

    shifted    = scaled | scaled + bias
    scaled     = normalized | weight * normalized              (a weight of `1 + w` is zero-centered)
    normalized = F.layer_norm(x) | F.rms_norm(x) | x / deviation | (x - mean(x)) / deviation
    deviation  = sqrt(moment + eps), or std
    moment     = mean(x * x) | var(x)

with casts, `contiguous` and views that keep the order of the elements in between. Where a norm is rounded before its
weight is applied, so is what it becomes. Roundings inside of the statistics are not kept: these are computed in float32,
as Inductor computes them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch._prims_common import is_contiguous_or_false
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from te_dynamo import ops
from te_dynamo.ir.graph import emit, example, fake, is_call, is_method, tensor
from te_dynamo.passes.regions import SET_GRAD, regions
from te_dynamo.passes.rules import Declined, Match, Rule

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
VIEWS: frozenset[Callable[..., Any]] = frozenset(
    {torch.reshape, torch.unsqueeze, torch.squeeze, torch.flatten}
)  # they keep the order of the elements


@dataclass(frozen=True)
class Norm:
    """What a node was read as. dims: how many of the last dimensions are normalized; dtype: of the value; rounded: the
    narrowest dtype that the value had until its weight was applied; round_before_weight: as in `ops.norm`."""

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
        """To which dtype the value is rounded on its way to the weight; None where it is not."""
        return self.rounded if self.rounded.itemsize < self.computed_in.itemsize else None

    @property
    def normalized_shape(self) -> tuple[Any, ...]:
        return tuple(fake(self.x).shape[-self.dims :])


@dataclass(frozen=True)
class Deviation:
    """sqrt(mean((of - mean(of))^2) + eps), or without the mean where it is not centered. fault: why it is not quite that."""

    of: Node
    dims: tuple[int, ...]
    centered: bool
    eps: float = 0.0
    fault: str | None = None


Reading = Norm | Declined | None
NO_CONSTANT = "its eps is not a constant"


# Helpers: what to look through, and what is equal.


def _equal(a: Any, b: Any) -> bool:
    """Whether two shapes are known to be equal, without a guard on it."""
    return len(a) == len(b) and statically_known_true(sym_eq(tuple(a), tuple(b)))


def _is_float(node: Any) -> bool:
    value = tensor(node)
    return value is not None and value.dtype in DTYPES


def _is_cast(node: Any) -> bool:
    return is_method(node, "to") and len(node.args) == 2 and node.args[1] in DTYPES and _is_float(node.args[0])


def _is_widening(node: Any) -> bool:
    """A cast that loses nothing, to the dtype that a norm is computed in anyway."""
    return _is_cast(node) and node.args[1] == torch.float32 and fake(node.args[0]).dtype.itemsize < 4


def _is_contiguous(node: Any) -> bool:
    return is_method(node, "contiguous") and len(node.args) == 1 and not node.kwargs


def _is_view(node: Any) -> bool:
    return is_call(node, *VIEWS)


def _source(node: Any) -> Any:
    """The value itself, before lossless casts."""
    while _is_widening(node) or _is_contiguous(node):
        node = node.args[0]
    return node


def _inner(node: Any) -> Any:
    """An intermediate of the statistics, whose dtype and unit dimensions do not matter."""
    while _is_cast(node) or _is_contiguous(node) or _is_view(node):
        node = node.args[0]
    return node


def _same(a: Any, b: Any) -> bool:
    """Whether two nodes are one value: one node, or the same view of one value taken twice."""
    a, b = _source(a), _source(b)
    if a is b or not (_is_view(a) and _is_view(b)):
        return a is b
    return a.target is b.target and _equal(fake(a).shape, fake(b).shape) and _same(a.args[0], b.args[0])


def _operands(node: Node) -> tuple[tuple[Any, Any], ...]:
    """The operands of a plain binary operation, in both orders."""
    if len(node.args) != 2 or node.kwargs:
        return ()
    return ((node.args[0], node.args[1]), (node.args[1], node.args[0]))


def _power(node: Any) -> tuple[Any, float] | None:
    """(base, exponent) of a power in any of its spellings."""
    if is_call(node, torch.pow) and len(node.args) == 2 and isinstance(node.args[1], (int, float)):
        return node.args[0], node.args[1]
    if is_call(node, torch.mul) and _operands(node) and _same(*node.args):
        return node.args[0], 2
    if is_call(node, operator.truediv) and node.args[0] == 1:
        return node.args[1], -1
    for function, exponent in ((torch.square, 2), (torch.sqrt, 0.5), (torch.rsqrt, -0.5), (torch.reciprocal, -1)):
        if is_call(node, function):
            return node.args[0], exponent
    return None


def _base(node: Any, exponent: float) -> Any:
    """What `node` is that power of; None where it is not one."""
    power = _power(node)
    return power[0] if power is not None and power[1] == exponent else None


# The statistics.


def _dims(node: Node) -> tuple[int, ...] | None:
    """The dimensions that a reduction goes over, from the left; None where it does not say, or there are none."""
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    given = (given,) if isinstance(given, int) and not isinstance(given, bool) else given
    rank = fake(node.args[0]).dim()
    if rank == 0 or not isinstance(given, (tuple, list)) or not given or not all(isinstance(d, int) for d in given):
        return None
    return tuple(sorted(d % rank for d in given))


def _mean(node: Any) -> tuple[Any, tuple[int, ...]] | None:
    """(x, dims) where `node` is a mean: `mean`, a sum divided by its length, or the mean that came with a variance."""
    node, length = _inner(node), None
    if is_call(node, torch.div) and _operands(node):
        node, length = _inner(node.args[0]), example(node.args[1])
    elif is_call(node, operator.getitem) and is_call(node.args[0], torch.var_mean) and node.args[1] == 1:
        node = node.args[0]
    if not is_call(node, torch.sum if length is not None else torch.mean, torch.var_mean):
        return None
    dims = _dims(node)
    if dims is None or (length is not None and not _is_length(length, [fake(node.args[0]).shape[d] for d in dims])):
        return None
    return node.args[0], dims


def _is_length(length: Any, sizes: list[Any]) -> bool:
    length = int(length) if isinstance(length, float) and length.is_integer() else length
    return isinstance(length, (int, torch.SymInt)) and _equal((length,), (math.prod(sizes),))


def _keeps(reduced: Any, x: Any, dims: tuple[int, ...]) -> bool:
    """Whether what was reduced over `dims` stands beside `x` as one number for each of its rows."""
    value = tensor(reduced)
    return value is not None and _equal(value.shape, [1 if d in dims else size for d, size in enumerate(fake(x).shape)])


def _centered(node: Any) -> tuple[Node, tuple[int, ...]] | None:
    """(x, dims) where `node` is `x - mean(x, dims)`."""
    node = _source(node)
    if not is_call(node, torch.sub) or not _operands(node):
        return None
    x, mean = _source(node.args[0]), _mean(node.args[1])
    return (x, mean[1]) if mean is not None and _same(mean[0], x) and _keeps(node.args[1], x, mean[1]) else None


def _variance(node: Any) -> Deviation | None:
    """`var(x)` or `std(x)`: which of them, the caller knows."""
    dims = _dims(node)
    if dims is None:
        return None
    unbiased = node.args[2] if len(node.args) > 2 else node.kwargs.get("unbiased", True)
    correction = node.kwargs.get("correction", int(bool(unbiased)))
    centered = _centered(node.args[0])
    x = centered[0] if centered is not None and centered[1] == dims else _source(node.args[0])
    return Deviation(x, dims, True, fault=None if correction == 0 else "its variance is the unbiased one")


def _moment(node: Any) -> Deviation | None:
    """`mean(x^2)`, `mean((x - mean(x))^2)`, `var(x)` or `mean(x^2) - mean(x)^2`."""
    node = _inner(node)
    if is_call(node, torch.var):
        return _variance(node)
    if is_call(node, operator.getitem) and is_call(node.args[0], torch.var_mean) and node.args[1] == 0:
        return _variance(node.args[0])
    if is_call(node, torch.sub) and _operands(node):
        square, mean = _moment(node.args[0]), _mean(_base(_inner(node.args[1]), 2))
        if square is None or square.centered or mean is None or mean[1] != square.dims or not _same(mean[0], square.of):
            return None
        return replace(square, centered=True)
    mean = _mean(node)
    x: Any = None if mean is None else _source(_base(_source(mean[0]), 2))
    if mean is None or not _is_float(x):
        return None
    centered = _centered(x)
    return Deviation(x, mean[1], False) if centered is None or centered[1] != mean[1] else Deviation(centered[0], mean[1], True)


def _with_eps(node: Any) -> Deviation | None:
    """A moment, plus eps or not."""
    node = _inner(node)
    if not is_call(node, torch.add):
        return _moment(node)
    for moment, eps in _operands(node):
        found = _moment(moment)
        if found is not None and isinstance(eps, (int, float)):
            return replace(found, eps=float(eps))
        if found is not None and _is_scalar(eps):
            return replace(found, fault=NO_CONSTANT)
    return None


def _is_scalar(node: Any) -> bool:
    value = tensor(node)
    return value is None or _equal(value.shape, (1,) * value.dim())


def _deviation(node: Any) -> Deviation | None:
    """A value that a norm divides by."""
    node = _inner(node)
    if is_call(node, torch.std):
        return _variance(node)
    if is_call(node, torch.add) and _operands(node) and not is_call(_inner(node.args[0]), torch.add):
        found = _deviation(node.args[0])
        return found and replace(found, fault=found.fault or "its eps is added outside of the square root")
    squared = _base(node, 0.5)
    return None if squared is None else _with_eps(squared)


def _inverse_deviation(node: Any) -> Deviation | None:
    """A value that a norm multiplies by."""
    node = _inner(node)
    squared = _base(node, -0.5)
    return _with_eps(squared) if squared is not None else _deviation(_base(node, -1))


# The grammar.


def _quotients(node: Node) -> Iterator[tuple[Any, Any, Any, Deviation]]:
    """Each way to read `node` as value / deviation or weight * value / deviation, in any order of the factors: (the value,
    the weight or None, the node that stands for the deviation or its inverse, it)."""
    if not _operands(node) or not is_call(node, torch.mul, torch.div):
        return
    divides = is_call(node, torch.div)
    for value, factor in _operands(node)[: 1 if divides else 2]:
        deviation = _deviation(factor) if divides else _inverse_deviation(factor)
        if deviation is not None:
            yield value, None, factor, deviation
            for weight, weighted in _operands(value) if is_call(value, torch.mul) else ():
                yield weighted, weight, factor, deviation
        elif not divides and is_call(factor, torch.mul):
            for weight, inverse in _operands(factor):
                deviation = _inverse_deviation(inverse)
                if deviation is not None:
                    yield value, weight, inverse, deviation


def _normalized(node: Node) -> Reading:
    if is_call(node, F.layer_norm):
        x, shape, weight, bias, eps = node.args
        return _called(node, "layer", x, shape, eps, weight, bias)
    if is_call(node, F.rms_norm):
        x, shape, weight, eps = node.args
        eps = torch.finfo(torch.promote_types(fake(x).dtype, torch.float32)).eps if eps is None else eps
        return _called(node, "rms", x, shape, eps, weight, None)
    for value, weight, factor, deviation in _quotients(node):
        if _is_over(value, deviation):
            norm = _by_hand(node, factor, deviation)
            if weight is None or not isinstance(norm, Norm):
                return norm
            return _weighted(replace(norm, rounded=norm.computed_in), weight, norm.dtype)
    return None


def _called(node: Node, kind: ops.NormKind, x: Any, shape: Any, eps: Any, weight: Any, bias: Any) -> Reading:
    if not isinstance(eps, (int, float)):
        return Declined(NO_CONSTANT)
    dtype = fake(node).dtype
    norm = Norm(x, kind, float(eps), len(shape), dtype, dtype, bias=bias)
    if weight is None:
        return norm
    centered = _zero_centered(norm, weight)
    return replace(norm, weight=weight if centered is None else centered, zero_centered=centered is not None)


def _is_over(value: Any, deviation: Deviation) -> bool:
    """Whether a value is what its deviation was taken of."""
    if deviation.centered:
        centered = _centered(value)
        return centered is not None and centered[1] == deviation.dims and _same(centered[0], deviation.of)
    return _same(value, deviation.of)


def _by_hand(node: Node, factor: Any, deviation: Deviation) -> Reading:
    x, dtype, rank = deviation.of, fake(node).dtype, fake(deviation.of).dim()
    if not _keeps(factor, x, deviation.dims) or not _equal(fake(node).shape, fake(x).shape) or not (_is_float(x) and _is_float(node)):
        return None
    if dtype.itemsize > torch.promote_types(fake(x).dtype, torch.float32).itemsize:
        return None
    if deviation.dims != tuple(range(rank - len(deviation.dims), rank)):
        return Declined("it normalizes dimensions that are not the last ones")
    if deviation.fault is not None:
        return Declined(deviation.fault)
    return Norm(x, "layer" if deviation.centered else "rms", deviation.eps, len(deviation.dims), dtype, dtype)


def _scaled(node: Node) -> Reading:
    norm = _normalized(node)
    if norm is not None or not is_call(node, torch.mul):
        return norm
    for operand, weight in _operands(node):
        inner = _through_casts(operand, _normalized)
        if inner is not None and inner.weight is None and inner.bias is None and _equal(fake(node).shape, fake(inner.x).shape):
            return _weighted(inner, weight, fake(node).dtype)
    return None


def _shifted(node: Node) -> Reading:
    norm = _scaled(node)
    if norm is not None or not is_call(node, torch.add):
        return norm
    for operand, bias in _operands(node):
        inner = _through_casts(operand, _scaled)
        if inner is not None and inner.kind == "layer" and inner.bias is None and _equal(fake(node).shape, fake(inner.x).shape):
            return _biased(inner, bias, fake(node).dtype)
    return None


def _through_casts(node: Any, read: Callable[[Node], Reading]) -> Norm | None:
    """The norm behind casts of its result."""
    if not isinstance(node, Node) or tensor(node) is None:
        return None
    if _is_contiguous(node):
        return _through_casts(node.args[0], read)
    if not _is_cast(node):
        norm = read(node)
        return norm if isinstance(norm, Norm) else None
    norm = _through_casts(node.args[0], read)
    return None if norm is None else _cast(norm, node)


def _cast(norm: Norm, cast: Node) -> Norm | None:
    """The norm whose result is cast. Once weighted it is not widened: that cast is not the norm's."""
    dtype = fake(cast).dtype
    if dtype.itemsize < norm.dtype.itemsize and norm.rounded in (norm.dtype, norm.computed_in):
        return replace(norm, dtype=dtype, rounded=dtype)
    if dtype.itemsize > norm.dtype.itemsize and norm.weight is None and norm.bias is None:
        return replace(norm, dtype=dtype)
    return None


def _weighted(norm: Norm, weight: Any, dtype: torch.dtype) -> Norm | None:
    """The norm times a weight, which gives a value of `dtype`."""
    if not _is_float(weight):
        return None
    centered = _zero_centered(norm, weight)
    weight = _vector(weight if centered is None else centered, norm)
    if weight is None:
        return None
    if norm.rounds is None:
        weight = _source(weight)
    product = torch.promote_types(norm.rounds or norm.computed_in, fake(weight).dtype)
    if product.itemsize > norm.computed_in.itemsize or (product != dtype and norm.rounds is not None):
        return None
    return replace(norm, weight=weight, zero_centered=centered is not None, round_before_weight=norm.rounds, dtype=dtype, rounded=dtype)


def _zero_centered(norm: Norm, weight: Any) -> Any:
    """`w` where the weight is `1 + w`, added in the dtype in which `ops.norm` adds it; None otherwise."""
    added = _source(weight) if norm.rounds is None else weight
    if not is_call(added, torch.add) or added.kwargs or added.args[1] != 1:
        return None
    w = added.args[0]
    if norm.rounds is None:
        return _source(w) if fake(added).dtype == norm.computed_in else None
    return w if fake(added).dtype == fake(w).dtype else None


def _biased(norm: Norm, bias: Any, dtype: torch.dtype) -> Norm | None:
    """The norm plus a bias, which gives a value of `dtype`."""
    if not _is_float(bias) or dtype != norm.dtype:
        return None
    bias = _vector(bias, norm)
    if bias is None:
        return None
    rounds = norm.round_before_weight if norm.weight is not None else norm.rounds
    added_in = rounds or norm.computed_in
    if norm.weight is not None and rounds is not None:
        added_in = torch.promote_types(rounds, fake(norm.weight).dtype)
    if torch.promote_types(added_in, fake(bias).dtype) != added_in:
        return None
    return replace(norm, bias=bias, rounded=dtype, round_before_weight=rounds)


def _vector(node: Any, norm: Norm) -> Any:
    """A weight or bias of the normalized shape, before it was made to broadcast; there may be dimensions of one more in
    front. None where it is not one."""
    shape = norm.normalized_shape
    while not _equal(fake(node).shape, shape):
        if not (_is_view(node) or _is_contiguous(node) or is_method(node, "expand")):
            extra = fake(node).dim() - norm.dims
            return node if extra > 0 and _equal(fake(node).shape, (1,) * extra + shape) else None
        node = node.args[0]
    return node


# The rule.


def _between(output: Node, leaves: Iterable[Any]) -> list[Node]:
    """The nodes that make `output` of `leaves`; sizes are left out."""
    found: dict[Node, None] = {}
    stack = [output]
    while stack:
        node = stack.pop()
        if node in found or node in leaves or isinstance(example(node), (int, torch.SymInt)):
            continue
        found[node] = None
        stack += node.all_input_nodes
    return list(found)


def _nodes(output: Node, norm: Norm) -> list[Node]:
    return _between(output, {n for n in (norm.x, norm.weight, norm.bias) if n is not None})


def _in_one_grad_mode(nodes: list[Node]) -> bool:
    graph = nodes[0].graph
    if not graph.find_nodes(op="call_function", target=SET_GRAD):
        return True
    modes = [regions(graph, enabled) for enabled in (True, False)]  # before the first switch it may be either
    return all(len({mode[n][1] for n in nodes}) == 1 for mode in modes)


def _goes_on(node: Node) -> bool:
    """Whether a larger pattern, with the weight or the bias, holds this one."""
    users = list(node.users)
    for user in users:  # grows
        if _is_cast(user) or _is_contiguous(user):
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
        if last is not None and _is_cast(last) and _in_one_grad_mode([node, last]):
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
            x = emit(graph, torch.clone, (x,), {"memory_format": torch.contiguous_format}, like=like)
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
    """A weight or bias without its dimensions of one in front."""
    extra = 0 if vector is None else fake(vector).dim() - norm.dims
    return emit(graph, torch.squeeze, (vector, tuple(range(extra))), like=like) if extra > 0 else vector


NORM_RULES: tuple[Rule, ...] = (RaiseNorm(),)
