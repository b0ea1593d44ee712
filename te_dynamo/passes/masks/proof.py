"""What a mask is: proved for all sizes at once, or by comparison where every size is known."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, GraphModule, Node

from te_dynamo import ops
from te_dynamo.ir import masked
from te_dynamo.ir.graph import erase_if_dead, is_call, upstream
from te_dynamo.ir.meta import MASK
from te_dynamo.passes.masks import attends as attending
from te_dynamo.passes.masks.attends import Attends, as_attends
from te_dynamo.passes.masks.compute import compute
from te_dynamo.passes.masks.formulas import (
    ONE,
    Expr,
    Formula,
    Inequality,
    Unproven,
    at_most,
    both,
    differ,
    either,
    expand,
    negated,
    symbols_of,
)
from te_dynamo.passes.masks.reader import Reader
from te_dynamo.passes.masks.tensors import HANDLERS, Place, Tensor, is_constant
from te_dynamo.sites import Sites

log = logging.getLogger(__name__)

DROPPED = ("causal", "all")  # what an attention can say without a mask
SIZES = ("size", "dim", "numel", operator.floordiv, operator.mod)  # other functions that compute only sizes


@dataclass(frozen=True)
class Proof:
    """What a mask was proved to be.

    kind: "causal" (row i attends to column j iff j <= i), "all" (every row attends to every column), "window" (iff
        i - window <= j <= i), "padded" (those of `within`, and only keys that data says are valid), "packed" (those of `within`, and only
        within a sequence, which data numbers), or "unknown", with the reason for it.
    within: "causal", "all", "window" (then with the number of columns before the row's own), or "" for none of these.
    attends: the same as a formula, where it has one: of an unknown mask too.
    """

    kind: Literal["causal", "all", "window", "padded", "packed", "unknown"]
    reason: str = ""
    window: int | None = None
    within: str = ""
    attends: Attends | None = field(default=None, compare=False)

    @property
    def described(self) -> str:
        """For a report."""
        if self.kind not in ("padded", "packed"):
            return self.reason or self.kind
        joined = {"padded": "of the keys that {} says are valid", "packed": "within the sequences that {} tells apart"}[self.kind]
        return f"{self.within or 'some'} {joined.format(self.reason)}"


def prove(mask: Node, attention: Node | None = None) -> Proof:
    """What `mask` is (bool: True attends; float: added to the scores) where `attention` reads it, or at the graph's end.

    The mask is broadcast to the attention's rows and columns; without an attention, it is taken as it is.
    """
    return _Prover(mask.graph, {attention: mask}).prove(attention)


def simplify_masks(gm: GraphModule, sites: Sites) -> None:
    """Drops, in place, the masks of `ops.attention` nodes that are proved to be causal (`causal=True` says it) or to
    attend everywhere, and what built them where nothing else needs it.

    Each attention that had a mask gets its `Proof` as `meta[MASK]`. The graph's result stays what it was.
    """
    masks = {n: n.args[3] for n in gm.graph.nodes if is_call(n, ops.attention) and len(n.args) > 3 and isinstance(n.args[3], Node)}
    if not masks:
        return
    prover = _Prover(gm.graph, masks)
    dropped: list[Node] = []
    for node, mask in masks.items():
        try:
            proof = prover.prove(node)
        except Exception as error:
            if sites.strict:
                raise
            log.warning("te_dynamo: the mask %s was left as it is: %s", mask.name, error)
            proof = Proof("unknown", f"the proof failed: {type(error).__name__}: {error}")
        node.meta[MASK] = proof
        if proof.attends is not None and proof.attends.tensors:
            node.args = (*node.args[:4], *(node.args[4:5] or (None,)), proof.attends.tensors)
        if proof.kind in DROPPED:
            node.args = (*node.args[:3], None, *node.args[4:])
            node.kwargs = {**node.kwargs, "causal": proof.kind == "causal" or node.kwargs.get("causal", False)}
            dropped.append(mask)
    erase_if_dead(gm.graph, [n for n in upstream(*dropped) if prover.is_pure(n)])


class _Prover:
    """Proves the masks of one graph, each where it is read."""

    def __init__(self, graph: Graph, masks: Mapping[Node | None, Node]) -> None:
        self.masks = masks
        self.reader = Reader(graph, masks)
        self.computed: set[Node] = set()
        self._proofs: dict[Any, Proof] = {}

    def is_pure(self, node: Node) -> bool:
        """Whether a node may be erased where nothing uses its value."""
        return node in self.computed or (node not in self.reader.writers and (node.target in HANDLERS or node.target in SIZES))

    def prove(self, attention: Node | None) -> Proof:
        node, mask = self.masks[attention], self.reader.read[attention]
        if isinstance(mask, Unproven):
            return Proof("unknown", str(mask))
        grid = (1, 1, *mask.shape)[-2:]
        if attention is not None:
            grid = tuple(self.reader.shape(attention.args[n])[-2] for n in (0, 1))
        sinks = attention is not None and len(attention.args) > 4 and attention.args[4] is not None
        if (mask, grid, sinks) not in self._proofs:
            with unset_fake_temporarily():
                proof = self._prove(mask, node, grid[0], grid[1], sinks)
            if proof.kind in DROPPED:
                proof = replace(proof, attends=None)
            elif proof.attends is None and mask.dtype == torch.bool and not self.reader.is_written(node):
                proof = replace(proof, attends=attending.given(node, mask.shape))
            self._proofs[mask, grid, sinks] = proof
        return self._proofs[mask, grid, sinks]

    def _prove(self, mask: Tensor, node: Node, rows: Expr, columns: Expr, sinks: bool) -> Proof:
        try:
            proof = self._symbolically(mask, rows, columns, sinks)
        except (Unproven, RecursionError) as stop:
            proof = Proof("unknown", str(stop))
        if proof.kind != "unknown" or not (isinstance(rows, int) and isinstance(columns, int)):
            return proof
        nodes = self.reader.needed([node])
        if nodes & self.reader.writers.keys():
            return proof
        try:
            compared = compare(compute(sorted(nodes)), rows, columns)
        except Exception as error:
            log.debug("te_dynamo: the mask %s could not be computed: %s", node.name, error)
            return proof
        self.computed |= nodes
        return compared or proof

    def _symbolically(self, mask: Tensor, rows: Expr, columns: Expr, sinks: bool) -> Proof:
        integers = self.reader.integers
        i, j = integers.index(rows), integers.index(columns)
        leading = mask.shape[:-2]
        outer = tuple(map(integers.index, leading))
        attends = self._attended(mask, Place((*leading, rows, columns), mask.dtype, integers, (*outer, i, j)))
        attends = frozenset(frozenset(q for q in a if not integers.holds(frozenset([frozenset([q])]))) for a in attends)
        names = {rows: "rows", columns: "columns", **dict(zip(reversed(outer), ("head", "batch"), strict=False)), i: "row", j: "column"}
        proof = self._classified(attends, i, j)
        sees_something = sinks or (rows == columns and integers.holds(_at(attends, j, i)))
        if mask.dtype != torch.bool and not sees_something:
            return proof  # a row that adds the same to all of its scores hides none
        return replace(proof, attends=as_attends(attends, integers, {s: n for s, n in names.items() if not isinstance(s, int)}))

    def _classified(self, attends: Formula, i: Expr, j: Expr) -> Proof:
        integers = self.reader.integers
        if data := symbols_of(attends) & integers.data.keys():
            return self._with_data(attends, i, j) or Proof("unknown", integers.data[min(data, key=str)].why)
        if integers.holds(attends):
            return Proof("all")
        causal = at_most(j, i)
        if not integers.impossible(both(attends, negated(causal))):
            return Proof("unknown", "the mask is not proved to hide what comes later")
        if integers.impossible(both(causal, negated(attends))):
            return Proof("causal")
        for inequality in {i for alternative in attends for i in alternative}:
            width = expand(sum(c * m for m, c in inequality) - (i - j))  # i - j <= -width
            if isinstance(width, int) and width <= 0 and integers.impossible(differ(attends, both(causal, at_most(i - j, -width)))):
                return Proof("window", window=-width)
        return Proof("unknown", "the mask hides more than what comes later")

    def _with_data(self, attends: Formula, i: Expr, j: Expr) -> Proof | None:
        """A mask in which data only concerns keys, or is compared between a row and a column; None for any other."""
        data = self.reader.integers.data
        if len(attends) != 1:
            return None
        (inequalities,) = attends
        of_data = {q for q in inequalities if _symbols(q) & data.keys()}
        within = self._classified(frozenset([inequalities - of_data]), i, j)
        read = [[data[s] for s in _symbols(q) & data.keys()] for q in of_data]
        about_keys = [q for q in read if all(i not in datum.index for datum in q)]
        pairs = [frozenset(q) for q in read if len(q) == 2 and len({datum.source for datum in q}) == 1]
        kind: Literal["padded", "packed"]
        if len(about_keys) == len(read):
            kind = "padded"
        elif any(pairs.count(pair) == 2 for pair in pairs):  # a <= b and b <= a
            kind = "packed"
        else:
            return None
        told = sorted({self.reader.origin(datum.source) for q in read for datum in q} - {""})
        return Proof(kind, " and ".join(told) or "the graph", window=within.window, within="" if within.kind == "unknown" else within.kind)

    def _attended(self, mask: Tensor, place: Place) -> Formula:
        """Where the mask attends; elsewhere it hides."""
        value = place.read(mask)
        if mask.dtype == torch.bool:
            return value
        attended: list[Formula] = []
        for condition, number in value:
            if number == 0:
                attended.append(condition)
            elif not (is_constant(number) and number <= _lowest(mask.dtype)) and not place.integers.impossible(condition):
                raise Unproven(f"the mask adds {number}, neither 0 nor the lowest {mask.dtype}")
        return either(*attended)


def compare(mask: torch.Tensor, rows: int, columns: int) -> Proof | None:
    """What a mask with known values is; None if it is neither causal, nor a window, nor attends everywhere."""
    mask = mask.expand((*mask.shape[:-2], rows, columns))
    attended = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((attended | (mask <= _lowest(mask.dtype))).all()):
        return None
    if bool(attended.all()):
        return Proof("all")
    i, j = torch.arange(rows, device="cpu")[:, None], torch.arange(columns, device="cpu")
    if bool((attended == (j <= i)).all()):
        return Proof("causal")
    window = int(attended.reshape(-1, rows, columns)[0, -1].sum()) - 1
    if rows == columns and window >= 0 and bool((attended == ((j <= i) & (i - j <= window))).all()):
        return Proof("window", window=window, attends=attending.window(window))
    return None


def _symbols(inequality: Inequality) -> set[Expr]:
    return symbols_of(frozenset([frozenset([inequality])]))


def _at(formula: Formula, symbol: Expr, value: Expr) -> Formula:
    """A formula with one index replaced by a value. What is read at that index may be anything."""
    return frozenset(frozenset(frozenset(_substituted(dict(q), symbol, value).items()) for q in alternative) for alternative in formula)


def _substituted(terms: dict[Any, int], symbol: Expr, value: Expr) -> dict[Any, int]:
    found = {m: c for m, c in terms.items() if m != symbol}
    at, times = (ONE, value) if isinstance(value, int) else (value, 1)
    found[at] = found.get(at, 0) + times * terms.get(symbol, 0)
    return {m: c for m, c in found.items() if c}


def _lowest(dtype: torch.dtype) -> float:
    """A mask of this dtype hides by adding this, or less."""
    if not dtype.is_floating_point:
        raise Unproven(f"the mask is of {dtype}")
    return masked.lowest(dtype)
