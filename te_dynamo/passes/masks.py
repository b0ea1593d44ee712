"""What an attention mask is, proved from the graph that builds it.

Each tensor of the graph is read as a function from its indices to its value: `arange(n)` at `[k]` is `k`, a view asks its
base at other indices, `le` at `[i, j]` is an inequality between integers. The mask so becomes a formula over its row `i`,
its column `j` and the sizes, and "row i attends to column j iff j <= i" a statement of linear arithmetic, decided for all
sizes at once and without a guard on any of them. A proof is never a guess: what is not understood, reads data, is written
in place behind the graph's back, or may overflow or round, is "unknown" with the reason. Where every size is static and no
data is read, a mask that the symbols do not settle is computed and compared instead.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from te_dynamo import ops
from te_dynamo.ir import masked
from te_dynamo.ir.graph import erase_if_dead, example, is_call, tensor
from te_dynamo.ir.meta import MASK
from te_dynamo.passes.effects import storage, writes
from te_dynamo.sites import Sites, clean_path

log = logging.getLogger(__name__)

Expr: TypeAlias = Any  # sympy's, of integers
Kind = Literal["causal", "all", "window", "unknown"]

UNBOUNDED = 2**40  # no size is larger: what rules out overflow where a size is symbolic
MAX_BYTES = 2**28  # of each tensor of a mask that is computed to be compared
MAX_CASES = 64
MAX_INEQUALITIES = 400
MAX_BRANCHES = 500
MAX_FORMULA = 1000


@dataclass(frozen=True)
class Proof:
    """What a mask was proved to be.

    kind: "causal" (row i attends to column j iff j <= i), "all" (every row attends to every column), "window" (iff
    i - window <= j <= i), or "unknown", with the reason for it.
    """

    kind: Kind
    reason: str = ""
    window: int | None = None


class Unproven(Exception):
    """The proof stops here, for the reason given."""


def prove(mask: Node, attention: Node | None = None) -> Proof:
    """What `mask` is (bool: True attends; float: added to the scores) where `attention` reads it, or at the graph's end.

    The mask is broadcast to the attention's rows and columns; without an attention, it is taken as it is.
    """
    return _Interpreter(mask.graph).prove(mask, attention)


def simplify_masks(gm: GraphModule, sites: Sites) -> None:
    """Drops, in place, the masks of `ops.attention` nodes that are proved to be causal (`causal=True` says it) or to
    attend everywhere, and what built them where nothing else needs it.

    Each attention that had a mask gets its `Proof` as `meta["mask"]`. The graph's result stays what it was.
    """
    interpreter = _Interpreter(gm.graph)
    dropped: list[Node] = []
    for node in list(gm.graph.nodes):
        mask = node.args[3] if is_call(node, ops.attention) and len(node.args) > 3 else None
        if not isinstance(mask, Node):
            continue
        try:
            proof = interpreter.prove(mask, node)
        except Exception as error:
            if sites.strict:
                raise
            log.warning("te_dynamo: the mask %s was left as it is: %s", mask.name, error)
            proof = Proof("unknown", f"the proof failed: {type(error).__name__}: {error}")
        node.meta[MASK] = proof
        if proof.kind in ("causal", "all"):
            node.args = (*node.args[:3], None, *node.args[4:])
            node.kwargs = {**node.kwargs, "causal": proof.kind == "causal" or node.kwargs.get("causal", False)}
            dropped.append(mask)
    if dropped:
        erase_if_dead(gm.graph, [n for n in _upstream(dropped) if interpreter.is_pure(n)])


# --- Formulas over integers, and their decision ---------------------------------------------------------------------


@dataclass(frozen=True)
class _NotPositive:
    """expr <= 0; expr is an expanded polynomial with integer coefficients over integer symbols."""

    expr: Expr


@dataclass(frozen=True)
class _And:
    parts: tuple[Formula, ...]
    size: int


@dataclass(frozen=True)
class _Or:
    parts: tuple[Formula, ...]
    size: int


Formula: TypeAlias = bool | _NotPositive | _And | _Or


def _at_most(a: Any, b: Any) -> Formula:
    expr = sympy.expand(a - b)
    return bool(expr <= 0) if expr.is_Integer else _NotPositive(expr)


def _equal(a: Any, b: Any) -> Formula:
    return _and(_at_most(a, b), _at_most(b, a))


def _and(*parts: Formula) -> Formula:
    kept = tuple(dict.fromkeys(p for p in parts if p is not True))
    if False in kept:
        return False
    return _And(kept, _size(kept)) if len(kept) > 1 else kept[0] if kept else True


def _or(*parts: Formula) -> Formula:
    kept = tuple(dict.fromkeys(p for p in parts if p is not False))
    if True in kept:
        return True
    return _Or(kept, _size(kept)) if len(kept) > 1 else kept[0] if kept else False


def _size(parts: Iterable[Formula]) -> int:
    size = sum(p.size if isinstance(p, (_And, _Or)) else 1 for p in parts)
    if size > MAX_FORMULA:
        raise Unproven("the mask is too complicated")
    return size


def _xor(a: Formula, b: Formula) -> Formula:
    return _or(_and(a, _not(b)), _and(_not(a), b))


def _not(formula: Formula) -> Formula:
    if isinstance(formula, bool):
        return not formula
    if isinstance(formula, _NotPositive):
        return _NotPositive(sympy.expand(1 - formula.expr))
    return (_or if isinstance(formula, _And) else _and)(*map(_not, formula.parts))


def _inequalities(formula: Formula) -> Iterator[Expr]:
    if isinstance(formula, _NotPositive):
        yield formula.expr
    elif not isinstance(formula, bool):
        for part in formula.parts:
            yield from _inequalities(part)


Row = dict[Any, int]  # monomial -> coefficient, the constant under 1: their sum is at most 0


def _row(expr: Expr) -> Row:
    coefficients = expr.as_coefficients_dict()
    if not all(c.is_Integer for c in coefficients.values()):
        raise Unproven(f"the size {expr} is not a sum of whole multiples")
    return {monomial: int(c) for monomial, c in coefficients.items()}


def _contradictory(exprs: Iterable[Expr]) -> bool:
    """Whether no integers make all of `exprs` at most 0, by Fourier-Motzkin elimination. False where it is not known.

    A product of symbols counts as one more unknown integer, which can only make it harder to find a contradiction.
    """
    rows: list[Row] = [_row(e) for e in exprs]
    while True:
        rows = list({frozenset(r.items()): r for r in map(_tightened, rows)}.values())
        if any(r.keys() <= {sympy.S.One} and r.get(sympy.S.One, 0) > 0 for r in rows):
            return True
        unknowns = {m for r in rows for m in r} - {sympy.S.One}
        if not unknowns:
            return False

        def pairs(unknown: Any, rows: list[Row] = rows) -> int:
            return sum(r.get(unknown, 0) > 0 for r in rows) * sum(r.get(unknown, 0) < 0 for r in rows)

        unknown = min(unknowns, key=pairs)
        above = [r for r in rows if r.get(unknown, 0) > 0]
        below = [r for r in rows if r.get(unknown, 0) < 0]
        rows = [r for r in rows if unknown not in r]
        if len(rows) + len(above) * len(below) > MAX_INEQUALITIES:
            return False
        rows += [_eliminated(unknown, a, b) for a in above for b in below]


def _eliminated(unknown: Any, above: Row, below: Row) -> Row:
    p, n = above[unknown], -below[unknown]
    total = {m: n * above.get(m, 0) + p * below.get(m, 0) for m in above.keys() | below.keys()}
    return {m: c for m, c in total.items() if c}


def _tightened(row: Row) -> Row:
    """The same for integers: the coefficients divided by their greatest divisor, the constant rounded up."""
    divisor = math.gcd(*(c for m, c in row.items() if m != 1))
    if divisor <= 1:
        return row
    return {m: -(-c // divisor) if m == 1 else c // divisor for m, c in row.items()}


def _finite(end: Any) -> int | None:
    return int(end) if getattr(end, "is_Integer", False) else None


class _Integers:
    """What is known of the integers in the formulas: the ranges of indices and of symbolic sizes."""

    def __init__(self) -> None:
        self.shape_env: Any = None
        self.sizes: dict[Expr, Expr] = {}  # of the dimension that an index runs over
        self._names = itertools.count()

    def of(self, value: Any) -> Expr:
        """A Python integer or SymInt as an expression; no guard is set."""
        if isinstance(value, torch.SymInt):
            self.shape_env = value.node.shape_env
            return value.node.expr
        return sympy.Integer(int(value))

    def index(self, size: Expr) -> Expr:
        """An index that runs over a dimension of this size."""
        if size == 1:
            return sympy.S.Zero
        symbol = sympy.Symbol(f"index{next(self._names)}", integer=True)
        self.sizes[symbol] = size
        return symbol

    def _range(self, symbol: Expr) -> tuple[int | None, int | None]:
        known = None if self.shape_env is None else self.shape_env.var_to_range.get(symbol)
        low, high = (None, None) if known is None else (known.lower, known.upper)
        return _finite(low), _finite(high)

    def bound(self, expr: Expr) -> int | None:
        """An upper bound of the absolute value, or None where there is none."""
        total = 0
        for monomial, coefficient in _row(expr).items():
            factors = sympy.Mul.make_args(monomial) if monomial != 1 else ()
            bounds = [self._symbol_bound(f) if f.is_Symbol else None for f in factors]
            if None in bounds:
                return None
            total += abs(coefficient) * math.prod(b for b in bounds if b is not None)
        return total

    def _symbol_bound(self, symbol: Expr) -> int | None:
        if symbol in self.sizes:
            return min(self.bound(self.sizes[symbol]) or UNBOUNDED, UNBOUNDED)
        low, high = self._range(symbol)
        if low is None or low < 0:
            return None if low is None or high is None else max(-low, high)
        return UNBOUNDED if high is None else min(high, UNBOUNDED)

    def _facts(self, exprs: Iterable[Expr]) -> list[Expr]:
        """Expressions known to be at most 0, about the symbols of `exprs` and of those facts."""
        facts: list[Expr] = []
        known: set[Expr] = set()
        waiting = {s for e in exprs for s in e.free_symbols}
        while waiting:
            symbol = waiting.pop()
            known.add(symbol)
            if symbol in self.sizes:
                about = [-symbol, sympy.expand(symbol + 1 - self.sizes[symbol])]
            else:
                low, high = self._range(symbol)
                about = [*([] if low is None else [low - symbol]), *([] if high is None else [symbol - high])]
            facts += about
            waiting |= {s for e in about for s in e.free_symbols} - known
        return facts

    def holds(self, formula: Formula) -> bool:
        """Whether the formula is true of all integers in range. False where that is not known."""
        return self.impossible(_not(formula))

    def impossible(self, formula: Formula) -> bool:
        branches = itertools.count()

        def satisfiable(waiting: tuple[Formula, ...], chosen: tuple[Expr, ...]) -> bool:
            while waiting:
                first, *rest = waiting
                waiting = tuple(rest)
                if first is False:
                    return False
                if isinstance(first, _NotPositive):
                    chosen = (*chosen, first.expr)
                elif isinstance(first, _And):
                    waiting = (*first.parts, *waiting)
                elif isinstance(first, _Or):
                    return any(satisfiable((part, *waiting), chosen) for part in first.parts)
            return next(branches) > MAX_BRANCHES or not _contradictory((*chosen, *self._facts(chosen)))

        return not satisfiable((formula,), ())


# --- Tensors as functions of their indices --------------------------------------------------------------------------

# A number is an integer expression, exact in its tensor's dtype, or a float that no such integer is.
Number: TypeAlias = Any
Cases = tuple[tuple[Formula, Number], ...]  # a number for each condition; exactly one condition is true
Value = Formula | Cases  # of a bool tensor; of any other
Index = tuple[Expr, ...]
At = Callable[[Index], Value]


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[Expr, ...]
    dtype: torch.dtype
    at: At

    def cases(self, index: Index) -> Cases:
        return _cases(self.at(index))


@dataclass(frozen=True)
class _Out:
    """What a handler is told of the tensor it describes."""

    shape: tuple[Expr, ...]
    dtype: torch.dtype
    integers: _Integers


def _cases(value: Value) -> Cases:
    if isinstance(value, tuple):
        return value
    return _merged([(value, sympy.S.One), (_not(value), sympy.S.Zero)])


def _merged(cases: Iterable[tuple[Formula, Number]]) -> Cases:
    conditions: dict[Number, list[Formula]] = {}
    for condition, number in cases:
        if condition is not False:
            conditions.setdefault("nan" if number != number else number, []).append(condition)
    if len(conditions) > MAX_CASES:
        raise Unproven("the mask has too many different cases")
    return tuple((_or(*c), math.nan if n == "nan" else n) for n, c in conditions.items())


def _choose(condition: Formula, a: Value, b: Value) -> Value:
    if isinstance(condition, bool):
        return a if condition else b
    if not isinstance(a, tuple) and not isinstance(b, tuple):
        return _or(_and(condition, a), _and(_not(condition), b))
    otherwise = _not(condition)
    return _merged([*((_and(condition, c), n) for c, n in _cases(a)), *((_and(otherwise, c), n) for c, n in _cases(b))])


def _at_each(cases: Cases, value_at: Callable[[Formula, Number], Value]) -> Value:
    """The value at a position that is itself a value: an index read from a tensor."""
    if len(cases) == 1:
        return value_at(*cases[0])
    found = [(condition, value_at(condition, number)) for condition, number in cases]
    if all(not isinstance(v, tuple) for _, v in found):
        return _or(*(_and(c, v) for c, v in found))
    return _merged((_and(c, inner), n) for c, v in found for inner, n in _cases(v))


def _number(value: Any) -> Number:
    if isinstance(value, float) and not (value.is_integer() and abs(value) <= 2**53):
        return value
    return sympy.Integer(int(value))


def _is_constant(number: Number) -> bool:
    return isinstance(number, float) or bool(number.is_Integer)


def _python(number: Number) -> int | float:
    return number if isinstance(number, float) else int(number)


def _compute(fn: Callable[..., Any], dtype: torch.dtype, *operands: tuple[Number, Any]) -> Number:
    """What torch gives for these constants, in `dtype`. Each comes with the argument it is of: a tensor or a scalar."""

    def constant(number: Number, argument: Any) -> Any:
        if not isinstance(argument, _Tensor):
            return _python(number)
        return torch.full((1,) if argument.shape else (), _python(number), dtype=argument.dtype, device="cpu")

    try:
        return _number(fn(*itertools.starmap(constant, operands)).to(dtype).item())
    except (RuntimeError, OverflowError, TypeError) as error:
        raise Unproven(f"a constant of the mask cannot be computed: {error}") from error


def _fits(integers: _Integers, number: Number, dtype: torch.dtype) -> bool:
    """Whether a number is exact in `dtype` whatever its indices and sizes."""
    if isinstance(number, float):
        return True
    if dtype.is_floating_point:
        lowest, highest = -int(2 / torch.finfo(dtype).eps), int(2 / torch.finfo(dtype).eps)
    elif dtype.is_complex or dtype == torch.bool:
        return False
    else:
        lowest, highest = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if number.is_Integer:
        return lowest <= int(number) <= highest
    bound = integers.bound(number)
    return bound is not None and bound <= min(-lowest, highest)


def _cast(integers: _Integers, value: Value, dtype: torch.dtype) -> Value:
    """The value in another dtype."""
    if dtype == torch.bool:
        if isinstance(value, tuple):
            return _or(*(_and(c, _not(_equal(n, 0)) if isinstance(n, sympy.Expr) else True) for c, n in value))
        return value

    def cast(number: Number) -> Number:
        if not _is_constant(number):
            if not _fits(integers, number, dtype):
                raise Unproven(f"the mask's positions may not be exact in {dtype}")
            return number
        if number in (0, 1):
            return number
        if dtype.is_floating_point:
            return _number(torch.tensor(float(_python(number)), dtype=torch.float64, device="cpu").to(dtype).item())
        if isinstance(number, float) or dtype.is_complex or not torch.iinfo(dtype).min <= int(number) <= torch.iinfo(dtype).max:
            raise Unproven(f"the mask turns {number} into {dtype}")
        return number

    return _merged((c, cast(n)) for c, n in _cases(value))


def _broadcast(x: _Tensor, shape: Sequence[Expr]) -> At:
    """`x` seen as a tensor of this shape."""
    offset = len(shape) - len(x.shape)
    for size, wanted in zip(x.shape, shape[offset:], strict=True):
        if size not in (1, wanted):
            raise Unproven(f"a size of {size} is broadcast to {wanted}")
    return lambda index: x.at(tuple(sympy.S.Zero if s == 1 else i for s, i in zip(x.shape, index[offset:], strict=True)))


def _operand(out: _Out, x: Any) -> Callable[[Index], Cases]:
    """A tensor or scalar argument of an elementwise operation, as its cases."""
    if isinstance(x, _Tensor):
        at = _broadcast(x, out.shape)
        return lambda index: _cases(at(index))
    cases: Cases = ((True, _scalar(x)),)
    return lambda index: cases


def _scalar(x: Any) -> Number:
    if isinstance(x, sympy.Expr):
        return x
    if isinstance(x, (bool, int, float)):
        return _number(x)
    raise Unproven(f"the mask is built with {x!r}")


def _boolean(out: _Out, x: Any) -> Callable[[Index], Formula]:
    if isinstance(x, _Tensor):
        at = _broadcast(x, out.shape)
        return lambda index: _cast(out.integers, at(index), torch.bool)  # type: ignore[return-value]
    number = _scalar(x)
    if not _is_constant(number):
        raise Unproven(f"the mask takes {number} as a boolean")
    return lambda index: number != 0


HANDLERS: dict[Any, Callable[..., At]] = {}
IRRELEVANT = frozenset(["dtype", "device", "layout", "pin_memory", "requires_grad", "memory_format", "non_blocking", "copy", "names"])


def _handles(*names: str) -> Callable[[Callable[..., At]], Callable[..., At]]:
    """Makes a function the meaning of the torch functions, operators and methods of these names.

    It is called with the `_Out` and the call's arguments: tensors as `_Tensor`, symbolic integers as expressions, without
    those that only say where and in which dtype (the `_Out` does).
    """

    def register(handler: Callable[..., At]) -> Callable[..., At]:
        for name in names:
            HANDLERS[name] = handler
            for owner in (torch, operator, torch.Tensor, torch.nn.functional):
                if callable(getattr(owner, name, None)):
                    HANDLERS[getattr(owner, name)] = handler
        return handler

    return register


@_handles("full", "full_like", "new_full", "fill_", "scalar_tensor", "tensor")
def _full(out: _Out, *args: Any, **kwargs: Any) -> At:
    fill = kwargs.get("fill_value", kwargs.get("value", args[-1] if args else None))
    if isinstance(fill, _Tensor):
        return _broadcast(fill, out.shape)
    fill = _scalar(fill)
    return lambda index: ((True, fill),)


@_handles("ones", "ones_like", "new_ones")
def _ones(out: _Out, *args: Any, **kwargs: Any) -> At:
    return lambda index: ((True, sympy.S.One),)


@_handles("zeros", "zeros_like", "new_zeros", "zero_")
def _zeros(out: _Out, *args: Any, **kwargs: Any) -> At:
    return lambda index: ((True, sympy.S.Zero),)


@_handles("arange")
def _arange(out: _Out, *args: Any, start: Any = 0, end: Any = None, step: Any = 1) -> At:
    start, end, step = (0, args[0], 1) if len(args) == 1 else (*args, *(start, end, step)[len(args) :])
    first, step = _scalar(start), _scalar(step)
    if isinstance(first, float) or isinstance(step, float):
        raise Unproven("the mask's positions are not integers")
    return lambda index: ((True, sympy.expand(first + step * index[0])),)


@_handles("to", "type", "type_as", "float", "half", "bfloat16", "double", "int", "long", "bool", "cpu", "cuda")
def _same(out: _Out, x: _Tensor, *args: Any) -> At:
    return x.at


@_handles("contiguous", "clone", "detach", "alias", "pos")
def _identity(out: _Out, x: _Tensor) -> At:
    return x.at


@_handles("expand", "expand_as", "broadcast_to")
def _expand(out: _Out, x: _Tensor, *sizes: Any, **kwargs: Any) -> At:
    return _broadcast(x, out.shape)


@_handles("view", "reshape", "view_as", "reshape_as", "unsqueeze", "squeeze", "flatten", "unflatten")
def _reshape(out: _Out, x: _Tensor, *args: Any, **kwargs: Any) -> At:
    if x.dtype != out.dtype:
        raise Unproven(f"the bits of {x.dtype} are read as {out.dtype}")
    before = [d for d, size in enumerate(x.shape) if size != 1]
    after = [d for d, size in enumerate(out.shape) if size != 1]
    if [x.shape[d] for d in before] != [out.shape[d] for d in after]:
        raise Unproven(f"a mask of shape {list(x.shape)} is reshaped to {list(out.shape)}")
    place = dict(zip(before, after, strict=True))
    return lambda index: x.at(tuple(index[place[d]] if d in place else sympy.S.Zero for d in range(len(x.shape))))


@_handles("permute")
def _permute(out: _Out, x: _Tensor, *dims: Any) -> At:
    order = [d % len(x.shape) for d in (dims[0] if isinstance(dims[0], (list, tuple)) else dims)]
    return lambda index: x.at(tuple(index[order.index(d)] for d in range(len(order))))


@_handles("transpose", "swapaxes", "swapdims")
def _transpose(out: _Out, x: _Tensor, dim0: int, dim1: int) -> At:
    order = list(range(len(x.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(out, x, order)


@_handles("t", "adjoint")
def _t(out: _Out, x: _Tensor) -> At:
    return x.at if len(x.shape) < 2 else _transpose(out, x, -2, -1)


def _getattr(out: _Out, x: _Tensor, name: str) -> At:
    if name not in ("T", "mT") or len(x.shape) != 2:
        raise Unproven(f"the attribute {name} of a mask")
    return _t(out, x)


HANDLERS[getattr] = _getattr


@_handles("getitem")
def _getitem(out: _Out, x: _Tensor, items: Any) -> At:
    items = list(items) if isinstance(items, (tuple, list)) else [items]
    if any(isinstance(item, (bool, list)) or (isinstance(item, _Tensor) and item.dtype == torch.bool) for item in items):
        raise Unproven("the mask is indexed by booleans or lists")
    taken = sum(item is not None and item is not Ellipsis for item in items)
    rest = [slice(None)] * (len(x.shape) - taken)
    at = next((n for n, item in enumerate(items) if item is Ellipsis), len(items))
    items = items[:at] + rest + items[at + 1 :]

    # Index tensors are broadcast together; what they make stands where they stand side by side, otherwise first.
    gathered = max((len(item.shape) for item in items if isinstance(item, _Tensor)), default=0)
    kept = [isinstance(item, _Tensor) for item in items if item is None or isinstance(item, (slice, _Tensor))]
    apart = sum(now and not before for before, now in zip([False, *kept], kept, strict=False)) > 1
    where: int | None = 0 if apart else None
    position = gathered if apart else 0
    sources: list[tuple[Callable[[Index], Cases], bool]] = []  # of each dimension of x, the index read; whether from a tensor
    for item in items:
        if item is None:
            position += 1
        elif isinstance(item, slice):
            sources.append((_sliced(out, x.shape[len(sources)], item, position), False))
            position += 1
        elif isinstance(item, _Tensor):
            if where is None:
                where, position = position, position + gathered
            sources.append((_gathered(out, item, where, gathered), True))
        else:
            constant: Cases = ((True, _wrapped(out.integers, _scalar(item), x.shape[len(sources)], True)),)
            sources.append((lambda index, constant=constant: constant, False))  # type: ignore[misc]

    def value(index: Index) -> Value:
        def read(done: Index, condition: Formula) -> Value:
            if len(done) == len(sources):
                return x.at(done)
            source, from_tensor = sources[len(done)]

            def chosen(case: Formula, number: Number) -> Value:
                both = _and(condition, case)
                position = _wrapped(out.integers, number, x.shape[len(done)], both) if from_tensor else number
                return read((*done, position), both)

            return _at_each(source(index), chosen)

        return read((), True)

    return value


def _sliced(out: _Out, size: Expr, item: slice, position: int) -> Callable[[Index], Cases]:
    step = 1 if item.step is None else item.step
    if not isinstance(step, int) or step < 1:
        raise Unproven("the mask is sliced with a symbolic step")
    start = _scalar(0 if item.start is None else item.start)
    if out.integers.holds(_at_most(start, -1)):
        start = start + size
    if not out.integers.holds(_at_most(0, start)):
        raise Unproven(f"the mask is sliced from {start}, which may be negative")
    return lambda index: ((True, sympy.expand(start + step * index[position])),)


def _gathered(out: _Out, item: _Tensor, where: int, gathered: int) -> Callable[[Index], Cases]:
    at = _broadcast(item, out.shape[where : where + gathered])
    return lambda index: _cases(at(index[where : where + gathered]))


def _wrapped(integers: _Integers, number: Number, size: Expr, condition: Formula) -> Expr:
    """An index as torch takes it: a negative one counts from the end."""
    if isinstance(number, float):
        raise Unproven("the mask is indexed by a float")
    if integers.holds(_or(_not(condition), _at_most(0, number))):
        return number
    if integers.holds(_or(_not(condition), _at_most(number, -1))):
        return sympy.expand(number + size)
    raise Unproven(f"the mask is indexed by {number}, which may be negative or not")


@_handles("cat")
def _cat(out: _Out, tensors: Sequence[_Tensor], dim: int = 0) -> At:
    if any(len(t.shape) != len(out.shape) for t in tensors):
        raise Unproven("the mask concatenates tensors of different ranks")
    dim = dim % len(out.shape)

    def value(index: Index) -> Value:
        offsets = [sum((t.shape[dim] for t in tensors[:n]), sympy.S.Zero) for n in range(len(tensors))]

        def part(n: int) -> Value:
            t = tensors[n]
            inside = (*index[:dim], sympy.expand(index[dim] - offsets[n]), *index[dim + 1 :])
            here = _cast(out.integers, t.at(inside), out.dtype)
            if n == len(tensors) - 1:
                return here
            return _choose(_at_most(index[dim] + 1, offsets[n + 1]), here, part(n + 1))

        return part(0)

    return value


@_handles("diff")
def _diff(out: _Out, x: _Tensor, n: int = 1, dim: int = -1, prepend: _Tensor | None = None, append: _Tensor | None = None) -> At:
    if n != 1 or x.dtype == torch.bool:
        raise Unproven("a difference of higher order, or of booleans")
    dim = dim % len(x.shape)
    joined = _cat(out, [t for t in (prepend, x, append) if t is not None], dim)
    before = _Tensor(out.shape, out.dtype, joined)
    after = _Tensor(out.shape, out.dtype, lambda index: joined((*index[:dim], index[dim] + 1, *index[dim + 1 :])))
    return _sub(out, after, before)


@_handles("cumsum")
def _cumsum(out: _Out, x: _Tensor, dim: int) -> At:
    dim = dim % len(x.shape)

    def value(index: Index) -> Value:
        k = out.integers.index(x.shape[dim])
        summed = x.cases((*index[:dim], k, *index[dim + 1 :]))
        possible = {n for condition, n in summed if not out.integers.impossible(condition)}
        if len(possible) != 1 or not isinstance(term := possible.pop(), sympy.Integer):
            raise Unproven("the mask is a running sum of different numbers")
        return ((True, sympy.expand(term * (index[dim] + 1))),)

    return value


@_handles("tril", "tril_")
def _tril(out: _Out, x: _Tensor, diagonal: Any = 0) -> At:
    diagonal = _scalar(diagonal)
    return lambda index: _choose(_at_most(index[-1] - index[-2], diagonal), x.at(index), _zero(x))


@_handles("triu", "triu_")
def _triu(out: _Out, x: _Tensor, diagonal: Any = 0) -> At:
    diagonal = _scalar(diagonal)
    return lambda index: _choose(_at_most(diagonal, index[-1] - index[-2]), x.at(index), _zero(x))


def _zero(x: _Tensor) -> Value:
    return False if x.dtype == torch.bool else ((True, sympy.S.Zero),)


@_handles("where")
def _where(out: _Out, condition: _Tensor, input: Any, other: Any) -> At:
    chosen, a, b = _boolean(out, condition), _converted(out, input), _converted(out, other)
    return lambda index: _choose(chosen(index), a(index), b(index))


@_handles("masked_fill", "masked_fill_")
def _masked_fill(out: _Out, x: _Tensor, mask: _Tensor, value: Any) -> At:
    return _where(out, mask, value, x)


def _converted(out: _Out, x: Any) -> At:
    cases = _operand(out, x)
    return lambda index: _cast(out.integers, cases(index), out.dtype)


def _arithmetic(fn: Callable[..., Any], exact: Callable[..., Any] | None, out: _Out, x: Any, y: Any) -> At:
    """An elementwise operation on numbers: torch itself on constants, `exact` on integer expressions."""
    left, right = _operand(out, x), _operand(out, y)

    def combined(a: Number, b: Number) -> Number:
        if _is_constant(a) and _is_constant(b):
            return _compute(fn, out.dtype, (a, x), (b, y))
        if exact is None or isinstance(a, float) or isinstance(b, float):
            raise Unproven(f"the mask does {getattr(fn, '__name__', fn)} on positions")
        result = sympy.expand(exact(a, b))
        if not all(_fits(out.integers, n, out.dtype) for n in (a, b, result)):
            raise Unproven(f"the mask's positions may not be exact in {out.dtype}")
        return result

    return lambda index: _merged((_and(c, d), combined(a, b)) for c, a in left(index) for d, b in right(index))


@_handles("add", "add_", "iadd")
def _add(out: _Out, x: Any, y: Any) -> At:
    return _arithmetic(operator.add, operator.add, out, x, y)


@_handles("sub", "sub_", "isub", "subtract")
def _sub(out: _Out, x: Any, y: Any) -> At:
    return _arithmetic(operator.sub, operator.sub, out, x, y)


@_handles("rsub")
def _rsub(out: _Out, x: Any, y: Any) -> At:
    return _sub(out, y, x)


@_handles("mul", "mul_", "imul", "multiply")
def _mul(out: _Out, x: Any, y: Any) -> At:
    return _arithmetic(operator.mul, operator.mul, out, x, y)


@_handles("div", "div_", "itruediv", "truediv", "true_divide", "divide")
def _div(out: _Out, x: Any, y: Any) -> At:
    return _arithmetic(operator.truediv, None, out, x, y)


@_handles("neg", "negative")
def _neg(out: _Out, x: _Tensor) -> At:
    return _arithmetic(operator.mul, operator.mul, out, x, -1)


def _comparison(fn: Callable[..., Any], exact: Callable[[Any, Any], Formula]) -> Callable[..., At]:
    def handler(out: _Out, x: Any, y: Any) -> At:
        left, right = _operand(out, x), _operand(out, y)
        dtype = torch.result_type(_empty(x), _empty(y))

        def compared(a: Number, b: Number) -> Formula:
            if _is_infinite(a) or _is_infinite(b):  # any finite number stands for a position
                a, b = (n if _is_constant(n) else sympy.S.Zero for n in (a, b))
            if _is_constant(a) and _is_constant(b):
                return bool(_compute(fn, torch.int64, (a, x), (b, y)) != 0)
            if isinstance(a, float) or isinstance(b, float) or not (_fits(out.integers, a, dtype) and _fits(out.integers, b, dtype)):
                raise Unproven(f"the mask compares {a} and {b} in {dtype}, where they may not be exact")
            return exact(a, b)

        return lambda index: _or(*(_and(c, d, compared(a, b)) for c, a in left(index) for d, b in right(index)))

    return handler


def _is_infinite(number: Number) -> bool:
    return isinstance(number, float) and math.isinf(number)


def _empty(x: Any) -> Any:
    """Something of the same kind, for type promotion."""
    if isinstance(x, _Tensor):
        return torch.empty((0,) if x.shape else (), dtype=x.dtype, device="cpu")
    return 0 if isinstance(x, sympy.Expr) else x


for _names, _fn, _exact in (
    (("le", "less_equal"), operator.le, _at_most),
    (("lt", "less"), operator.lt, lambda a, b: _at_most(a + 1, b)),
    (("ge", "greater_equal"), operator.ge, lambda a, b: _at_most(b, a)),
    (("gt", "greater"), operator.gt, lambda a, b: _at_most(b + 1, a)),
    (("eq",), operator.eq, _equal),
    (("ne", "not_equal"), operator.ne, lambda a, b: _not(_equal(a, b))),
):
    _handles(*_names)(_comparison(_fn, _exact))


def _logical(combine: Callable[..., Formula], only_bool: bool) -> Callable[..., At]:
    def handler(out: _Out, *operands: Any) -> At:
        if only_bool and out.dtype != torch.bool:
            raise Unproven("the mask does bit arithmetic on integers")
        read = [_boolean(out, x) for x in operands]
        return lambda index: combine(*(r(index) for r in read))

    return handler


_LOGICAL: tuple[tuple[tuple[str, ...], Callable[..., Formula], bool], ...] = (
    (("logical_and", "logical_and_"), _and, False),
    (("logical_or", "logical_or_"), _or, False),
    (("logical_xor",), _xor, False),
    (("logical_not", "logical_not_"), _not, False),
    (("bitwise_and", "bitwise_and_", "and_", "iand"), _and, True),
    (("bitwise_or", "bitwise_or_", "or_", "ior"), _or, True),
    (("bitwise_xor", "xor"), _xor, True),
    (("bitwise_not", "bitwise_not_", "invert"), _not, True),
)
for _spellings, _combine, _only_bool in _LOGICAL:
    _handles(*_spellings)(_logical(_combine, _only_bool))


# --- The graph ------------------------------------------------------------------------------------------------------


class _Interpreter:
    """Reads the masks of one graph, as it stands."""

    def __init__(self, graph: Graph) -> None:
        self.order = {node: n for n, node in enumerate(graph.nodes)}
        self.integers = _Integers()
        self.writers = [(node, written) for node in graph.nodes if not _is_operator(node) and (written := writes(node))]
        self.computed: set[Node] = set()
        self._tensors: dict[Node, _Tensor] = {}
        self._proofs: dict[Any, Proof] = {}

    def prove(self, mask: Node, attention: Node | None) -> Proof:
        with unset_fake_temporarily():
            try:
                mask = self._current(mask, attention)
                shape = self._shape(mask)
                grid = (*(sympy.S.One, sympy.S.One), *shape)[-2:]
                if attention is not None:
                    grid = tuple(self._shape(attention.args[n])[-2] for n in (0, 1))
                if (mask, grid) not in self._proofs:
                    self._proofs[mask, grid] = self._prove(mask, *grid)
                return self._proofs[mask, grid]
            except Unproven as stop:
                return Proof("unknown", str(stop))

    def is_pure(self, node: Node) -> bool:
        """Whether a node may be erased where nothing uses its value."""
        known = node.target in HANDLERS or node.target in ("size", "dim", "numel") or node.target in (operator.floordiv, operator.mod)
        return (known and not any(node is w for w, _ in self.writers)) or node in self.computed

    def _prove(self, mask: Node, rows: Expr, columns: Expr) -> Proof:
        try:
            proof = self._prove_symbolically(mask, rows, columns)
        except (Unproven, RecursionError) as stop:
            proof = Proof("unknown", str(stop))
        if proof.kind == "unknown" and rows.is_Integer and columns.is_Integer:
            return self._compare(mask, int(rows), int(columns)) or proof
        return proof

    def _prove_symbolically(self, mask: Node, rows: Expr, columns: Expr) -> Proof:
        integers, value = self.integers, self._tensor(mask)
        i, j = integers.index(rows), integers.index(columns)
        leading = tuple(integers.index(size) for size in value.shape[:-2])
        grid = (*value.shape[:-2], rows, columns)[-max(len(value.shape), 2) :]
        attends = self._attended(value, _broadcast(value, grid)((*leading, i, j)))
        if integers.holds(attends):
            return Proof("all")
        causal = _at_most(j, i)
        if not integers.impossible(_and(attends, _not(causal))):
            return Proof("unknown", "the mask is not proved to hide what comes later")
        if integers.impossible(_and(causal, _not(attends))):
            return Proof("causal")
        for inequality in _inequalities(attends):
            width = sympy.expand(inequality - (i - j))  # i - j <= -width
            if width.is_Integer and width <= 0 and integers.impossible(_xor(attends, _and(causal, _at_most(i - j, -width)))):
                return Proof("window", window=-int(width))
        return Proof("unknown", "the mask hides more than what comes later")

    def _attended(self, mask: _Tensor, value: Value) -> Formula:
        """Where the mask attends; elsewhere it hides."""
        if not isinstance(value, tuple):
            return value
        lowest = _lowest(mask.dtype)
        attended: list[Formula] = []
        for condition, number in value:
            if number == 0:
                attended.append(condition)
            elif not (_is_constant(number) and _python(number) <= lowest) and not self.integers.impossible(condition):
                raise Unproven(f"the mask adds {number}, neither 0 nor the lowest {mask.dtype}")
        return _or(*attended)

    def _shape(self, node: Node) -> tuple[Expr, ...]:
        value = tensor(node)
        if value is None:
            raise Unproven(f"{node.name} is not a tensor")
        return tuple(self.integers.of(size) for size in value.shape)

    def _argument(self, node: Node, reader: Node) -> Any:
        value = example(node)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise Unproven(f"depends on {node.name}, a number that is not known before it runs")
        if isinstance(value, torch.Size):
            return tuple(map(self.integers.of, value))
        if isinstance(value, torch.SymInt):
            return self.integers.of(value)
        if isinstance(value, (int, float)):
            return value
        return self._tensor(self._current(node, reader))

    def _tensor(self, node: Node) -> _Tensor:
        """The tensor of a node, which is looked at no closer until its values are asked for."""
        if node not in self._tensors:
            values: dict[Index, Value] = {}
            meaning: list[At] = []

            def at(index: Index) -> Value:
                if index not in values:
                    if not meaning:
                        meaning.append(self._meaning(node))
                    values[index] = _cast(self.integers, meaning[0](index), self._tensors[node].dtype)
                return values[index]

            shape = self._shape(node)
            self._tensors[node] = _Tensor(shape, tensor(node).dtype, at)
        return self._tensors[node]

    def _meaning(self, node: Node) -> At:
        if node.op in ("placeholder", "get_attr"):
            raise Unproven(f"depends on the {_description(node)}")
        handler = HANDLERS.get(node.target)
        if handler is None:
            data = [n for n in _upstream([node]) if n.op in ("placeholder", "get_attr") and tensor(n) is not None]
            if data:
                raise Unproven(f"depends on the {_description(min(data, key=self.order.__getitem__))}, through {_name(node.target)}")
            raise Unproven(f"{node.name} ({_name(node.target)}) is not understood")
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._argument(n, node))
        kwargs = {name: value for name, value in kwargs.items() if name not in IRRELEVANT}
        if "input" in kwargs and not args:
            args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
        out = _Out(self._tensors[node].shape, self._tensors[node].dtype, self.integers)
        try:
            inspect.signature(handler).bind(out, *args, **kwargs)
        except TypeError as error:
            raise Unproven(f"{node.name} ({_name(node.target)}) is not understood: {error}") from error
        return handler(out, *args, **kwargs)

    def _current(self, node: Node, reader: Node | None) -> Node:
        """The node whose value `node`'s memory holds when `reader` reads it: itself, or the last write to all of it."""
        end = len(self.order) if reader is None else self.order[reader]
        memory = storage(node)
        latest = node
        for writer, written in self.writers:
            if not self.order[node] < self.order[writer] < end:
                continue
            if all(memory is not None and storage(w) not in (memory, None) for w in written):
                continue
            if writer.target not in HANDLERS or _origin(writer.args[0]) is not _origin(node):
                raise Unproven(f"{writer.name} ({_name(writer.target)}) writes in place to what the mask is built of")
            latest = writer
        return latest

    def _compare(self, mask: Node, rows: int, columns: int) -> Proof | None:
        """The proof by computing the mask, where it depends on nothing and is not too large."""
        nodes = sorted(_upstream([mask]), key=self.order.__getitem__)
        if not all(_is_computable(n) for n in nodes) or any(w in nodes or set(ws) & set(nodes) for w, ws in self.writers):
            return None
        try:
            value = _computed(nodes).expand((*tensor(mask).shape[:-2], rows, columns))
        except Exception as error:
            log.debug("te_dynamo: the mask %s could not be computed: %s", mask.name, error)
            return None
        self.computed.update(nodes)
        attended = value if value.dtype == torch.bool else value == 0
        if value.dtype != torch.bool and not bool((attended | (value <= _lowest(value.dtype))).all()):
            return None
        if bool(attended.all()):
            return Proof("all")
        window = int(attended.reshape(-1, rows, columns)[0, -1].sum()) - 1
        i, j = torch.arange(rows, device="cpu")[:, None], torch.arange(columns, device="cpu")
        if bool((attended == (j <= i)).all()):
            return Proof("causal")
        if rows == columns and window >= 0 and bool((attended == ((j <= i) & (i - j <= window))).all()):
            return Proof("window", window=window)
        return None


