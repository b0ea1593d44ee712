"""RoPE, however it is written, recognized by what it does to the features of a head.

Between a value x [..., D] and the result of RoPE there are only slices, joins, signs, and products with tables of cosines and sines. So
each feature of the result is a sum of features of x, each with a sign and at most one entry of a table.
It is RoPE if feature d is x[d] cos[d] -+ x[partner of d] sin[d]: whether the pairs are halves or neighbors, all features rotate or some,
and the tables have an entry for each feature or for each pair. The complex product is the same in another notation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.fx import Node

from te_dynamo.ir.graph import EXAMPLE, fake, is_call, is_method, operands, same_shape, tensor
from te_dynamo.ir.qkv import Rotary

NEAR = 12  # how many nodes before its result x is searched for; the longest spelling known takes nine
JOINS = (torch.cat, torch.concat)
RESHAPES = (torch.reshape, torch.flatten, torch.unflatten)


class Table(NamedTuple):
    """A factor of a feature. part: of a complex table, 0 for the real part and 1 for the imaginary one; else None."""

    node: Node
    part: int | None = None


def same_table(a: Table, b: Table) -> bool:
    return a.part == b.part and _same(a.node, b.node)


def _same(a: Any, b: Any, depth: int = 8) -> bool:
    """Whether two values are the same, or computed in the same way from the same values."""
    if a is b or not isinstance(a, Node) or not isinstance(b, Node):
        return a is b or (isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and _all_same(a, b, depth)) or _equal(a, b)
    if not depth or a.op != b.op or a.op not in ("call_function", "call_method") or a.target != b.target:
        return False
    return _all_same(a.args, b.args, depth - 1) and dict(a.kwargs) == dict(b.kwargs)


def _all_same(a: Any, b: Any, depth: int) -> bool:
    return len(a) == len(b) and all(_same(x, y, depth) for x, y in zip(a, b, strict=True))


def _equal(a: Any, b: Any) -> bool:
    return not isinstance(a, Node) and not isinstance(b, Node) and type(a) is type(b) and bool(a == b)


@dataclass(frozen=True)
class Rope:
    """x: what is rotated; cos, sin: tables that broadcast against x, with `width` entries, one for each feature that rotates, or half as
    many; nodes: all after x up to the result, which is among them."""

    x: Node
    cos: Table
    sin: Table
    rotary: Rotary
    width: int
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Term:
    """For each feature: sign * x[source] * table[entry]; a sign of 0 where there is none. Arrays of the features' shape."""

    sign: np.ndarray
    source: np.ndarray
    entry: np.ndarray

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> Term:
        return Term(change(self.sign), change(self.source), change(self.entry))


Features = dict[Table | None, Term]  # by the table that x's features are multiplied by; None for 1
Complex = tuple[Features, Features]  # the real parts and the imaginary ones


def read_rope(node: Any) -> Rope | None:
    """The RoPE whose result `node` is; None where it is none."""
    if not is_call(node, torch.add, *JOINS, *RESHAPES) and not is_method(node, "to", "type_as", "flatten"):
        return None
    for x in _candidates(node):
        reader = _Reader(x)
        features = reader.read(node)
        rope = None if features is None else _as_rope(x, features, reader.nodes())
        if rope is not None:
            return rope
    return None


def _candidates(node: Node) -> Iterator[Node]:
    """Candidates for x: values of the result's shape not far before it, the nearest first."""
    shape, seen, reached = fake(node).shape, {node}, [node]
    for _ in range(NEAR):
        reached = [n for node in reached for n in node.all_input_nodes if n not in seen and not seen.add(n)]  # type: ignore[func-returns-value]
        yield from (n for n in reached if (t := tensor(n)) is not None and t.is_floating_point() and same_shape(t.shape, shape))


