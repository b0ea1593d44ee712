"""The norms and activations against torch's in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.te_on_cpu.truth import decode, round_to_fp8

ROWS, HIDDEN, EPS = 24, 64, 1e-5


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, dy [2, ROWS / 2, HIDDEN], weight, bias [HIDDEN]."""
    torch.manual_seed(0)
    x, dy = (torch.randn(2, ROWS // 2, HIDDEN) * 3 + 1 for _ in range(2))
    weight, bias = torch.randn(HIDDEN), torch.randn(HIDDEN)
    return x.to(dtype), dy.to(dtype), weight.to(dtype), bias.to(dtype)


def close(value: Tensor, reference: Tensor) -> None:
    """Equal up to one rounding to the value's dtype."""
    step = torch.finfo(value.dtype).eps
    torch.testing.assert_close(value.double(), reference.detach().double(), rtol=step, atol=32 * torch.finfo(torch.float32).eps * 100)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layernorm(te, tex, dtype, zero_centered):
    x, dy, weight, bias = inputs(dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.layer_norm(leaves[0], (HIDDEN,), leaves[1] + zero_centered, leaves[2], EPS)
    y.backward(dy.double())
    out, mu, rsigma = tex.layernorm_fwd(x, weight, bias, EPS, None, None, te.constants.TE_DType[dtype], 0, zero_centered)
    close(out, y)
    close(mu, x.double().mean(-1).flatten())
    close(rsigma, (x.double().var(-1, unbiased=False).flatten() + EPS).rsqrt())
    for gradient, leaf in zip(tex.layernorm_bwd(dy, x, mu, rsigma, weight, 0, zero_centered), leaves, strict=True):
        assert gradient.dtype == dtype
        close(gradient, leaf.grad)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm(te, tex, dtype, zero_centered):
    x, dy, weight, _ = inputs(dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    y = F.rms_norm(leaves[0], (HIDDEN,), leaves[1] + zero_centered, EPS)
    y.backward(dy.double())
    into = torch.empty_like(x)
    out, none, rsigma = tex.rmsnorm_fwd(x, weight, EPS, into, None, te.constants.TE_DType[dtype], 0, zero_centered)
    assert out is into and none is None
    close(out, y)
    for gradient, leaf in zip(tex.rmsnorm_bwd(dy, x, rsigma, weight, 0, zero_centered), leaves, strict=True):
        close(gradient, leaf.grad)
    close(tex.rmsnorm_bwd_add(dy, x, 2 * dy, rsigma, weight, 0, zero_centered)[0], leaves[0].grad + 2 * dy.double())


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (HIDDEN,), weight.float(), EPS)


def test_delayed_scaling_is_part_of_a_norm_s_kernel(te, tex):
    """It rounds once, from float32; the amax is that of the float32 values."""
    x, _, weight, _ = inputs(torch.bfloat16)
    quantizer = te.Float8Quantizer(torch.tensor([16.0]), torch.zeros(1), tex.DType.kFloat8E4M3)
    out = tex.rmsnorm_fwd(x, weight, EPS, None, quantizer, tex.DType.kBFloat16, 0, False)[0]
    exact = rms(x, weight)
    once, twice = (round_to_fp8(t * 16, 7) for t in (exact, exact.bfloat16().float()))
    stored = decode(out._data, 7)
    assert (once != twice).any() and (stored != once).sum() <= 1  # a last bit of float32 may fall on a tie
    assert quantizer.amax == pytest.approx(exact.abs().max().item(), rel=1e-6)
    assert torch.equal(out._transpose, out._data.movedim(-1, 0)) and out.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["current", "block", "mxfp8"])
def test_other_quantizers_read_the_rounded_norm(te, tex, kind):
    x, _, weight, bias = inputs(torch.bfloat16)
    x = x.reshape(ROWS, HIDDEN).repeat(4, 2).reshape(-1, HIDDEN)
    e4m3 = tex.DType.kFloat8E4M3
    quantizer = {
        "current": lambda: te.Float8CurrentScalingQuantizer(e4m3, "cuda"),
        "block": lambda: te.Float8BlockQuantizer(e4m3, rowwise=True, columnwise=True, block_scaling_dim=1),
        "mxfp8": lambda: te.MXFP8Quantizer(e4m3),
    }[kind]()
    for norm in (
        lambda q: tex.rmsnorm_fwd(x, weight, EPS, None, q, tex.DType.kBFloat16, 0, False),
        lambda q: tex.layernorm_fwd(x, weight, bias, EPS, None, q, tex.DType.kBFloat16, 0, False),
    ):
        plain, quantized = norm(None)[0], norm(quantizer)[0]
        assert torch.equal(quantized.dequantize(), quantizer(plain).dequantize())
        assert not torch.equal(quantized.dequantize(), plain)


ACTIVATIONS: dict[str, Any] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "srelu": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "geglu": lambda x: F.gelu(x[..., : x.shape[-1] // 2], approximate="tanh") * x[..., x.shape[-1] // 2 :],
    "swiglu": lambda x: F.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :],
    "reglu": lambda x: F.relu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :],
    "glu": lambda x: torch.sigmoid(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation(te, tex, name):
    x, dy, _, _ = inputs(torch.bfloat16)
    leaf = x.double().requires_grad_()
    y = ACTIVATIONS[name](leaf)
    dy = dy[..., : y.shape[-1]].contiguous()
    y.backward(dy.double())
    close(getattr(tex, name)(x, None), y)
    dx = getattr(tex, f"d{name}")(dy, x, None)
    close(dx, leaf.grad)
    if hasattr(tex, f"dbias_d{name}"):
        bias_grad, with_bias = getattr(tex, f"dbias_d{name}")(dy, x, None)
        assert torch.equal(with_bias, dx)
        close(bias_grad, dx.double().sum((0, 1)))
    quantizer = te.Float8Quantizer(torch.tensor([8.0]), torch.zeros(1), tex.DType.kFloat8E4M3)
    stored = decode(getattr(tex, name)(x, quantizer)._data, 7)
    assert (stored != round_to_fp8(y.detach() * 8, 7)).sum() < stored.numel() / 200  # float32's last bits, at a tie
