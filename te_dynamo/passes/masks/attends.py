"""Where a mask attends, as data: a formula over batch, head, row, column and the sizes, and over the elements of tensors that it reads.

It says what the mask says without an S x S tensor, and is part of a call's text, so that an implementation can compute it where it needs
it (`te_dynamo.lowering.native.attention`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch.fx import Node

from te_dynamo.passes.masks.formulas import ONE, Datum, Expr, Formula, Integers, symbols_of

MAX_INEQUALITIES = 24  # an implementation computes each for every score near the mask's edges

Sum: TypeAlias = tuple[tuple[str, int], ...]  # of integers times coefficients; "" is 1, "datum0" the first element that is read
# Which element of which tensor: for each dimension the index, and whether it may be out of range (where the formula does not depend on it).
Element: TypeAlias = tuple[int, tuple[tuple[Sum, bool], ...]]


@dataclass(frozen=True)
class Attends:
    """alternatives: it attends where, in one of them, all sums are at most 0; elements: what is read, from `tensors`."""

    alternatives: tuple[tuple[Sum, ...], ...]
    elements: tuple[Element, ...] = ()
    tensors: tuple[Node, ...] = ()

    @property
    def text(self) -> tuple[Any, ...]:
        """As an attribute of a call."""
        return (self.alternatives, self.elements)


def as_attends(formula: Formula, integers: Integers, names: Mapping[Expr, str]) -> Attends | None:
    """A formula as data, given the names of its indices and sizes; None if it is long, or has other integers in it."""
    if sum(map(len, formula)) > MAX_INEQUALITIES:
        return None
    symbols = sorted((s for s in symbols_of(formula) if s in integers.data), key=str)
    tensors = tuple(dict.fromkeys(integers.data[s].source for s in symbols))
    known = {**names, **{symbol: f"datum{i}" for i, symbol in enumerate(symbols)}}
    try:
        elements = tuple((tensors.index(integers.data[s].source), _position(integers.data[s], integers, names)) for s in symbols)
        alternatives = tuple(tuple(_sum(dict(inequality), known) for inequality in sorted(a, key=str)) for a in sorted(formula, key=str))
    except KeyError:
        return None
    return Attends(alternatives, elements, tensors)


def window(width: int) -> Attends:
    """Row i attends to the columns from i - width to i."""
    return Attends((((("column", 1), ("row", -1)), (("row", 1), ("column", -1), ("", -width))),))


def given(mask: Node, shape: tuple[Expr, ...]) -> Attends:
    """What a bool mask of this shape says, read from the mask itself."""
    names = ("batch", "head", "row", "column")[-len(shape) :]
    position = tuple((() if size == 1 else ((name, 1),), False) for name, size in zip(names, shape, strict=True))
    return Attends((((("", 1), ("datum0", -1)),),), ((0, position),), (mask,))


def _position(datum: Datum, integers: Integers, names: Mapping[Expr, str]) -> tuple[tuple[Sum, bool], ...]:
    return tuple(
        (_sum(_terms(index), names), integers.sizes.get(index) != size and index != 0)
        for index, size in zip(datum.index, datum.shape, strict=True)
    )


def _terms(expr: Expr) -> dict[Any, int]:
    return {ONE: expr} if isinstance(expr, int) else {m: int(c) for m, c in expr.as_coefficients_dict().items()}


def _sum(terms: Mapping[Any, int], names: Mapping[Expr, str]) -> Sum:
    """Raises KeyError for an integer without a name."""
    return tuple(sorted(("" if monomial == 1 else names[monomial], int(c)) for monomial, c in terms.items() if c))
