"""Parameter matrices of which the quick tests run a part."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def thinned(*parameters: Sequence[Any]) -> list[Any]:
    """All combinations; those that are not needed to use each value once are slow tests."""
    seen = {tuple(values[n % len(values)] for values in parameters) for n in range(max(map(len, parameters)))}
    return [pytest.param(*how, marks=() if how in seen else pytest.mark.slow) for how in itertools.product(*parameters)]
