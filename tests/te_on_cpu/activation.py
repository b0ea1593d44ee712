"""Activations and their derivatives: float32 inside, one rounding at the end. GELU is the tanh form (C/util/math.h:26).

A gated one (geglu, swiglu, ...) activates the first half of the last dimension and multiplies by the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.te_on_cpu.quantize import is_delayed, store

Elementwise = Callable[[Tensor], Tensor]

PLAIN: dict[str, Elementwise] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "srelu": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
}
GATED: dict[str, Elementwise] = {
    "geglu": PLAIN["gelu"],
    "qgeglu": PLAIN["qgelu"],
    "reglu": PLAIN["relu"],
    "sreglu": PLAIN["srelu"],
    "swiglu": PLAIN["silu"],
    "glu": torch.sigmoid,
}
WITH_BIAS_GRADIENT = ("gelu", "qgelu", "relu", "srelu", "silu")


def stand_ins() -> list[Callable[..., Any]]:
    functions = [*PLAIN.items(), *((name, _gated(f)) for name, f in GATED.items())]
    made = [make(name, f) for name, f in functions for make in (_forward, _backward)]
    return made + [_backward_with_bias(name, PLAIN[name]) for name in WITH_BIAS_GRADIENT]


def clamped_swiglu(
    input: Tensor, quantizer: Any, limit: float = 7.0, alpha: float = 1.7020000219345093, glu_linear_offset: float = 1.0
) -> Any:
    """GPT-OSS's: the gate is clamped from above, the linear half from both sides."""
    return store(_clamped(limit, alpha, glu_linear_offset)(input.detach().float()), input.dtype, quantizer)


def clamped_dswiglu(
    grad: Tensor,
    fwd_input: Tensor,
    quantizer: Any,
    limit: float = 7.0,
    alpha: float = 1.7020000219345093,
    glu_linear_offset: float = 1.0,
) -> Any:
    return store(_derivative(_clamped(limit, alpha, glu_linear_offset), grad, fwd_input), grad.dtype, quantizer)


def _clamped(limit: float, alpha: float, offset: float) -> Elementwise:
    def activation(x: Tensor) -> Tensor:
        gate, linear = x.chunk(2, -1)
        gate = gate.clamp(max=limit)
        return gate * torch.sigmoid(alpha * gate) * (linear.clamp(-limit, limit) + offset)

    return activation


def _gated(f: Elementwise) -> Elementwise:
    def activation(x: Tensor) -> Tensor:
        gate, linear = x.chunk(2, -1)
        return f(gate) * linear

    return activation


def _derivative(f: Elementwise, grad: Tensor, x: Tensor) -> Tensor:
    """float32."""
    leaf = x.detach().float().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(f(leaf), leaf, grad.detach().float())[0]


def _forward(name: str, f: Elementwise) -> Callable[..., Any]:
    def forward(input: Tensor, quantizer: Any) -> Any:
        return store(f(input.detach().float()), input.dtype, quantizer)

    forward.__name__ = name
    return forward


def _backward(name: str, f: Elementwise) -> Callable[..., Any]:
    def backward(grad: Tensor, fwd_input: Tensor, quantizer: Any) -> Any:
        return store(_derivative(f, grad, fwd_input), grad.dtype, quantizer)

    backward.__name__ = f"d{name}"
    return backward


def _backward_with_bias(name: str, f: Elementwise) -> Callable[..., Any]:
    def backward(grad: Tensor, fwd_input: Tensor, quantizer: Any) -> list[Any]:
        """[the bias's gradient [N], the gradient], the first from the values before quantization."""
        dx = _derivative(f, grad, fwd_input)
        rounded = dx if is_delayed(quantizer) else dx.to(grad.dtype).float()
        bias_grad = rounded.reshape(-1, dx.shape[-1]).sum(0).to(grad.dtype)
        return [bias_grad, store(dx, grad.dtype, quantizer)]

    backward.__name__ = f"dbias_d{name}"
    return backward
