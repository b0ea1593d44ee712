"""Which element-wise functions give about the same at a value and at what FP8 makes of it.

Backward evaluates derivatives at values that were rounded to E4M3 (`kept_inputs`). The rounding error is a sixteenth of a value at most,
and small values become zero. So a function may be steep near zero or flat far away, as activations are, but it must not subtract what
cancels (h - 30, h - mean, a - b), turn over again and again far from zero (sin), grow without bounds (exp), or be singular at zero
(sqrt, log, 1/h). Everything that is not declared here counts as such.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten
COPIES = {aten.cat, aten.constant_pad_nd, aten._unsafe_view, aten._to_copy}  # element for element, though their tags do not say so
SHIFT = 3.0  # the largest constant that may be added: hardswish has 3, clamped SwiGLU 1
THRESHOLD = 32.0  # the largest constant that may be compared with: softplus has 20

ALWAYS = COPIES | {
    aten.mul, aten.neg, aten.abs, aten.sign, aten.square, aten.clone, aten.alias, aten.where, aten.masked_fill,
    aten.relu, aten.sigmoid, aten.tanh, aten.erf, aten.atan, aten.expm1, aten.silu, aten.gelu, aten.hardtanh, aten.leaky_relu,
    aten.clamp, aten.clamp_min, aten.clamp_max, aten.isnan, aten.isinf, aten.isfinite, aten.logical_not, aten.bitwise_not,
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


def _sum(node: Node, inside: Collection[Node]) -> bool:
    """With a small constant, or of two functions of one value."""
    (first, *_), others = node.args, node.args[1:]
    if node.kwargs.get("alpha", 1) != 1:
        return False
    if isinstance(others[0], Node):
        return isinstance(first, Node) and len(_sources(first, inside) | _sources(others[0], inside)) == 1
    return abs(others[0]) <= SHIFT


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
    """By something else, or by a positive constant plus something that is not negative."""
    divisor = node.args[1]
    if divisor not in inside:
        return True
    return calls(divisor, aten.add) and _is_positive(divisor.args[1]) and calls(divisor.args[0], aten.exp, aten.abs, aten.square)


def _exponential(node: Node, inside: Collection[Node]) -> bool:
    """Inside of a sigmoid or a softplus: only 1 + exp(x) is read."""
    return all(calls(u, aten.log1p) or (calls(u, aten.add) and _is_positive(u.args[1])) for u in node.users if u in inside)


def calls(node: Any, *packets: Any) -> bool:
    """Whether it is a node that calls an overload of one of these operators."""
    return isinstance(node, Node) and isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in packets


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _compared(node: Node, _: Collection[Node]) -> bool:
    return not isinstance(node.args[1], Node) and abs(node.args[1]) <= THRESHOLD


SOMETIMES: dict[Any, Callable[[Node, Collection[Node]], bool]] = {
    aten.add: _sum,
    aten.sub: _sum,
    aten.div: _quotient,
    aten.exp: _exponential,
    aten.log1p: lambda node, _: calls(node.args[0], aten.exp),
    aten.pow: lambda node, _: isinstance(node.args[1], (int, float)) and node.args[1] >= 1,
    aten.gt: _compared,
    aten.ge: _compared,
    aten.lt: _compared,
    aten.le: _compared,
}
