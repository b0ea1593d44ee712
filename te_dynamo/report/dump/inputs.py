"""Expressions for inputs that imitate the real ones in size, strides, dtype, mean, deviation and range of indices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from te_dynamo.ir.graph import example, fake, hint, is_method, tensor
from te_dynamo.ir.state_inputs import StateInput
from te_dynamo.passes.higher_order import calls

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
SMALL = 16  # integer tensors with at most this many elements are written out: positions, lengths, counters
NO_HINT = 16  # used for a number that depends on data
STATE = {StateInput.SCALE: "ones", StateInput.GRAD_SCALE: "ones", StateInput.SINK: "zeros"}


def number(value: Any) -> Any:
    """A number, or a symbolic number's value in this trace."""
    known = hint(value)
    return NO_HINT if known is None else known


def fill_placeholder(node: Node, given: Any, bound: int | None) -> str:
    """An expression for the tensor of a placeholder. given: its value, real or fake, or None; bound: as in `fill`."""
    for state, function in STATE.items() if getattr(node, "_dynamo_source", None) is None else ():
        if str(node.target).startswith(state.placeholder):
            return _made(fake(node), f"torch.{function}({{size}}, {{kind}})")
    items = [number(example(user)) for user in node.users if is_method(user, "item") and isinstance(example(user), SYMBOLIC)]
    if items and not _is_real(given):
        return _made(fake(node), f"torch.full({{size}}, {items[0]!r}, {{kind}})")
    return fill(fake(node), given, bound)


def fill(value: torch.Tensor, given: Any, bound: int | None) -> str:
    """An expression for a tensor like `value`, with numbers like those of `given` if that is a real tensor.

    bound: the exclusive upper bound of indices; None if `value` is not known to hold indices.
    """
    real = given if _is_real(given) and given.numel() else None
    if value.dtype == torch.bool:
        return _made(value, "(torch.rand({size}, {kind}) < 0.9)")
    if _is_integer(value):
        return _made(value, _integers(value, real, bound))
    mean, deviation, positive = _moments(value, real)
    if deviation == 0:
        return _made(value, f"torch.full({{size}}, {mean!r}, {{kind}})")
    scaled = (f" * {deviation:.3g}" if deviation != 1 else "") + (f" + {mean:.3g}" if abs(mean) > deviation / 10 else "")
    numbers = f"(torch.randn({{size}}, {{kind}}){scaled})" if scaled or positive else "torch.randn({size}, {kind})"
    return _made(value, f"{numbers}.abs()" if positive else numbers)


def _is_real(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type != "meta"


def _moments(value: torch.Tensor, real: torch.Tensor | None) -> tuple[float, float, bool]:
    """(mean, standard deviation, whether none is negative) of the finite numbers; without real values, those of fresh weights."""
    if real is None or real.is_complex():
        is_parameter = isinstance(value, torch.nn.Parameter)
        return (1.0, 0.0, True) if is_parameter and value.dim() == 1 else (0.0, 0.02 if is_parameter else 1.0, False)
    if real.numel() == 1:
        return real.detach().to(torch.float64).item(), 0.0, False
    finite = real.detach().float()
    finite = finite[finite.isfinite()]
    if finite.numel() == 0:
        return 0.0, 1.0, False
    return finite.mean().item(), finite.std(correction=0).item(), finite.min().item() >= 0


def _integers(value: torch.Tensor, real: torch.Tensor | None, bound: int | None) -> str:
    low, high = 0, 2 if bound is None else bound
    if real is not None:
        if real.numel() <= SMALL and real.numel() == math.prod(_sizes(value.shape)):
            return f"torch.tensor({real.tolist()}, {{kind}})"
        low, high = int(real.min()), int(real.max()) + 1
        if bound is not None:  # a label to ignore (-100) is no index
            low, high = max(low, 0), min(bound, max(high, 1))
    return f"torch.randint({low}, {high}, {{size}}, {{kind}})"


def _made(value: torch.Tensor, numbers: str) -> str:
    """The expression `numbers` with the `{size}` and `{kind}` (dtype and device) of `value`.

    If `value` is not contiguous, the expression is a view with its strides of a one-dimensional tensor.
    """
    size, stride = _sizes(value.shape), _sizes(value.stride())
    strided = "{size}" in numbers and not torch.empty_strided(size, stride, device="meta").is_contiguous()
    extent = (1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)),) if strided else size
    float8 = value.dtype.is_floating_point and value.dtype.itemsize == 1  # torch draws float32 and rounds
    kind = f"dtype={torch.float32 if float8 or value.dtype == torch.bool else value.dtype}"
    kind += "" if value.device.type == "cpu" else f', device="{value.device}"'
    made = numbers.replace("{size}", str(extent)).replace("{kind}", kind)
    return made + (f".to({value.dtype})" if float8 else "") + (f".as_strided({size}, {stride})" if strided else "")


def _sizes(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(number(v) for v in values)


# ---- what an integer input indexes


def index_bounds(gm: GraphModule) -> dict[Node, int]:
    """For each integer input that is used as an index, directly or after operations with integer results, the smallest
    size that it indexes."""
    bounds = {n: list(_bounds(gm, n, set())) for n in gm.graph.find_nodes(op="placeholder") if _is_integer(tensor(n))}
    return {node: min(found) for node, found in bounds.items() if found}


def _is_integer(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _bounds(gm: GraphModule, node: Node, seen: set[Node]) -> Iterator[int]:
    seen.add(node)
    bodies = {call.node: call for call in calls(gm)}
    for user in node.users:
        if user in bodies:
            call = bodies[user]
            for placeholder, operand in zip(call.body.graph.find_nodes(op="placeholder"), call.operands, strict=False):
                if operand is node:
                    yield from _bounds(call.body, placeholder, seen)
        elif (bound := _rows_looked_up(user, node)) is not None:
            yield bound
        elif user not in seen and _is_integer(tensor(user)):
            yield from _bounds(gm, user, seen)


def _rows_looked_up(user: Node, index: Node) -> int | None:
    """The size of the dimension that `user` indexes with `index`; None if it does something else with it."""
    args = (*user.args, *user.kwargs.values())
    name = getattr(user.target, "__name__", user.target)
    if name == "getitem":
        places = args[1] if isinstance(args[1], tuple) else (args[1],)
        at = next((i for i, place in enumerate(places) if place is index), None)
        if at is None:
            return None
        from_the_end = any(place is Ellipsis for place in places[:at])
        dims = sum(place is not None for place in (places[at:] if from_the_end else places[:at]))
        return _size(args[0], -dims if from_the_end else dims)
    match name, next((i for i, arg in enumerate(args) if arg is index), None):
        case "embedding" | "embedding_bag", 0:
            return _size(args[1], 0)
        case "cross_entropy" | "nll_loss", 1:
            return _size(args[0], min(1, fake(args[0]).dim() - 1))
        case "one_hot", 0:
            return next((classes for classes in args[1:2] if isinstance(classes, int) and classes > 0), None)
        case "gather" | "index_select" | "scatter" | "scatter_" | "scatter_add_" | "index_add_", 2:
            return _size(args[0], args[1])
    return None


def _size(node: Any, dim: Any) -> int | None:
    value = tensor(node)
    return number(value.shape[dim]) if value is not None and isinstance(dim, int) and -value.dim() <= dim < value.dim() else None