def _lowest(dtype: torch.dtype) -> float:
    """What a mask of this dtype adds to hide, or less."""
    if not dtype.is_floating_point:
        raise Unproven(f"the mask is of {dtype}")
    return masked.lowest(dtype)


def _upstream(nodes: Sequence[Node]) -> set[Node]:
    """`nodes` and all that they are computed from."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _is_operator(node: Node) -> bool:
    """Whether a name that ends in `_` is Python's way around a keyword rather than torch's sign of a write."""
    return node.target in (operator.and_, operator.or_, operator.not_)


def _origin(node: Any) -> Any:
    """The node whose memory an in-place operation gave back."""
    while isinstance(node, Node) and node.target in HANDLERS and not _is_operator(node) and writes(node):
        node = node.args[0]
    return node


def _name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _description(node: Node) -> str:
    """What a user calls the tensor that a placeholder brings in."""
    source = getattr(getattr(node, "_dynamo_source", None), "name", "") or str(node.target)
    if isinstance(example(node), torch.nn.Parameter):
        what = "parameter"
    elif "_buffers" in source or node.op == "get_attr":
        what = "buffer"
    else:
        what = "input"
    local = re.fullmatch(r"L\['(\w+)'\]", source)
    return f"{what} {local[1] if local else clean_path(source) or source}"


def _is_computable(node: Node) -> bool:
    """Whether a node is torch's own function of constants, its tensor of a size that may be computed."""
    if node.op not in ("call_function", "call_method"):
        return False
    values = example(node)
    known = node.op == "call_method" or str(getattr(node.target, "__module__", "")).split(".")[0] in ("torch", "_operator", "builtins")
    return known and all(
        isinstance(v, (int, float)) or (isinstance(v, torch.Tensor) and _bytes(v) <= MAX_BYTES)
        for v in (values if isinstance(values, (tuple, list)) else [values])
    )


