"""Formulas over integers, and their decision by linear arithmetic, for all sizes at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch

UNBOUNDED = 2**40  # no size is larger: what rules out overflow where a size is symbolic
MAX_INEQUALITIES = 400
MAX_BRANCHES = 500
MAX_FORMULA = 1000

Expr: TypeAlias = Any  # an int, or an expanded sympy polynomial over integer symbols
Row: TypeAlias = dict[Any, int]  # monomial -> coefficient, the constant under 1: their sum is at most 0


class Unproven(Exception):
    """The proof stops here, for the reason given."""


@dataclass(frozen=True)
class AtMostZero:
    expr: Expr  # not a constant


@dataclass(frozen=True)
class Junction:
    """All of its parts (a conjunction), or any of them."""

    conjunction: bool
    parts: tuple[Formula, ...]
    size: int


Formula: TypeAlias = bool | AtMostZero | Junction


def expand(expr: Any) -> Expr:
    if isinstance(expr, int):
        return expr
    expr = sympy.expand(expr)
    return int(expr) if expr.is_Integer else expr


def at_most(a: Expr, b: Expr) -> Formula:
    expr = expand(a - b)
    return expr <= 0 if isinstance(expr, int) else AtMostZero(expr)


def equal(a: Expr, b: Expr) -> Formula:
    return both(at_most(a, b), at_most(b, a))


def both(*parts: Formula) -> Formula:
    return _junction(True, parts)


def either(*parts: Formula) -> Formula:
    return _junction(False, parts)


def _junction(conjunction: bool, parts: Iterable[Formula]) -> Formula:
    kept = tuple(dict.fromkeys(p for p in parts if p is not conjunction))
    if (not conjunction) in kept:
        return not conjunction
    if len(kept) < 2:
        return kept[0] if kept else conjunction
    size = sum(p.size if isinstance(p, Junction) else 1 for p in kept)
    if size > MAX_FORMULA:
        raise Unproven("the mask is too complicated")
    return Junction(conjunction, kept, size)


def differ(a: Formula, b: Formula) -> Formula:
    return either(both(a, negated(b)), both(negated(a), b))


def negated(formula: Formula) -> Formula:
    if isinstance(formula, bool):
        return not formula
    if isinstance(formula, AtMostZero):
        return AtMostZero(expand(1 - formula.expr))
    return _junction(not formula.conjunction, map(negated, formula.parts))


def inequalities(formula: Formula) -> Iterator[Expr]:
    """What the formula says is at most 0, in any of its parts."""
    if isinstance(formula, AtMostZero):
        yield formula.expr
    elif isinstance(formula, Junction):
        yield from itertools.chain.from_iterable(map(inequalities, formula.parts))


class Integers:
    """What is known of the integers in the formulas: the ranges of indices and of symbolic sizes."""

    def __init__(self) -> None:
        self.shape_env: Any = None
        self.sizes: dict[Expr, Expr] = {}  # of the dimension that an index runs over

    def of(self, value: Any) -> Expr:
        """A Python integer or SymInt as an expression. Sets no guard."""
        if not isinstance(value, torch.SymInt):
            return int(value)
        if not isinstance(getattr(value.node, "expr", None), sympy.Expr):  # a nested tensor's
            raise Unproven(f"the size {value} is no expression")
        self.shape_env = value.node.shape_env
        return expand(value.node.expr)

    def index(self, size: Expr) -> Expr:
        """A new index that runs over a dimension of this size."""
        if size == 1:
            return 0
        symbol = sympy.Symbol(f"index{len(self.sizes)}", integer=True)
        self.sizes[symbol] = size
        return symbol

    def bound(self, expr: Expr) -> float:
        """What the absolute value is at most; infinity where nothing is known."""
        return sum(
            abs(coefficient) * math.prod(max(map(abs, self._range(factor))) for factor in sympy.Mul.make_args(monomial) if monomial != 1)
            for monomial, coefficient in _row(expr).items()
        )

    def _range(self, symbol: Expr) -> tuple[float, float]:
        if symbol in self.sizes:
            return 0, min(self.bound(self.sizes[symbol]), UNBOUNDED)
        known = None if self.shape_env is None else self.shape_env.var_to_range.get(symbol)
        low = int(known.lower) if known and known.lower.is_Integer else -math.inf
        high = int(known.upper) if known and known.upper.is_Integer else math.inf
        return low, high if low < 0 else min(high, UNBOUNDED)

    def _facts(self, exprs: Iterable[Expr]) -> list[Expr]:
        """Expressions known to be at most 0, about the symbols of `exprs` and of those facts."""
        facts: list[Expr] = []
        known: set[Expr] = set()
        waiting = {s for e in exprs for s in e.free_symbols}
        while waiting:
            symbol = waiting.pop()
            known.add(symbol)
            low, high = self._range(symbol)
            if symbol in self.sizes:
                about = [-symbol, expand(symbol + 1 - self.sizes[symbol])]
            else:
                about = [*([low - symbol] if low > -math.inf else []), *([symbol - high] if high < UNBOUNDED else [])]
            facts += about
            waiting |= {s for e in about for s in e.free_symbols} - known
        return facts

    def holds(self, formula: Formula) -> bool:
        """Whether the formula is true of all integers in range. False where that is not known."""
        return self.impossible(negated(formula))

    def impossible(self, formula: Formula) -> bool:
        """Whether the formula is true of no integers in range. False where that is not known."""
        branches = itertools.count()

        def satisfiable(waiting: tuple[Formula, ...], chosen: tuple[Expr, ...]) -> bool:
            while waiting:
                first, *rest = waiting
                waiting = tuple(rest)
                if first is False:
                    return False
                if isinstance(first, AtMostZero):
                    chosen = (*chosen, first.expr)
                elif isinstance(first, Junction) and first.conjunction:
                    waiting = (*first.parts, *waiting)
                elif isinstance(first, Junction):
                    return any(satisfiable((part, *waiting), chosen) for part in first.parts)
            return next(branches) > MAX_BRANCHES or not _contradictory((*chosen, *self._facts(chosen)))

        return not satisfiable((formula,), ())


def _row(expr: Expr) -> Row:
    coefficients = sympy.sympify(expr).as_coefficients_dict()
    if not all(c.is_Integer for c in coefficients.values()):
        raise Unproven(f"the size {expr} is not a sum of whole multiples")
    return {monomial: int(c) for monomial, c in coefficients.items()}


def _contradictory(exprs: Iterable[Expr]) -> bool:
    """Whether no integers make all of `exprs` at most 0, by Fourier-Motzkin elimination. False where it is not known.

    A product of symbols counts as one more unknown integer, which can only make it harder to find a contradiction.
    """
    rows = [_row(e) for e in exprs]
    while True:
        rows = list({frozenset(r.items()): r for r in map(_tightened, rows)}.values())
        if any(r.keys() <= {sympy.S.One} and r.get(sympy.S.One, 0) > 0 for r in rows):
            return True
        split = {
            unknown: ([r for r in rows if r.get(unknown, 0) > 0], [r for r in rows if r.get(unknown, 0) < 0])
            for unknown in {m: None for r in rows for m in r if m != 1}
        }
        if not split:
            return False
        unknown, (above, below) = min(split.items(), key=lambda item: len(item[1][0]) * len(item[1][1]))
        rows = [r for r in rows if unknown not in r]
        if len(rows) + len(above) * len(below) > MAX_INEQUALITIES:
            return False
        rows += [_eliminated(unknown, a, b) for a in above for b in below]


def _eliminated(unknown: Any, above: Row, below: Row) -> Row:
    """The sum of multiples of two rows in which `unknown` cancels."""
    p, n = above[unknown], -below[unknown]
    total = {m: n * above.get(m, 0) + p * below.get(m, 0) for m in above.keys() | below.keys()}
    return {m: c for m, c in total.items() if c}


def _tightened(row: Row) -> Row:
    """The same for integers: the coefficients divided by their greatest divisor, the constant rounded up."""
    divisor = math.gcd(*(c for m, c in row.items() if m != 1))
    if divisor <= 1:
        return row
    return {m: -(-c // divisor) if m == 1 else c // divisor for m, c in row.items()}
