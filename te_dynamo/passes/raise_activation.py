"""Stage 2, activations: every spelling in `te_dynamo.ir.activation.SPELLINGS`, written out, becomes `ops.activation`.

A pattern is the canonical graph of a spelling, so none is written here. Products and sums commute, and the numbers of a clamped SwiGLU
may be any. The product of an activation and another value of its shape is a gated activation, whether two linears or one make the gate
and the other value.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch._prims_common import is_contiguous_or_false
from torch.fx import Graph, Interpreter, Node, symbolic_trace

from te_dynamo import ops
from te_dynamo.ir.activation import SPELLINGS, Spelling
from te_dynamo.ir.graph import EXAMPLE, emit, fake, is_call, operands, same_shape, tensor
from te_dynamo.passes.canonicalize import canonicalize
from te_dynamo.passes.rules import Match, Rule

SENTINELS = {"alpha": 3.0625, "limit": 5.0625}  # stand for the model's numbers in a pattern
DEFAULTS = {"inplace": False, "approximate": "none", "min": None, "max": None}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# What the inputs (nodes) and numbers (names) of a pattern are in a graph, and which graph nodes match the pattern's other nodes.
Bound = Mapping[Any, Any]


@dataclass(frozen=True)
class Pattern:
    """A spelling as a canonical graph: its inputs and its last node; size: how many calls it has."""

    spelling: str
    inputs: tuple[Node, ...]
    output: Node
    size: int


@cache
def patterns() -> tuple[Pattern, ...]:
    """Larger ones first, since they may contain others."""
    graphs = {name: _canonical(spelling) for name, spelling in SPELLINGS.items() if spelling.written_out}
    found = []
    for name, graph in graphs.items():
        inputs = tuple(graph.find_nodes(op="placeholder"))
        found.append(Pattern(name, inputs, graph.output_node().args[0], len(graph.nodes) - len(inputs) - 1))
    return tuple(sorted(found, key=lambda p: -p.size))


def _canonical(spelling: Spelling) -> Graph:
    compute = spelling.compute
    numbers = {name: SENTINELS[name] for name in spelling.numbers}
    gm = symbolic_trace((lambda x: compute(x)) if spelling.inputs == 1 else (lambda gate, up: compute(gate, up, **numbers)))
    _Valued(gm).run(*[torch.ones(2) for _ in range(spelling.inputs)])
    canonicalize(gm)
    return gm.graph


class _Valued(Interpreter):
    """Notes each node's value, as Dynamo does."""

    def run_node(self, n: Node) -> Any:
        n.meta[EXAMPLE] = super().run_node(n)
        return n.meta[EXAMPLE]


def _same(pattern: Any, found: Any, bound: Bound, last: bool = False) -> Bound | None:
    """`bound`, extended by what matches `pattern`; None if `found` does not match. last: it is the pattern's last node."""
    if not isinstance(pattern, Node):
        return _same_constant(pattern, found, bound)
    if pattern in bound:
        return bound if bound[pattern] is found else None
    if not isinstance(found, Node) or tensor(found) is None:
        return None
    if pattern.op == "placeholder":
        return {**bound, pattern: found}
    if (found.op, found.target) != (pattern.op, pattern.target) or not (last or len(found.users) == len(pattern.users)):
        return None
    for args in _orders(pattern, found):
        result: Bound | None = {**bound, pattern: found}
        for a, b in zip(*args, strict=True):
            result = None if result is None else _same(a, b, result)
        if result is not None:
            return result
    return None


def _orders(pattern: Node, found: Node) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """The arguments of both, in each order in which they may match."""
    names = sorted(pattern.kwargs.keys() | found.kwargs.keys())
    if len(pattern.args) != len(found.args) or not set(names) <= DEFAULTS.keys():
        return []
    own, given = (tuple(n.kwargs.get(name, DEFAULTS[name]) for name in names) for n in (pattern, found))
    commutes = pattern.target in (torch.mul, torch.add) and len(found.args) == 2
    return [((*pattern.args, *own), (*args, *given)) for args in ([found.args, found.args[::-1]] if commutes else [found.args])]


