"""Activations in plain torch: the value and the gradients that kernels compute, in float32 and not rounded in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from te_dynamo import ops
from te_dynamo.ir.activation import SPELLINGS
from te_dynamo.lowering.call import Call

GAUSS = 1 / math.sqrt(2 * math.pi)
TANH = 2 * math.sqrt(2 / math.pi)  # (1 + tanh(u)) / 2 is sigmoid(2 u)


def value(call: Call, x: Tensor, up: Tensor | None) -> Tensor:
    """The activation of x (and up) [..., N], by definition, in float32 without rounding. call: of an `ops.activation`."""
    return ops.activation(x.float(), None if up is None else up.float(), **{**call.attributes, "out_dtype": torch.float32})


def gradients(call: Call, grad: Tensor, x: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and up in float32, from the gradient of the result; all [..., N]."""
    function, grad, x = SPELLINGS[call["spelling"]].function, grad.float(), x.float()
    factor = None if up is None else up.float()
    if function == "clamped_swiglu":
        assert factor is not None
        alpha, limit = call["alpha"], call["limit"]
        gate, inside = x.clamp(max=limit), factor.abs() <= limit
        f, slope = _scaled_silu(gate, alpha)
        d_x = torch.where(x <= limit, grad * (factor.clamp(-limit, limit) + 1) * slope, 0.0)
        return d_x, torch.where(inside, grad * f, 0.0)
    f, slope = SLOPES[function](x)
    return (grad * slope, None) if factor is None else (grad * factor * slope, grad * f)


def _scaled_silu(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(alpha * x)
    return x * s, s + alpha * x * s * (1 - s)


def _relu(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(x), torch.where(x <= 0, 0.0, torch.ones_like(x))


def _relu_squared(x: Tensor) -> tuple[Tensor, Tensor]:
    r = torch.relu(x)
    return r * r, 2 * r


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    below = 0.5 + 0.5 * torch.erf(x * math.sqrt(0.5))
    return x * below, below + x * torch.exp(-0.5 * x * x) * GAUSS


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(TANH * (x + 0.044715 * x * x * x))
    return x * s, s + x * s * (1 - s) * TANH * (1 + 3 * 0.044715 * x * x)


def _mish(x: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(torch.nn.functional.softplus(x))
    return x * t, t + x * torch.sigmoid(x) * (1 - t * t)


def _sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    return s, s * (1 - s)


# Each function's value and derivative, by `Spelling.function`.
SLOPES: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: _scaled_silu(x, 1.702),
    "silu": lambda x: _scaled_silu(x, 1.0),
    "relu": _relu,
    "relu_squared": _relu_squared,
    "mish": _mish,
    "sigmoid": _sigmoid,
}