class _Reader:
    """Reads nodes as functions of the features of x; `known` has what each was read as, None if it is no such function."""

    def __init__(self, x: Node) -> None:
        n = np.arange(int(fake(x).shape[-1]))
        self.x = x
        self.tables: list[Table] = []
        self.split: list[Node] = []  # nodes with several results
        self.known: dict[Any, Any] = {x: {None: Term(np.ones_like(n), n, n)}}

    def nodes(self) -> tuple[Node, ...]:
        """All that was read after x."""
        return (*(n for n, found in self.known.items() if n is not self.x and found is not None), *self.split)

    def read(self, node: Any, near: int = NEAR) -> Any:
        if node in self.known or not isinstance(node, Node) or not near:
            return self.known.get(node)
        self.known[node] = None
        self.known[node] = found = self._read(node, near - 1)
        return found

    def _read(self, node: Node, near: int) -> Features | Complex | None:
        if is_call(node, torch.mul):
            return next((p for x, by in operands(node, torch.mul) if (p := self._product(self.read(x, near), by)) is not None), None)
        if is_call(node, torch.add, torch.sub) and len(node.args) == 2 and not node.kwargs:
            return _sum(*(self.read(a, near) for a in node.args), negated=is_call(node, torch.sub))
        if is_call(node, *JOINS, torch.stack):
            return self._join(node, near)
        source = node.args[0] if node.args else None
        if is_call(node, operator.getitem) and isinstance(source, Node) and tensor(source) is None:
            return self._piece(source, node.args[1], near)
        features = self.read(source, near)
        if features is None or tensor(node) is None:
            return None
        if isinstance(features, tuple):
            return _joined([*features], lambda parts: np.stack(parts, -1)) if is_call(node, torch.view_as_real) else None
        if is_call(node, torch.neg):
            return {table: Term(-t.sign, t.source, t.entry) for table, t in features.items()}
        if is_call(node, torch.view_as_complex):
            return _mapped(features, lambda a: a[..., 0]), _mapped(features, lambda a: a[..., 1])
        if is_method(node, "to", "contiguous", "type_as", "float") or is_call(node, torch.clone):
            return features
        if is_call(node, *RESHAPES) or is_method(node, "flatten", "view"):
            return _reshaped(features, fake(source).shape, fake(node).shape)
        if is_call(node, operator.getitem):
            return _indexed(features, node.args[1], fake(source).dim())
        if is_call(node, torch.narrow, torch.select) and (axis := _axis(node.args[1], source, features)) is not None:
            narrows = is_call(node, torch.narrow)
            which = slice(node.args[2], node.args[2] + node.args[3]) if narrows else node.args[2]
            return _taken(features, axis, which)
        return None

    def _product(self, features: Features | Complex | None, by: Any) -> Features | Complex | None:
        table = tensor(by)
        if table is None or features is None:
            return None
        if isinstance(features, tuple):
            (real, imaginary), (re, im) = features, (self._table(by, 0), self._table(by, 1))
            if not table.is_complex():
                return None
            products = [_times(real, re, table), _times(imaginary, im, table), _times(real, im, table), _times(imaginary, re, table)]
            sums = _sum(*products[:2], negated=True), _sum(*products[2:])
            return None if sums[0] is None or sums[1] is None else (sums[0], sums[1])
        return None if table.is_complex() else _times(features, self._table(by), table)

    def _table(self, node: Node, part: int | None = None) -> Table:
        """A table; one that was computed again is the same table."""
        table = Table(node, part)
        known = next((t for t in self.tables if same_table(t, table)), table)
        if known is table:
            self.tables.append(table)
        return known

    def _join(self, node: Node, near: int) -> Features | None:
        parts, dim = node.args[0], (*node.args[1:], node.kwargs.get("dim", 0))[0]
        if not isinstance(parts, (list, tuple)) or dim % fake(node).dim() != fake(node).dim() - 1:
            return None
        read = [self.read(p, near) for p in parts]
        join = np.stack if is_call(node, torch.stack) else np.concatenate
        return None if any(not isinstance(r, dict) for r in read) else _joined(read, lambda arrays: join(arrays, -1))

    def _piece(self, node: Node, index: Any, near: int) -> Features | None:
        """One of the results of a chunk, split or unbind of the features."""
        args: Any = (*node.args, *node.kwargs.values())
        features = self.read(node.args[0], near)
        if not isinstance(features, dict) or not isinstance(index, int):
            return None
        self.split.append(node)
        dim = (args[1] if len(args) > 1 else 0) if is_call(node, torch.unbind) else args[2] if len(args) == 3 else None
        axis = _axis(dim, node.args[0], features)
        if axis is None or not is_call(node, torch.unbind, torch.chunk, torch.split):
            return None
        if is_call(node, torch.unbind):
            return _taken(features, axis, index)
        sizes = [int(t.shape[dim]) for t in node.meta[EXAMPLE]]
        start = sum(sizes[:index])
        return _taken(features, axis, slice(start, start + sizes[index]))


def _mapped(features: Features, change: Callable[[np.ndarray], np.ndarray]) -> Features:
    return {table: term.map(change) for table, term in features.items()}


def _times(features: Features, table: Table, value: torch.Tensor) -> Features | None:
    if set(features) != {None} or value.dim() == 0:
        return None
    term = features[None]
    if term.sign.ndim != 1 or value.shape[-1] != term.sign.shape[0]:
        return None
    return {table: Term(term.sign, term.source, np.arange(len(term.sign)))}


