"""The statistics of norms written out by hand: what a norm divides by, and what it subtracts.

Read in every spelling that rounds differently (`canonicalize` has unified the others): powers as `x * x`, `pow`, `sqrt`,
`rsqrt` and `reciprocal`, means as `mean`, a sum divided by its length and `var_mean`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from te_dynamo.ir.graph import example, fake, is_call, is_method, operands, same_shape, same_size, tensor

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
VIEWS = (torch.reshape, torch.unsqueeze, torch.squeeze, torch.flatten)  # they keep the order of the elements
POWERS: dict[Any, float] = {torch.sqrt: 0.5, torch.rsqrt: -0.5, torch.reciprocal: -1}
EPS_NOT_CONSTANT = "its eps is not a constant"


@dataclass(frozen=True)
class Moment:
    """mean(of^2) + eps over `dims`, or with centered the variance of `of` plus eps. fault: why it is not quite that."""

    of: Node
    dims: tuple[int, ...]
    centered: bool
    eps: float = 0.0
    fault: str | None = None


# What to look through, and what is equal.


def is_float(node: Any) -> bool:
    value = tensor(node)
    return value is not None and value.dtype in DTYPES


def is_cast(node: Any) -> bool:
    return is_method(node, "to") and len(node.args) == 2 and node.args[1] in DTYPES and is_float(node.args[0])


def is_contiguous(node: Any) -> bool:
    return is_method(node, "contiguous") and len(node.args) == 1 and not node.kwargs


def source(node: Any) -> Any:
    """The value itself, before lossless casts to the dtype in which a norm is computed anyway."""
    while is_contiguous(node) or (is_cast(node) and node.args[1] == torch.float32 and fake(node.args[0]).dtype.itemsize < 4):
        node = node.args[0]
    return node


def inner(node: Any) -> Any:
    """An intermediate of the statistics, whose dtype and unit dimensions do not matter."""
    while is_cast(node) or is_contiguous(node) or is_call(node, *VIEWS):
        node = node.args[0]
    return node


def same_value(a: Any, b: Any) -> bool:
    """Whether two nodes are one value: one node, or the same view of one value taken twice."""
    a, b = source(a), source(b)
    if a is b or not (is_call(a, *VIEWS) and is_call(b, *VIEWS)):
        return a is b
    return a.target is b.target and same_shape(fake(a).shape, fake(b).shape) and same_value(a.args[0], b.args[0])


# The statistics.


def _power(node: Any) -> tuple[Any, float] | None:
    """(base, exponent) of a power in any of its spellings."""
    if is_call(node, torch.pow) and len(node.args) == 2 and isinstance(node.args[1], (int, float)):
        return node.args[0], node.args[1]
    if operands(node, torch.mul) and same_value(*node.args):
        return node.args[0], 2
    return (node.args[0], POWERS[node.target]) if is_call(node, *POWERS) else None


def _squared(node: Any) -> Any:
    """What `node` is the square of; None where it is no square."""
    power = _power(node)
    return power[0] if power is not None and power[1] == 2 else None


def _reduced(node: Any, reduction: Callable[..., Any]) -> tuple[Any, tuple[int, ...]] | None:
    """(x, dims) where `node` is that reduction of x over dims."""
    named = is_call(node, reduction) and len(node.args) > 1 and isinstance(node.args[1], tuple) and node.args[1]
    return (node.args[0], node.args[1]) if named else None


def _item(node: Any, index: int) -> Any:
    return node.args[0] if is_call(node, operator.getitem) and node.args[1] == index else None


def _mean(node: Any) -> tuple[Any, tuple[int, ...]] | None:
    """(x, dims) where `node` is a mean: `mean`, the mean that came with a variance, or a sum divided by its length."""
    node = inner(node)
    mean = _reduced(node, torch.mean) or _reduced(_item(node, 1), torch.var_mean)
    if mean is not None or not operands(node, torch.div):
        return mean
    total, length = _reduced(inner(node.args[0]), torch.sum), example(node.args[1])
    if total is None or not isinstance(length, (int, float, torch.SymInt)):
        return None
    return total if same_size(length, math.prod(fake(total[0]).shape[d] for d in total[1])) else None


def keeps_rows(reduced: Any, x: Any, dims: tuple[int, ...]) -> bool:
    """Whether the result of a reduction over `dims` broadcasts against `x`, with one number for each of its rows."""
    value = tensor(reduced)
    return value is not None and same_shape(value.shape, [1 if d in dims else size for d, size in enumerate(fake(x).shape)])


def centered_value(node: Any, dims: tuple[int, ...]) -> tuple[Any, bool]:
    """(x, True) where `node` is `x - mean(x)` over `dims`, (node, False) where it is not."""
    node = source(node)
    if operands(node, torch.sub):
        x, mean = source(node.args[0]), _mean(node.args[1])
        if mean is not None and mean[1] == dims and same_value(mean[0], x) and keeps_rows(node.args[1], x, dims):
            return x, True
    return node, False


def _variance(node: Any, function: Callable[..., Any]) -> Moment | None:
    """`var(x)`, or the variance behind `std(x)` or `var_mean(x)`."""
    found = _reduced(node, function)
    if found is None:
        return None
    x, dims = found
    fault = None if node.kwargs.get("correction") == 0 else "its variance is the unbiased one"
    return Moment(centered_value(x, dims)[0], dims, True, fault=fault)


def _moment(node: Any) -> Moment | None:
    """`mean(x^2)`, `mean((x - mean(x))^2)`, `var(x)` or `mean(x^2) - mean(x)^2`."""
    node = inner(node)
    variance = _variance(node, torch.var) or _variance(_item(node, 0), torch.var_mean)
    if variance is not None:
        return variance
    if operands(node, torch.sub):
        square, mean = _moment(node.args[0]), _mean(_squared(inner(node.args[1])))
        if square is None or square.centered or mean is None or mean[1] != square.dims or not same_value(mean[0], square.of):
            return None
        return replace(square, centered=True)
    mean = _mean(node)
    value = None if mean is None else _squared(source(mean[0]))
    if mean is None or not is_float(value):
        return None
    x, centered = centered_value(value, mean[1])
    return Moment(x, mean[1], centered)


def root_of(node: Any, exponent: float) -> Moment | None:
    """The moment, with or without eps, of which `node` is the power `exponent`: 0.5 or -0.5."""
    base, power = inner(node), 1.0
    while (step := _power(base)) is not None:
        base, power = inner(step[0]), power * step[1]
    if power == 2 * exponent:
        if operands(base, torch.add) and not is_call(inner(base.args[0]), torch.add):
            found = root_of(base.args[0], 0.5)
            return found and replace(found, fault=found.fault or "its eps is added outside of the square root")
        return _variance(base, torch.std)
    if power != exponent:
        return None
    for moment, eps in operands(base, torch.add):
        if (found := _moment(moment)) is not None:
            if isinstance(eps, (int, float)):
                return replace(found, eps=float(eps))
            if tensor(eps) is None or same_shape(fake(eps).shape, (1,) * fake(eps).dim()):
                return replace(found, fault=EPS_NOT_CONSTANT)
    return _moment(base)
