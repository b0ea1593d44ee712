"""Which element-wise functions give about the same at a value and at what FP8 makes of it.

Backward evaluates derivatives at values that were rounded to E4M3 (`kept_inputs`). The rounding error is a sixteenth of a value at most,
and small values become zero. So a function may be steep near zero or flat far away, as activations are, but it must not subtract what
cancels (h - 30, h - mean, a - b), have a step or be steep far from zero (h > 30, 20 * (h - 3)), turn over again and again there (sin),
grow without bounds (exp), or be singular at zero (sqrt, log, 1/h). Everything that is not declared here counts as such.

Derivatives themselves are mostly autograd's, and as tolerant as the functions; but who writes a backward may divide by what was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import Node

from te_dynamo.lowering.aten import COPIES, aten, calls

SHIFT = 3.0  # the largest constant that may be added: hardswish has 3, clamped SwiGLU 1
THRESHOLD = 16.0  # the largest constant that may be compared with: ReLU6 has 6, clamped SwiGLU 7 or 10
SMOOTH_THRESHOLD = 32.0  # the same where both sides are about equal there: softplus has 20

ALWAYS = COPIES | {
    aten.neg, aten.abs, aten.sign, aten.square, aten.clone, aten.alias, aten.where, aten.masked_fill,
    aten.relu, aten.sigmoid, aten.tanh, aten.erf, aten.atan, aten.expm1, aten.silu, aten.gelu, aten.leaky_relu,
    aten.isnan, aten.isinf, aten.isfinite, aten.logical_not, aten.bitwise_not,
    torch.ops.prims.convert_element_type,
}  # fmt: skip


def tolerates(node: Node, inside: Collection[Node]) -> bool:
    """Whether `node`, element-wise, is such a function of its inputs among `inside`."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", "") == "getitem"
    packet = node.target.overloadpacket
    if node.target.is_view or packet in ALWAYS:
        return True
    rule = SOMETIMES.get(packet)
    return rule is not None and rule(node, inside)


def divides(node: Node, rounded: Collection[Node]) -> bool:
    """Whether it divides by one of the rounded values, which may be zero."""
    if calls(node, aten.div):
        return not _quotient(node, rounded)
    power = calls(node, aten.pow) and isinstance(node.args[1], (int, float)) and node.args[1] < 0
    return (power or calls(node, *SINGULAR)) and node.args[0] in rounded and not _is_above_zero(node.args[0])


def _product(node: Node, _: Collection[Node]) -> bool:
    """A factor makes a function steeper, where it was shifted to."""
    return abs(_shift(node)) <= SHIFT


def _sum(node: Node, inside: Collection[Node]) -> bool:
    """With a small constant, or of two functions of one value."""
    if node.kwargs.get("alpha", 1) != 1:
        return False
    terms = [n for n in node.args if isinstance(n, Node)]
    if len(terms) == 2:
        return len(_sources(terms[0], inside) | _sources(terms[1], inside)) == 1
    return abs(_shift(node)) <= SHIFT


def _shift(node: Node) -> float:
    """b, where the node is a x + b of an x that is no sum with a constant."""
    tensors, constants = node.all_input_nodes, [n for n in node.args if isinstance(n, (int, float))]
    if calls(node, aten.add, aten.sub, aten.mul, aten.div) and len(tensors) == len(constants) == 1:
        before, constant = _shift(tensors[0]), constants[0]
        if calls(node, aten.mul):
            return before * constant
        if calls(node, aten.div):
            return before / constant if constant and node.args[0] is tensors[0] else 0.0
        minus = -1 if calls(node, aten.sub) else 1
        return before + minus * constant if node.args[0] is tensors[0] else constant + minus * before
    same = calls(node, *COPIES - {aten.cat}, aten.neg, aten.clone, aten.alias, torch.ops.prims.convert_element_type)
    sign = -1.0 if calls(node, aten.neg) else 1.0
    views = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return sign * _shift(tensors[0]) if same or views else 0.0


def _sources(node: Node, inside: Collection[Node]) -> set[Node]:
    """The values from which `node` is computed: nodes inside that read nothing inside, and nodes outside."""
    found, pending, seen = set[Node](), [node], set[Node]()
    while pending:
        here = pending.pop()
        if here in seen:
            continue
        seen.add(here)
        before = [n for n in here.all_input_nodes if n in inside] if here in inside else []
        pending += before
        found |= set() if before else {here}
    return found


def _quotient(node: Node, inside: Collection[Node]) -> bool:
    """By something else, or by what is above zero."""
    divisor = node.args[1]
    return divisor not in inside or _is_above_zero(divisor)


def _is_above_zero(node: Any) -> bool:
    """Whether it is a positive constant plus something that is not negative."""
    if not calls(node, aten.add):
        return False
    constants = [n for n in node.args if not isinstance(n, Node)]
    return any(map(_is_positive, constants)) and all(map(_is_not_negative, node.all_input_nodes))


def _is_not_negative(node: Node) -> bool:
    squares = (calls(node, aten.mul) and node.args[0] is node.args[1]) or (calls(node, aten.pow) and node.args[1] == 2)
    return bool(squares) or calls(node, aten.exp, aten.abs, aten.square)


def _exponential(node: Node, inside: Collection[Node]) -> bool:
    """Inside of a sigmoid or a softplus: only 1 + exp(x) is read."""
    return all(calls(u, aten.log1p) or (calls(u, aten.add) and _is_positive(u.args[1])) for u in node.users if u in inside)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _compared(node: Node, _: Collection[Node]) -> bool:
    first, second = node.args
    smooth = any(calls(u, aten.exp) for u in first.users)
    return not isinstance(second, Node) and abs(second) <= (SMOOTH_THRESHOLD if smooth else THRESHOLD)


def _clamped(node: Node, _: Collection[Node]) -> bool:
    return all(not isinstance(n, Node) and abs(n) <= THRESHOLD for n in node.args[1:] if n is not None)


SINGULAR = (aten.reciprocal, aten.rsqrt, aten.log, aten.log2, aten.log10)
SOMETIMES: dict[Any, Callable[[Node, Collection[Node]], bool]] = {
    aten.mul: _product,
    aten.add: _sum,
    aten.sub: _sum,
    aten.div: lambda node, inside: _quotient(node, inside) and _product(node, inside),
    aten.exp: _exponential,
    aten.log1p: lambda node, _: calls(node.args[0], aten.exp),
    aten.pow: lambda node, _: isinstance(node.args[1], (int, float)) and node.args[1] >= 1,
    aten.gt: _compared,
    aten.ge: _compared,
    aten.lt: _compared,
    aten.le: _compared,
    aten.clamp: _clamped,
    aten.clamp_min: _clamped,
    aten.clamp_max: _clamped,
    aten.hardtanh: _clamped,
}
