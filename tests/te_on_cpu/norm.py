"""LayerNorm and RMSNorm: float32 inside, one rounding at the end, like TE's kernels (C/normalization).

A delayed quantizer's cast is part of the kernel, from float32; other quantizers read the result in the output's dtype
(P/csrc/extensions/normalization.cpp:108-140).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu.quantize import store
from tests.te_on_cpu.rounding import HIGH_PRECISION


def layernorm_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """[the norm of `input` [..., H], its mean [rows] and reciprocal deviation [rows], float32]."""
    if bias is None:
        raise RuntimeError("Gamma and Beta must have the same shape: a LayerNorm has a bias")
    x = _rows(input)
    mu = x.mean(-1)
    rsigma = torch.rsqrt(x.var(-1, unbiased=False) + eps)
    y = (x - mu[:, None]) * rsigma[:, None] * _gamma(weight, zero_centered_gamma)
    y = y + bias.detach().float()
    return [store(y.reshape(input.shape), HIGH_PRECISION[int(otype)], quantizer, ln_out), mu, rsigma]


def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """[the gradients of the input [..., H], of the weight [H] and of the bias [H]]. x: the norm's own input."""
    normal = (_rows(x) - mu[:, None]) * rsigma[:, None]
    g = _rows(dz)
    w = g * _gamma(gamma, zero_centered_gamma)
    dx = (w - w.mean(-1, keepdim=True) - normal * (w * normal).mean(-1, keepdim=True)) * rsigma[:, None]
    return [dx.reshape(x.shape).to(x.dtype), (g * normal).sum(0).to(gamma.dtype), g.sum(0).to(gamma.dtype)]


def rmsnorm_fwd(
    input: Tensor, weight: Tensor, eps: float, ln_out: Any, quantizer: Any, otype: Any, sm_margin: int, zero_centered_gamma: bool
) -> list[Any]:
    """[the norm of `input` [..., H], None, its reciprocal root mean square [rows], float32]."""
    x = _rows(input)
    rsigma = torch.rsqrt(x.pow(2).mean(-1) + eps)
    y = x * rsigma[:, None] * _gamma(weight, zero_centered_gamma)
    return [store(y.reshape(input.shape), HIGH_PRECISION[int(otype)], quantizer, ln_out), None, rsigma]


def rmsnorm_bwd(dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool) -> list[Tensor]:
    """[the gradients of the input [..., H] and of the weight [H]]."""
    return rmsnorm_bwd_add(dz, x, torch.zeros(1), rsigma, gamma, sm_margin, zero_centered_gamma)


def rmsnorm_bwd_add(
    dz: Tensor, x: Tensor, add: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """Like rmsnorm_bwd, with `add` [..., H] (a residual's gradient) added to the input's gradient before rounding."""
    normal = _rows(x) * rsigma[:, None]
    g = _rows(dz)
    w = g * _gamma(gamma, zero_centered_gamma)
    dx = (w - normal * (w * normal).mean(-1, keepdim=True)) * rsigma[:, None]
    return [(dx.reshape(x.shape) + add.float()).to(x.dtype), (g * normal).sum(0).to(gamma.dtype)]


def _rows(t: Tensor) -> Tensor:
    return t.detach().float().reshape(-1, t.shape[-1])


def _gamma(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.detach().float() + zero_centered