def _same_constant(pattern: Any, found: Any, bound: Bound) -> Bound | None:
    name = next((n for n, sentinel in SENTINELS.items() if type(pattern) is float and abs(pattern) == sentinel), None)
    if name is None:
        return bound if not isinstance(found, Node) and pattern == found else None
    if type(found) not in (int, float):
        return None
    value = float(found if pattern > 0 else -found)
    return {**bound, name: value} if bound.get(name, value) == value else None


class RaiseActivation(Rule):
    kind = "activation"
    quiet = True

    @cached_property
    def ends_at(self) -> frozenset[Any]:  # type: ignore[override]
        return frozenset({p.output.target for p in patterns()} | {torch.mul, F.glu})

    def match(self, node: Node) -> Match | None:
        y = tensor(node)
        if y is None or y.dtype not in FLOATS or not is_contiguous_or_false(y):
            return None
        found = _product(node) or _called_glu(node) or _spelled(node)
        return None if found is None or _is_inner(node) else found

    def rewrite(self, graph: Graph, match: Match) -> Node:
        inputs, like = match.values["inputs"], match.output
        if match.values["halves"]:
            halves = emit(graph, torch.chunk, (*inputs, 2, -1), like=like)
            up, gate = (emit(graph, operator.getitem, (halves, i), like=like) for i in range(2))
            inputs = (gate, up)
        attributes = {"spelling": match.values["spelling"], "out_dtype": fake(like).dtype, **match.values["numbers"]}
        return emit(graph, ops.activation, inputs, attributes, like=like)


def _match(node: Node, nodes: list[Node], spelling: str, inputs: tuple[Node, ...], halves: bool = False, **numbers: float) -> Match:
    return Match(node, nodes, {"spelling": spelling, "inputs": inputs, "numbers": numbers, "halves": halves})


def _product(node: Node) -> Match | None:
    """An activation, already raised, times something else."""
    for gate, up in operands(node, torch.mul):
        if is_call(gate, ops.activation) and len(gate.args) == 1 and len(gate.users) == 1 and _alike(node, gate, up):
            return _match(node, [gate, node], gate.kwargs["spelling"], (gate.args[0], up))
    return None


def _called_glu(node: Node) -> Match | None:
    if not is_call(node, F.glu) or not node.args:
        return None
    x, dim = (*node.args, node.kwargs.get("dim", -1))[:2]
    return _match(node, [node], "glu", (x,), halves=True) if dim in (-1, fake(x).dim() - 1) else None


def _spelled(node: Node) -> Match | None:
    if node.op != "call_function":
        return None
    return next((m for p in patterns() if (m := _written_out(node, p)) is not None), None)


def _is_inner(node: Node) -> bool:
    """Whether this node is inside a larger pattern: that one is matched at its end."""
    last = node
    for _ in range(patterns()[0].size):
        if len(last.users) != 1:
            return False
        (last,) = last.users
        if (found := _spelled(last)) is not None and node in found.nodes:
            return True
    return False


def _written_out(node: Node, pattern: Pattern) -> Match | None:
    if node.target != pattern.output.target or (bound := _same(pattern.output, node, {}, last=True)) is None:
        return None
    inputs = tuple(bound[i] for i in pattern.inputs)
    if len(set(inputs)) < len(inputs) or not _alike(*inputs) or not same_shape(fake(node).shape, fake(inputs[0]).shape):
        return None
    numbers = {name: value for name, value in bound.items() if isinstance(name, str)}
    nodes = [found for own, found in bound.items() if isinstance(own, Node) and own not in pattern.inputs]
    return _match(node, nodes, pattern.spelling, inputs, **numbers)


def _alike(*nodes: Any) -> bool:
    """Whether all are tensors of one shape and dtype."""
    values = [tensor(n) for n in nodes]
    first = values[0]
    return first is not None and all(v is not None and v.dtype == first.dtype and same_shape(v.shape, first.shape) for v in values)


ACTIVATION_RULES: list[Rule] = [RaiseActivation()]
