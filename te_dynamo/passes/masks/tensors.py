"""Tensors as functions of their indices: what each torch function that builds masks means.

The value of a bool tensor at an index is a formula: when it is true. That of another tensor is a number, or one for each of
a few cases. Views change the index, arithmetic the number, comparisons make formulas of numbers.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch

from te_dynamo.passes.masks.formulas import (
    FALSE,
    TRUE,
    Expr,
    Formula,
    Integers,
    Unproven,
    at_most,
    both,
    differ,
    either,
    equal,
    expand,
    negated,
)

MAX_CASES = 64

Number: TypeAlias = Any  # an integer expression, exact in its tensor's dtype, or a float that is no integer
Cases: TypeAlias = tuple[tuple[Formula, Number], ...]  # exactly one condition is true
Value: TypeAlias = Any  # of a bool tensor: a formula; of any other: a number or cases
Index: TypeAlias = tuple[Expr, ...]


@dataclass(eq=False)
class Tensor:
    """A tensor that is read value by value."""

    shape: tuple[Expr, ...]
    dtype: torch.dtype
    integers: Integers
    meaning: Callable[[Place], Value]
    _values: dict[Index, Value] = field(default_factory=dict)

    def at(self, index: Index) -> Value:
        """The value at an index: a formula or cases. Raises Unproven where it is not known."""
        if index not in self._values:
            place = Place(self.shape, self.dtype, self.integers, index)
            self._values[index] = place.cast(self.meaning(place), self.dtype)
        return self._values[index]


@dataclass(frozen=True)
class Place:
    """Where a handler is asked for a value: an index into the result of a call, whose shape and dtype are known."""

    shape: tuple[Expr, ...]
    dtype: torch.dtype
    integers: Integers
    index: Index

    def read(self, x: Any) -> Value:
        """The value here of an argument: a tensor or a scalar, broadcast to this shape."""
        if not isinstance(x, Tensor):
            return scalar(x)
        offset = len(self.shape) - len(x.shape)
        for size, wanted in zip(x.shape, self.shape[offset:], strict=True):
            if size not in (1, wanted):
                raise Unproven(f"a size of {size} is broadcast to {wanted}")
        return x.at(tuple(0 if s == 1 else i for s, i in zip(x.shape, self.index[offset:], strict=True)))

    def truth(self, x: Any) -> Formula:
        return self.cast(self.read(x), torch.bool)

    def moved(self, dim: int, by: Expr) -> Place:
        return replace(self, index=(*self.index[:dim], expand(self.index[dim] + by), *self.index[dim + 1 :]))

    def fits(self, number: Number, dtype: torch.dtype) -> bool:
        """Whether a number is exact in `dtype` whatever its indices and sizes."""
        if isinstance(number, float) or dtype.is_complex or dtype == torch.bool:
            return False
        limit = int(2 / torch.finfo(dtype).eps) if dtype.is_floating_point else torch.iinfo(dtype).max
        lowest = -limit if dtype.is_floating_point else torch.iinfo(dtype).min
        if number in self.integers.data:  # as it is, not computed with
            low, high = self.integers.data[number].range
            return lowest <= low and high <= limit
        return lowest <= number <= limit if isinstance(number, int) else self.integers.bound(number) <= min(-lowest, limit)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """A value in another dtype."""
        if dtype == torch.bool:
            return value if isinstance(value, frozenset) else either(*(both(c, _nonzero(n)) for c, n in as_cases(value)))

        def converted(number: Number) -> Number:
            if number in (0, 1):
                return number
            if is_constant(number) and dtype.is_floating_point:
                return scalar(torch.tensor(float(number), dtype=torch.float64, device="cpu").to(dtype).item())
            if not self.fits(number, dtype):
                raise Unproven(f"the mask's values, such as {number}, may not be exact in {dtype}")
            return number

        return _merged((c, converted(n)) for c, n in as_cases(value))


def is_constant(number: Number) -> bool:
    return isinstance(number, (int, float))


def scalar(value: Any) -> Number:
    """A scalar argument as a number."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) <= 2**53 else value
    if isinstance(value, (int, sympy.Expr)):
        return int(value) if isinstance(value, bool) else value
    raise Unproven(f"the mask is built with {value!r}")


def as_cases(value: Value) -> Cases:
    if isinstance(value, frozenset):
        return _merged([(value, 1), (negated(value), 0)])
    return value if isinstance(value, tuple) else ((TRUE, value),)


def _merged(cases: Iterable[tuple[Formula, Number]]) -> Cases:
    """The cases, one for each number."""
    conditions: dict[Number, list[Formula]] = {}
    for condition, number in cases:
        if condition:
            conditions.setdefault(math.nan if number != number else number, []).append(condition)
    if len(conditions) > MAX_CASES:
        raise Unproven("the mask has too many different cases")
    return tuple((either(*c), n) for n, c in conditions.items())


