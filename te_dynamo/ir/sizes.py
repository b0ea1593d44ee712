"""Compares and multiplies sizes that may be symbolic, without a guard."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from te_dynamo.ir.graph import hint


def number(size: Any) -> int:
    """A size as a number: 1 if it depends on data."""
    return int(hint(size) or 1)


def product(sizes: Iterable[Any]) -> int:
    """The product of sizes, as numbers."""
    return math.prod(map(number, sizes))


def same(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether sizes are equal, as far as their hints tell."""
    a, b = [hint(s) for s in a], [hint(s) for s in b]
    return len(a) == len(b) and all(x == y or x is None or y is None for x, y in zip(a, b, strict=True))
