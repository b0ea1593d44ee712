"""Expressions for inputs that imitate the real ones: size, strides, dtype, mean and deviation, the range of indices."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from te_dynamo.ir.graph import example, hint, is_call, is_method, tensor
from te_dynamo.ir.state_inputs import StateInput
from te_dynamo.passes.higher_order import calls

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
SMALL = 16  # integer tensors with at most this many elements are written out: positions, lengths, counters
NO_HINT = 16  # stands for a size that depends on data
# The state's inputs, see `_filled`. A scale of 0 would be one that was never set.
STATE = {
    StateInput.SCALE: "torch.ones({size}, {kind})",
    StateInput.GRAD_SCALE: "torch.ones({size}, {kind})",
    StateInput.GRAD_AMAX: "torch.zeros({size}, {kind})",
    StateInput.SINK: "torch.zeros({size}, {kind})",
}


def number(value: Any) -> Any:
    """A number, or the one that a symbolic number stands for in this trace."""
    known = hint(value)
    return NO_HINT if known is None else known


def fill_placeholder(node: Node, given: Any, bound: int | None) -> str:
    """An expression for the tensor of a placeholder. given: its value, where that is known; bound: see `fill`."""
    value = tensor(node)
    assert value is not None
    if getattr(node, "_dynamo_source", None) is None:
        for state, numbers in STATE.items():
            if str(node.target).startswith(state.placeholder):
                return _filled(value, numbers)
    items = [number(example(user)) for user in node.users if is_method(user, "item") and isinstance(example(user), SYMBOLIC)]
    if items and not _is_real(given):
        return _filled(value, f"torch.full({{size}}, {items[0]!r}, {{kind}})")
    return fill(value, given, bound)


def fill(value: torch.Tensor, given: Any, bound: int | None) -> str:
    """An expression for a tensor like `value`, with numbers like those of `given` where that is a real tensor.

    bound: what indices must stay below; None where `value` is not known to hold indices.
    """
    real = given if _is_real(given) and given.numel() else None
    if value.dtype == torch.bool:
        return _filled(value, "torch.rand({size}{device}) < 0.9")
    if _is_integer(value):
        return _filled(value, _integers(value, real, bound))
    mean, deviation, positive = _moments(value, real)
    if deviation == 0:
        return _filled(value, f"torch.full({{size}}, {mean!r}, {{kind}})")
    numbers = "torch.randn({size}, {kind})" + (f" * {deviation:.3g}" if deviation != 1 else "") + (f" + {mean:.3g}" if mean else "")
    return _filled(value, f"({numbers}).abs()" if positive else numbers)


def _is_real(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type != "meta"


def _moments(value: torch.Tensor, real: torch.Tensor | None) -> tuple[float, float, bool]:
    """(mean, standard deviation, whether nothing is negative)."""
    if real is None or real.is_complex():
        is_parameter = isinstance(value, torch.nn.Parameter)
        return (1.0, 0.0, True) if is_parameter and value.dim() == 1 else (0.0, 0.02 if is_parameter else 1.0, False)
    if real.numel() == 1:
        return real.detach().to(torch.float64).item(), 0.0, False
    finite = real.detach().float()
    finite = finite[finite.isfinite()]
    if finite.numel() == 0:
        return 0.0, 1.0, False
    mean, deviation, least = finite.mean().item(), finite.std(correction=0).item(), finite.min().item()
    if least >= 0 and deviation and mean < 2 * deviation:  # like the absolute value of something around 0
        return 0.0, math.hypot(mean, deviation), True
    return (mean if abs(mean) > deviation / 10 else 0.0), deviation, least >= 0


def _integers(value: torch.Tensor, real: torch.Tensor | None, bound: int | None) -> str:
    low, high = 0, 2 if bound is None else bound
    if real is not None:
        if real.numel() <= SMALL and real.numel() == math.prod(_sizes(value.shape)):
            return f"torch.tensor({real.tolist()}, {{kind}})"
        low, high = int(real.min()), int(real.max()) + 1
        if bound is not None:  # a label to ignore (-100) is no index
            low, high = max(low, 0), min(bound, max(high, 1))
    return f"torch.randint({low}, {high}, {{size}}, {{kind}})"


def _filled(value: torch.Tensor, numbers: str) -> str:
    """The expression `numbers` with `{size}`, `{kind}` (dtype and device) and `{device}` of `value`.

    Other strides than a contiguous tensor's are laid over numbers made in a row.
    """
    size, stride = _sizes(value.shape), _sizes(value.stride())
    strided = "{size}" in numbers and not torch.empty_strided(size, stride, device="meta").is_contiguous()
    extent = (1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)),) if strided else size
    device = "" if value.device.type == "cpu" else f', device="{value.device}"'
    float8 = value.dtype.is_floating_point and value.dtype.itemsize == 1  # torch draws no random numbers of that kind
    kind = f"dtype={torch.float32 if float8 else value.dtype}{device}"
    made = numbers.replace("{size}", str(extent)).replace("{device}", device).replace("{kind}", kind)
    if not numbers.endswith(")") or numbers.startswith("torch.randn({size}, {kind}) "):  # what follows applies to all of it
        made = f"({made})"
    return made + (f".to({value.dtype})" if float8 else "") + (f".as_strided({size}, {stride})" if strided else "")


def _sizes(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(number(v) for v in values)


# ---- what an integer input indexes


def index_bounds(gm: GraphModule) -> dict[Node, int]:
    """For each integer input that is used to look something up, directly or after moves and slices, the smallest number of
    rows it is looked up in."""
    bounds = {n: list(_bounds(gm, n, set())) for n in gm.graph.nodes if n.op == "placeholder" and _is_integer(tensor(n))}
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
    """The number of rows among which `user` looks up `index`; None where it does something else with it."""
    args = (*user.args, *user.kwargs.values())
    if is_call(user, F.embedding, F.embedding_bag) and args[0] is index:
        return _size(args[1], 0)
    if is_call(user, F.cross_entropy, F.nll_loss) and args[1:2] == (index,):
        logits = tensor(args[0])
        return None if logits is None else _size(args[0], min(1, logits.dim() - 1))
    if user.target in (F.one_hot, "one_hot") and args[0] is index:
        return next((classes for classes in args[1:2] if isinstance(classes, int) and classes > 0), None)
    if user.target in (torch.gather, torch.index_select, "gather", "index_select", "scatter", "scatter_", "scatter_add_", "index_add_"):
        given: dict[str, Any] = dict(zip(("input", "dim", "index"), user.args, strict=False)) | dict(user.kwargs)
        return _size(given["input"], given["dim"]) if given.get("index") is index and isinstance(given.get("dim"), int) else None
    if is_call(user, operator.getitem):
        places = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
        at = next((i for i, place in enumerate(places) if place is index), None)
        return None if at is None else _size(user.args[0], _dimension(places, at))
    return None


def _dimension(places: Sequence[Any], at: int) -> int:
    """The dimension that the place `at` of an index indexes: None takes up none, an ellipsis as many as are left."""
    if any(p is Ellipsis for p in places[:at]):
        return -sum(p is not None for p in places[at:])
    return sum(p is not None for p in places[:at])


def _size(node: Any, dim: int) -> int | None:
    value = tensor(node)
    return None if value is None or not -value.dim() <= dim < value.dim() else number(value.shape[dim])
