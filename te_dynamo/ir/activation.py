"""Activations: the functions between the linears of an MLP, by themselves or as the gate of a product."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from te_dynamo.ir.graph import fake_like
from te_dynamo.ir.op import Invariant, operation
from te_dynamo.ir.sizes import same


class Spelling(NamedTuple):
    """One way to write an activation, which determines where values are rounded.

    function: the kernels' name for what it computes, up to rounding; compute: ordinary torch, elementwise.
    inputs: 2 if `compute` takes the gate and the tensor that it multiplies; numbers: the names of the model's numbers that it takes.
    written_out: whether a rule finds it in a graph by the operations of `compute`.
    """

    function: str
    compute: Callable[..., Tensor]
    inputs: int = 1
    numbers: tuple[str, ...] = ()
    written_out: bool = True


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _glu(gate: Tensor, up: Tensor) -> Tensor:
    """`F.glu`, which rounds once."""
    computed_in = torch.promote_types(gate.dtype, torch.float32)
    return (up.to(computed_in) * torch.sigmoid(gate.to(computed_in))).to(gate.dtype)


def _clamped_swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = gate.clamp(min=None, max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


# By name. A rule finds each by the operations of `compute`: to add a spelling, add a line.
SPELLINGS: Mapping[str, Spelling] = {
    "gelu": Spelling("gelu", F.gelu),
    "gelu_written_out": Spelling("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "gelu_tanh": Spelling("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "gelu_new": Spelling("gelu_tanh", _gelu_new),
    "gelu_fast": Spelling("gelu_tanh", _gelu_fast),
    "quick_gelu": Spelling("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    "silu": Spelling("silu", F.silu),
    "silu_written_out": Spelling("silu", lambda x: x * torch.sigmoid(x)),
    "relu_squared": Spelling("relu_squared", lambda x: torch.square(F.relu(x))),
    "relu": Spelling("relu", F.relu),
    "mish": Spelling("mish", F.mish),
    "mish_written_out": Spelling("mish", lambda x: x * torch.tanh(F.softplus(x))),
    "clamped_swiglu": Spelling("clamped_swiglu", _clamped_swiglu, 2, ("alpha", "limit")),
    "glu_written_out": Spelling("sigmoid", lambda gate, up: up * torch.sigmoid(gate), 2),
    "glu": Spelling("sigmoid", _glu, 2, written_out=False),
}


def _fake(x: Tensor, up: Tensor | None = None, *, out_dtype: torch.dtype, **_: Any) -> Tensor:
    return fake_like(x, x.shape, out_dtype)


@operation(
    kind="activation",
    fake=_fake,
    reads=2,
    invariants=(
        Invariant("x and up have one shape", lambda a: a.up is None or same(a.x.shape, a.up.shape)),
        Invariant("the result has the shape of x, in out_dtype", lambda a: same(a.out.shape, a.x.shape) and a.out.dtype == a.out_dtype),
    ),
)
def activation(
    x: Tensor, up: Tensor | None = None, *, spelling: str, out_dtype: torch.dtype, alpha: float = 0.0, limit: float = 0.0
) -> Tensor:
    """`f(x)`, or `f(x) * up` if x is a gate, elementwise.

    x, up: the same shape. Returns that shape in `out_dtype`. spelling: a key of `SPELLINGS`.
    alpha, limit: for a clamped SwiGLU (gpt-oss): `(clamp(up) + 1) * clamp(x) * sigmoid(alpha * clamp(x))`; x is only clamped from above.
    """
    found = SPELLINGS[spelling]
    numbers = {name: value for name, value in (("alpha", alpha), ("limit", limit)) if name in found.numbers}
    if found.inputs == 2:
        return found.compute(x, up, **numbers).to(out_dtype)
    y = found.compute(x)
    return (y if up is None else y * up).to(out_dtype)