def _sum(a: Any, b: Any, *, negated: bool = False) -> Features | None:
    if not isinstance(a, dict) or not isinstance(b, dict) or set(a) & set(b):
        return None
    sign = -1 if negated else 1
    return {**a, **{table: Term(sign * t.sign, t.source, t.entry) for table, t in b.items()}}


def _joined(parts: Sequence[Features], join: Callable[[Sequence[np.ndarray]], np.ndarray]) -> Features:
    def terms(table: Table | None) -> list[Term]:
        return [p[table] if table in p else next(iter(p.values())).map(np.zeros_like) for p in parts]

    tables = dict.fromkeys(table for p in parts for table in p)
    return {t: Term(*(join([getattr(term, name) for term in terms(t)]) for name in ("sign", "source", "entry"))) for t in tables}


def _reshaped(features: Features, before: Sequence[Any], after: Sequence[Any]) -> Features | None:
    """Features merged or split: nothing but the dimensions of the features may change."""
    lead = len(before) - next(iter(features.values())).sign.ndim
    if not same_shape(before[:lead], after[:lead]) or not all(isinstance(n, int) for n in after[lead:]):
        return None
    return _mapped(features, lambda a: a.reshape(tuple(after[lead:])))


def _indexed(features: Features, index: Any, rank: int) -> Features | None:
    """x[..., i]: an index into the features only."""
    parts: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    if None in parts or any(isinstance(p, (Node, list)) for p in parts):
        return None
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts = (*parts[:at], *[slice(None)] * (rank - len(parts) + 1), *parts[at + 1 :])
    parts = (*parts, *[slice(None)] * (rank - len(parts)))
    lead = rank - next(iter(features.values())).sign.ndim
    numbers = [n for p in parts[lead:] for n in ((p.start, p.stop, p.step) if isinstance(p, slice) else (p,))]
    if any(n is not None and not isinstance(n, int) for n in numbers) or any(p != slice(None) for p in parts[:lead]):
        return None
    return _mapped(features, lambda a: a[parts[lead:]])


def _axis(dim: Any, of: Any, features: Features) -> int | None:
    """Which dimension of the features `dim` is; None if it is not one of theirs."""
    rank, ndim = fake(of).dim(), next(iter(features.values())).sign.ndim
    axis = dim % rank - (rank - ndim) if isinstance(dim, int) else -1
    return axis if axis >= 0 else None


def _taken(features: Features, axis: int, which: int | slice) -> Features:
    index = (*[slice(None)] * axis, which)
    return _mapped(features, lambda a: a[index])


def _as_rope(x: Node, features: Any, nodes: tuple[Node, ...]) -> Rope | None:
    if not isinstance(features, dict) or next(iter(features.values())).sign.ndim != 1:
        return None
    tables = [t for t in features if t is not None]
    every = np.arange(int(fake(x).shape[-1]))
    own = [t for t in tables if (features[t].source == every)[features[t].sign != 0].all()]
    if len(tables) != 2 or len(own) != 1:
        return None
    cos, sin = own[0], next(t for t in tables if t is not own[0])
    width = int((features[cos].sign != 0).sum())
    d = every[:width]
    if width % 2 or not _passes(features.get(None), width, every) or not (features[cos].sign[:width] == 1).all():
        return None
    turned = features[sin]
    for rotary, partner, first, pair in (
        ("halves", (d + width // 2) % width, d < width // 2, d % (width // 2)),
        ("interleaved", d ^ 1, d % 2 == 0, d // 2),
    ):
        fits = (turned.source[:width] == partner).all() and (turned.sign[:width] == np.where(first, -1, 1)).all()
        if fits and not turned.sign[width:].any() and all(_covers(t, features[t].entry[:width], d, pair) for t in (cos, sin)):
            return Rope(x, cos, sin, rotary, width, nodes)
    return None


def _passes(rest: Term | None, width: int, every: np.ndarray) -> bool:
    """Whether the features that do not rotate are unchanged."""
    if rest is None:
        return width == len(every)
    return not rest.sign[:width].any() and (rest.sign[width:] == 1).all() and (rest.source == every)[width:].all()


def _covers(table: Table, entry: np.ndarray, features: np.ndarray, pairs: np.ndarray) -> bool:
    """Whether a table has an entry for each feature that rotates, or for each pair, in order."""
    size = fake(table.node).shape[-1]
    return bool((size == len(features) and (entry == features).all()) or (2 * size == len(features) and (entry == pairs).all()))
