"""Formulas over integers, and their decision by linear arithmetic, for all sizes at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch

UNBOUNDED = 2**40  # no size is larger: this rules out overflow where a size is symbolic
MAX_INEQUALITIES = 400
MAX_ALTERNATIVES = 300

Expr: TypeAlias = Any  # an int, or an expanded sympy polynomial over integer symbols
Row: TypeAlias = dict[Any, int]  # monomial -> coefficient, the constant under 1: their sum is at most 0
Inequality: TypeAlias = frozenset[tuple[Any, int]]  # the items of a Row
Formula: TypeAlias = frozenset[frozenset[Inequality]]  # in one of its alternatives, all inequalities hold

ONE = sympy.S.One
TRUE: Formula = frozenset([frozenset()])
FALSE: Formula = frozenset()


class Unproven(Exception):
    """The proof stops here, for the reason given."""


def expand(expr: Any) -> Expr:
    if isinstance(expr, int):
        return expr
    expr = sympy.expand(expr)
    return int(expr) if expr.is_Integer else expr


def at_most(a: Expr, b: Expr) -> Formula:
    expr = expand(a - b)
    if isinstance(expr, int):
        return TRUE if expr <= 0 else FALSE
    return frozenset([frozenset([frozenset(_row(expr).items())])])


def equal(a: Expr, b: Expr) -> Formula:
    return both(at_most(a, b), at_most(b, a))


def both(*formulas: Formula) -> Formula:
    result = TRUE
    for formula in formulas:
        if TRUE in (result, formula):
            result = formula if result == TRUE else result
            continue
        result = either(frozenset(a | b for a in result for b in formula if not any(_negated(i) in a for i in b)))
    return result


def either(*formulas: Formula) -> Formula:
    alternatives: Formula = frozenset().union(*formulas)
    if len(alternatives) < 2:
        return alternatives
    if len(alternatives) > MAX_ALTERNATIVES:
        raise Unproven("the mask is too complicated")
    return frozenset(a for a in alternatives if not any(b < a for b in alternatives))


def negated(formula: Formula) -> Formula:
    return both(*(frozenset(frozenset([_negated(i)]) for i in alternative) for alternative in formula))


def symbols_of(formula: Formula) -> set[Expr]:
    return {s for alternative in formula for inequality in alternative for monomial, _ in inequality for s in monomial.free_symbols}


def differ(a: Formula, b: Formula) -> Formula:
    return either(both(a, negated(b)), both(negated(a), b))


def _negated(inequality: Inequality) -> Inequality:
    row = {ONE: 0} | dict(inequality)
    return frozenset((m, c) for m, c in ((m, (m == 1) - c) for m, c in row.items()) if c)  # 1 - expr <= 0


@dataclass(frozen=True)
class Datum:
    """An element of a tensor of the graph. source: its node; shape: of the tensor; index: of the element; why: the reason that nothing more
    is known of it."""

    source: Any
    shape: tuple[Expr, ...]
    index: tuple[Expr, ...]
    dtype: torch.dtype
    why: str

    @property
    def range(self) -> tuple[int, int]:
        return (0, 1) if self.dtype == torch.bool else (torch.iinfo(self.dtype).min, torch.iinfo(self.dtype).max)


class Integers:
    """What is known of the integers in the formulas: the ranges of indices, of symbolic sizes and of data."""

    def __init__(self) -> None:
        self.shape_env: Any = None
        self.sizes: dict[Expr, Expr] = {}  # of the dimension that an index runs over
        self.data: dict[Expr, Datum] = {}
        self._symbols: dict[Any, Expr] = {}

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

    def datum(self, datum: Datum) -> Expr:
        """An element that may be any number of its dtype; the same symbol whenever it is read."""
        key = (datum.source, datum.index)
        if key not in self._symbols:
            self._symbols[key] = symbol = sympy.Symbol(f"datum{len(self.data)}", integer=True)
            self.data[symbol] = datum
        return self._symbols[key]

    def bound(self, expr: Expr) -> float:
        """An upper bound of the absolute value; infinity where nothing is known."""
        return sum(
            abs(coefficient) * math.prod(max(map(abs, self._range(factor))) for factor in sympy.Mul.make_args(monomial) if monomial != 1)
            for monomial, coefficient in _row(expr).items()
        )

    def _range(self, symbol: Expr) -> tuple[float, float]:
        if symbol in self.sizes:
            return 0, min(self.bound(self.sizes[symbol]), UNBOUNDED)
        if symbol in self.data:
            return self.data[symbol].range
        known = None if self.shape_env is None else self.shape_env.var_to_range.get(symbol)
        low = int(known.lower) if known and known.lower.is_Integer else -math.inf
        high = int(known.upper) if known and known.upper.is_Integer else math.inf
        return low, high if low < 0 else min(high, UNBOUNDED)

    def holds(self, formula: Formula) -> bool:
        """Whether the formula is true of all integers in range. False where that is not known."""
        return formula == TRUE or self.impossible(negated(formula))

    def impossible(self, formula: Formula) -> bool:
        """Whether the formula is true of no integers in range. False where that is not known."""
        return all(_contradictory(map(dict, self._with_facts(alternative))) for alternative in formula)

    def _with_facts(self, inequalities: frozenset[Inequality]) -> list[Inequality]:
        """The inequalities, what is known of their symbols, and of the symbols that this brings in."""
        found, known = list(inequalities), set[Expr]()
        for inequality in found:  # which grows
            for symbol in {s for monomial, _ in inequality for s in monomial.free_symbols} - known:
                known.add(symbol)
                if symbol in self.sizes:
                    facts = [at_most(0, symbol), at_most(symbol + 1, self.sizes[symbol])]
                elif symbol in self.data:
                    least, most = self.data[symbol].range
                    facts = [at_most(least, symbol), at_most(symbol, most)]
                else:
                    low, high = self._range(symbol)
                    facts = [at_most(low, symbol) if low > -math.inf else FALSE, at_most(symbol, high) if high < UNBOUNDED else FALSE]
                found += [i for fact in facts for alternative in fact for i in alternative]
        return found


def _row(expr: Expr) -> Row:
    coefficients = {ONE: expr} if isinstance(expr, int) else expr.as_coefficients_dict()
    if not all(isinstance(c, int) or c.is_Integer for c in coefficients.values()):
        raise Unproven(f"the size {expr} is not a sum of whole multiples")
    return {monomial: int(c) for monomial, c in coefficients.items()}


def _contradictory(rows: Iterable[Row]) -> bool:
    """Whether no integers satisfy all rows, by Fourier-Motzkin elimination. False where it is not known.

    A product of symbols counts as one more unknown integer, which can only make it harder to find a contradiction.
    """
    while True:
        rows = list({frozenset(r.items()): r for r in map(_tightened, rows)}.values())
        if any(r.keys() <= {ONE} and r.get(ONE, 0) > 0 for r in rows):
            return True
        unknowns = {m: None for r in rows for m in r if m != 1}
        signs = {u: ([r for r in rows if r.get(u, 0) > 0], [r for r in rows if r.get(u, 0) < 0]) for u in unknowns}
        if not signs:
            return False
        unknown, (above, below) = min(signs.items(), key=lambda item: len(item[1][0]) * len(item[1][1]))
        rows = [r for r in rows if unknown not in r]
        if len(rows) + len(above) * len(below) > MAX_INEQUALITIES:
            return False
        rows += [_eliminated(unknown, a, b) for a, b in itertools.product(above, below)]


def _eliminated(unknown: Any, above: Row, below: Row) -> Row:
    """The sum of multiples of two rows in which `unknown` cancels."""
    p, n = above[unknown], -below[unknown]
    total = {m: n * above.get(m, 0) + p * below.get(m, 0) for m in above.keys() | below.keys()}
    return {m: c for m, c in total.items() if c}


def _tightened(row: Row) -> Row:
    """An equivalent row for integers: the coefficients divided by their greatest common divisor, the constant rounded up."""
    divisor = math.gcd(*(c for m, c in row.items() if m != 1))
    if divisor <= 1:
        return row
    return {m: -(-c // divisor) if m == 1 else c // divisor for m, c in row.items()}