def _bytes(value: torch.Tensor) -> float:
    sizes = [s for s in value.shape if isinstance(s, int)]
    return math.prod(sizes) * value.element_size() if len(sizes) == value.dim() else math.inf


class _Deterministic(TorchDispatchMode):
    """Lets nothing run that reads the generator, memory that no one wrote, or another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in func.name():
            raise Unproven(f"{func.name()} is not a function of its arguments")
        return func(*args, **(kwargs or {}))


def _computed(nodes: Sequence[Node]) -> torch.Tensor:
    """The value of the last of `nodes`, which are all that it needs, in order; on the CPU."""
    last_use = {n: user for user in nodes for n in user.all_input_nodes}
    values: dict[Node, Any] = {}
    with torch.no_grad(), torch.device("cpu"), _Deterministic():
        for node in nodes:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            args, kwargs = map_aggregate((args, kwargs), lambda a: torch.device("cpu") if isinstance(a, torch.device) else a)
            fn = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
            values[node] = value = fn(*args, **kwargs)
            expected = tensor(node)
            if expected is not None and (value.shape, value.dtype) != (expected.shape, expected.dtype):
                raise Unproven(f"{node.name} is not what the graph says")
            for used in node.all_input_nodes:
                if last_use[used] is node:
                    del values[used]
    return values[nodes[-1]]