def _select(choices: Iterable[tuple[Formula, Value]]) -> Value:
    """The value whose condition is true; exactly one condition is."""
    choices = [(c, v) for c, v in choices if c]
    if len(choices) == 1:
        return choices[0][1]
    if all(isinstance(v, frozenset) for _, v in choices):
        return either(*(both(c, v) for c, v in choices))
    return _merged((both(c, inner), n) for c, v in choices for inner, n in as_cases(v))


def _nonzero(number: Number) -> Formula:
    return negated(equal(number, 0)) if isinstance(number, sympy.Expr) else TRUE if number != 0 else FALSE


# --- What torch's functions mean -------------------------------------------------------------------------------------

HANDLERS: dict[Any, Callable[..., Value]] = {}
IRRELEVANT = frozenset(["dtype", "device", "layout", "pin_memory", "requires_grad", "memory_format", "non_blocking", "copy", "names"])


def handles(*names: str) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Makes a function the meaning of the torch functions, operators and methods with these names.

    It is called with the place where a value is asked for, and the call's arguments: tensors as `Tensor`, symbolic integers as
    expressions, without those that only say where the result is and in which dtype (the place does).
    """

    def register(handler: Callable[..., Value]) -> Callable[..., Value]:
        for name in names:
            HANDLERS[name] = handler
            for owner in (torch, operator, torch.Tensor, torch.nn.functional):
                if callable(getattr(owner, name, None)):
                    HANDLERS[getattr(owner, name)] = handler
        return handler

    return register


def elementwise(*names: str) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """The same, in place too: `add_` and `operator.iadd` give what `add` does."""
    return handles(*names, *(f"{name}_" for name in names), *(f"i{name}" for name in names))


def meaning(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Callable[[Place], Value]:
    """What a call of `target` gives. Raises Unproven where it is called in a way that its handler does not know."""
    kwargs = {name: value for name, value in kwargs.items() if name not in IRRELEVANT}
    if not args and "input" in kwargs:
        args = (kwargs.pop("input"),)
    handler = HANDLERS[target]
    try:
        inspect.signature(handler).bind(None, *args, **kwargs)
    except TypeError as error:
        raise Unproven(f"a call of {getattr(target, '__name__', target)} is not understood: {error}") from error
    return lambda place: handler(place, *args, **kwargs)


handles("ones", "ones_like", "new_ones")(lambda p, *args, **kwargs: 1)
handles("zeros", "zeros_like", "new_zeros", "zero_")(lambda p, *args, **kwargs: 0)
handles("expand", "expand_as", "broadcast_to")(lambda p, x, *args, **kwargs: p.read(x))
handles("to", "type", "type_as", "float", "half", "bfloat16", "double", "int", "long", "bool")(lambda p, x, *args: p.read(x))
handles("cpu", "cuda", "contiguous", "clone", "detach", "alias", "pos")(lambda p, x, *args: p.read(x))


@handles("full", "full_like", "new_full", "fill_", "scalar_tensor", "tensor")
def _full(p: Place, *args: Any, **kwargs: Any) -> Value:
    return p.read(kwargs.get("fill_value", kwargs.get("value", args[-1] if args else None)))


@handles("arange")
def _arange(p: Place, *args: Any, start: Any = 0, end: Any = None, step: Any = 1) -> Value:
    start, end, step = (0, args[0], 1) if len(args) == 1 else (*args, *(start, end, step)[len(args) :])
    first, step = scalar(start), scalar(step)
    if isinstance(first, float) or isinstance(step, float):
        raise Unproven("the mask's positions are not integers")
    return expand(first + step * p.index[0])


@handles("view", "reshape", "view_as", "reshape_as", "unsqueeze", "squeeze", "flatten", "unflatten")
def _reshape(p: Place, x: Tensor, *args: Any, **kwargs: Any) -> Value:
    if x.dtype != p.dtype:
        raise Unproven(f"the bits of {x.dtype} are read as {p.dtype}")
    kept = [(size, i) for size, i in zip(p.shape, p.index, strict=True) if size != 1]
    if [size for size, _ in kept] != [size for size in x.shape if size != 1]:
        raise Unproven(f"a mask of shape {list(x.shape)} is reshaped to {list(p.shape)}")
    indices = iter(kept)
    return x.at(tuple(0 if size == 1 else next(indices)[1] for size in x.shape))


@handles("permute")
def _permute(p: Place, x: Tensor, *dims: Any) -> Value:
    order = [d % len(x.shape) for d in (dims[0] if isinstance(dims[0], (list, tuple)) else dims)]
    return x.at(tuple(p.index[order.index(d)] for d in range(len(order))))


@handles("transpose", "swapaxes", "swapdims", "adjoint")
def _transpose(p: Place, x: Tensor, dim0: int = -2, dim1: int = -1) -> Value:
    index = list(p.index)
    index[dim0], index[dim1] = index[dim1], index[dim0]
    return x.at(tuple(index))


@handles("getitem")
def _getitem(p: Place, x: Tensor, items: Any) -> Value:
    items = list(items) if isinstance(items, tuple) else [items]
    if any(isinstance(item, (bool, list)) or (isinstance(item, Tensor) and item.dtype == torch.bool) for item in items):
        raise Unproven("the mask is indexed by booleans or lists")
    ellipsis = next((n for n, item in enumerate(items) if item is Ellipsis), len(items))
    taken = sum(item is not None and item is not Ellipsis for item in items)
    items[ellipsis : ellipsis + 1] = [slice(None)] * (len(x.shape) - taken)

    # Index tensors are broadcast together; the dimensions that they make take their place if they are adjacent, and otherwise come first.
    rank = max((len(item.shape) for item in items if isinstance(item, Tensor)), default=0)
    kept = [isinstance(item, Tensor) for item in items if not isinstance(item, (int, sympy.Expr))]
    together = [key for key, _ in itertools.groupby(kept)].count(True) == 1
    first = kept.index(True) if together else 0
    gathered = Place(p.shape[first : first + rank], torch.int64, p.integers, p.index[first : first + rank])
    rest = iter(p.index[:first] + p.index[first + rank :])
    positions: list[Cases] = []  # where each dimension of x is read
    for item in items:
        if item is None:
            next(rest)
            continue
        size = x.shape[len(positions)]
        if isinstance(item, slice):
            start, step = _from_start(p.integers, scalar(item.start or 0), size), item.step or 1
            if not isinstance(step, int):
                raise Unproven("the mask is sliced with a symbolic step")
            positions.append(((TRUE, expand(start + step * next(rest))),))
        else:
            positions.append(tuple((c, _from_start(p.integers, n, size, c)) for c, n in as_cases(gathered.read(item))))
    cases = [(both(*(c for c, _ in case)), tuple(n for _, n in case)) for case in itertools.product(*positions)]
    return _select((condition, x.at(position)) for condition, position in cases if condition)


def _from_start(integers: Integers, number: Number, size: Expr, condition: Formula = TRUE) -> Expr:
    """A position as torch takes it: a negative one counts from the end."""
    if isinstance(number, float):
        raise Unproven("the mask is indexed by a float")
    if integers.impossible(both(condition, at_most(number, -1))):
        return number
    if integers.impossible(both(condition, at_most(0, number))):
        return expand(number + size)
    raise Unproven(f"the mask is indexed by {number}, which may be negative or not")


@handles("cat")
def _cat(p: Place, tensors: Sequence[Tensor], dim: int = 0) -> Value:
    if any(len(t.shape) != len(p.index) for t in tensors):
        raise Unproven("the mask concatenates tensors of different ranks")
    dim, (first, *others) = dim % len(p.index), tensors
    here = first.at(p.index)
    if not others:
        return here
    inside = at_most(p.index[dim] + 1, first.shape[dim])
    return _select([(inside, here), (negated(inside), _cat(p.moved(dim, -first.shape[dim]), others, dim))])


@handles("diff")
def _diff(p: Place, x: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None) -> Value:
    if n != 1 or x.dtype == torch.bool:
        raise Unproven("a difference of higher order, or of booleans")
    dim = dim % len(x.shape)
    parts = [t for t in (prepend, x, append) if t is not None]
    before = Tensor(p.shape, p.dtype, p.integers, lambda place: _cat(place, parts, dim))
    after = Tensor(p.shape, p.dtype, p.integers, lambda place: _cat(place.moved(dim, 1), parts, dim))
    return HANDLERS["sub"](p, after, before)


@handles("cumsum")
def _cumsum(p: Place, x: Tensor, dim: int) -> Value:
    dim = dim % len(x.shape)
    anywhere = p.integers.index(x.shape[dim])
    summed = as_cases(x.at((*p.index[:dim], anywhere, *p.index[dim + 1 :])))
    possible = {n for condition, n in summed if not p.integers.impossible(condition)}
    if len(possible) != 1 or not isinstance(term := possible.pop(), int):
        raise Unproven("the mask is a running sum of different numbers")
    return expand(term * (p.index[dim] + 1))


def _triangle(kept: Callable[[Expr, Expr], Formula]) -> Callable[..., Value]:
    def handler(p: Place, x: Tensor, diagonal: Any = 0) -> Value:
        inside = kept(p.index[-1] - p.index[-2], scalar(diagonal))
        return _select([(inside, p.read(x)), (negated(inside), FALSE if p.dtype == torch.bool else 0)])

    return handler


elementwise("tril")(_triangle(at_most))
elementwise("triu")(_triangle(lambda offset, diagonal: at_most(diagonal, offset)))


@handles("where")
def _where(p: Place, condition: Tensor, input: Any, other: Any) -> Value:
    chosen = p.truth(condition)
    return _select((c, p.cast(p.read(x), p.dtype)) for c, x in ((chosen, input), (negated(chosen), other)))


elementwise("masked_fill")(lambda p, x, mask, value: _where(p, mask, value, x))


def _as_torch(number: Number, x: Any) -> Any:
    """A constant as torch gets it in place of the argument `x`."""
    if isinstance(x, Tensor):
        return torch.full((1,) if x.shape else (), number, dtype=x.dtype, device="cpu")
    return float(number) if isinstance(x, float) else number


@cache
def _zero(dtype: torch.dtype, ranked: bool) -> torch.Tensor:
    return torch.zeros((1,) if ranked else (), dtype=dtype, device="cpu")


def _binary(fn: Callable[..., Any], exact: Callable[[Expr, Expr], Expr | Formula] | None) -> Callable[..., Value]:
    """The meaning of `fn`, elementwise: torch itself on constants, `exact` on integer expressions."""

    def handler(p: Place, x: Any, y: Any) -> Value:
        pairs = list(itertools.product(as_cases(p.read(x)), as_cases(p.read(y))))
        dtype = torch.result_type(*(_zero(v.dtype, bool(v.shape)) if isinstance(v, Tensor) else _as_torch(0, v) for v in (x, y)))

        def combined(a: Number, b: Number) -> Value:
            if p.dtype == torch.bool and any(isinstance(n, float) and math.isinf(n) for n in (a, b)):
                a, b = (n if is_constant(n) else 0 for n in (a, b))  # any finite number stands for a position
            if is_constant(a) and is_constant(b):
                try:
                    result = fn(_as_torch(a, x), _as_torch(b, y)).item()
                    return scalar(result) if not isinstance(result, bool) else TRUE if result else FALSE
                except (RuntimeError, OverflowError, TypeError) as error:
                    raise Unproven(f"a constant of the mask cannot be computed: {error}") from error
            if exact is None or isinstance(a, float) or isinstance(b, float):
                raise Unproven(f"the mask does {fn.__name__} on positions")
            result = exact(a, b)
            if not all(p.fits(n, dtype) for n in (a, b, *([] if isinstance(result, frozenset) else [result]))):
                raise Unproven(f"the mask's positions may not be exact in {dtype}")
            return result

        return _select((both(c, d), combined(a, b)) for (c, a), (d, b) in pairs)

    return handler


elementwise("add")(_binary(operator.add, lambda a, b: expand(a + b)))
elementwise("sub", "subtract")(_binary(operator.sub, lambda a, b: expand(a - b)))
elementwise("mul", "multiply")(_binary(operator.mul, lambda a, b: expand(a * b)))
elementwise("div", "truediv", "true_divide", "divide")(_binary(operator.truediv, None))
handles("rsub")(lambda p, x, y: HANDLERS["sub"](p, y, x))
elementwise("neg", "negative")(lambda p, x: HANDLERS["mul"](p, x, -1))
handles("le", "less_equal")(_binary(operator.le, at_most))
handles("lt", "less")(_binary(operator.lt, lambda a, b: at_most(a + 1, b)))
handles("ge", "greater_equal")(_binary(operator.ge, lambda a, b: at_most(b, a)))
handles("gt", "greater")(_binary(operator.gt, lambda a, b: at_most(b + 1, a)))
handles("eq")(_binary(operator.eq, equal))
handles("ne", "not_equal")(_binary(operator.ne, lambda a, b: negated(equal(a, b))))


def _logical(combine: Callable[..., Formula], bits: bool = False) -> Callable[..., Value]:
    def handler(p: Place, *operands: Any) -> Value:
        if bits and p.dtype != torch.bool:
            raise Unproven("the mask does bit arithmetic on integers")
        return combine(*map(p.truth, operands))

    return handler


elementwise("logical_and")(_logical(both))
elementwise("logical_or")(_logical(either))
elementwise("logical_xor")(_logical(differ))
elementwise("logical_not")(_logical(negated))
elementwise("bitwise_and", "and")(_logical(both, bits=True))
elementwise("bitwise_or", "or")(_logical(either, bits=True))
elementwise("bitwise_xor", "xor")(_logical(differ, bits=True))
elementwise("bitwise_not", "invert")(_logical(negated, bits=True))
