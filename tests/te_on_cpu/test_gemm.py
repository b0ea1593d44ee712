"""generic_gemm against float64 products of numbers that are exact in FP8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from tests import te_on_cpu

M, N, K = 64, 96, 128
LAYOUTS = ("TN", "NN", "NT")


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Integers from -7 to 7, with 7 as the largest of each block: a power-of-two scale is lossless."""
    x = torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(seed)).float()
    x[::1, ::16] = 7
    return x


def quantizer(te: Any, tex: Any, kind: str, grad: bool = False, dim: int = 1) -> Any:
    dtype = tex.DType.kFloat8E5M2 if grad else tex.DType.kFloat8E4M3
    match kind:
        case "delayed":
            return te.Float8Quantizer(torch.tensor([4.0]), torch.zeros(1), dtype)
        case "current":
            return te.Float8CurrentScalingQuantizer(dtype, "cuda", force_pow_2_scales=True)
        case "block":
            return te.Float8BlockQuantizer(dtype, rowwise=True, columnwise=True, block_scaling_dim=dim)
    return te.MXFP8Quantizer(dtype)


def gemm(tex: Any, a: Any, b: Any, layout: str = "TN", **changes: Any) -> list[Any]:
    arguments: dict[str, Any] = {
        "D": None, "quantizer": None, "output_dtype": tex.DType.kFloat32, "bias": None, "bias_type": tex.DType.kBFloat16,
        "gelu": False, "gelu_in": None, "grad": False, "workspace": torch.empty(1), "workspace_size": 1, "accumulate": False,
        "use_split_accumulator": True,
    }  # fmt: skip
    return tex.generic_gemm(a, layout[0] == "T", b, layout[1] == "T", **(arguments | changes))


def operands(layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and the product: forward of a weight and an input, dgrad, wgrad."""
    if layout == "TN":
        a, b = whole(N, K), whole(M, K, seed=1)
        return a, b, b.double() @ a.double().t()
    a, b = (whole(K, N), whole(M, K, seed=1)) if layout == "NN" else (whole(K, N), whole(K, M, seed=1))
    return a, b, (b.double() if layout == "NN" else b.double().t()) @ a.double()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["high", "delayed", "current", "block", "mxfp8"])
def test_the_product(te, tex, kind, layout):
    a, b, product = operands(layout)
    with te_on_cpu.cuda_is_cpu((10, 0) if kind == "mxfp8" else (9, 0)):
        if kind != "high":
            a = tex.quantize(a, quantizer(te, tex, kind, dim=1 if layout == "NT" else 2))
            b = tex.quantize(b, quantizer(te, tex, kind))
        assert torch.equal(gemm(tex, a, b, layout)[0].double(), product)
        bf16 = gemm(tex, a, b, layout, output_dtype=tex.DType.kBFloat16)[0]
        assert torch.equal(bf16, product.bfloat16())
        main_grad = torch.ones(product.shape)
        assert gemm(tex, a, b, layout, D=main_grad, accumulate=True, alpha=0.5, output_dtype=None)[0] is main_grad
        assert torch.equal(main_grad.double(), 0.5 * product + 1)


def test_leading_dimensions_are_kept(te, tex):
    a, b, product = operands("TN")
    x = tex.quantize(b.reshape(4, M // 4, K), quantizer(te, tex, "current"))
    out = gemm(tex, tex.quantize(a, quantizer(te, tex, "current")), x)[0]
    assert out.shape == (4, M // 4, N) and torch.equal(out.reshape(M, N).double(), product)


def test_epilogues(te, tex):
    a, b, product = operands("TN")
    a, b = (tex.quantize(t / 16, quantizer(te, tex, "current")) for t in (a, b))
    product = product / 256
    bias = torch.linspace(-1, 1, N).bfloat16()
    plain = gemm(tex, a, b, bias=bias)[0]
    assert torch.allclose(plain.double(), product + bias.double(), rtol=1e-6)
    out, _, before, _ = gemm(tex, a, b, bias=bias, gelu=True)
    assert before.dtype == torch.bfloat16 and torch.equal(before, plain.bfloat16())
    assert torch.allclose(out.double(), gelu(product + bias.double(), approximate="tanh"), atol=1e-6)

    leaf = before.double().requires_grad_()
    gelu(leaf, approximate="tanh").sum().backward()
    derivative = gemm(tex, a, b, gelu=True, gelu_in=before, grad=True)[0]
    assert torch.allclose(derivative.double(), product * leaf.grad, atol=1e-5)


def test_the_weight_gradient_s_gemm_sums_the_bias_s(te, tex):
    a, b, _ = operands("NT")
    bias_grad = gemm(tex, a, b, "NT", bias=torch.empty(M), grad=True)[1]
    assert torch.equal(bias_grad.double(), b.double().sum(0))


@pytest.mark.parametrize("kind", ["delayed", "current", "block"])
def test_a_quantized_output(te, tex, kind):
    """Delayed scaling rounds the float32 sum; others round it to the output's dtype before."""
    a, b, _ = operands("TN")
    a, b = (tex.quantize(t, quantizer(te, tex, "current")) for t in (a, b))
    to = quantizer(te, tex, kind)
    out = gemm(tex, a, b, quantizer=to, output_dtype=tex.DType.kBFloat16)[0]
    exact = gemm(tex, a, b)[0]
    source = exact if kind == "delayed" else exact.bfloat16().float()
    assert torch.equal(out.dequantize(dtype=torch.float32), tex.quantize(source, quantizer(te, tex, kind)).dequantize())


def test_what_a_hopper_refuses(te, tex):
    def tensor(rows: int, columns: int, kind: str = "current", grad: bool = False, dim: int = 1) -> Any:
        return tex.quantize(torch.ones(rows, columns), quantizer(te, tex, kind, grad, dim))

    w, x = tensor(N, K), tensor(M, K)
    with pytest.raises(RuntimeError, match="E5M2 x E5M2"):
        gemm(tex, tensor(N, K, grad=True), tensor(M, K, grad=True))
    with pytest.raises(RuntimeError, match="float32 bias"):
        gemm(tex, w, x, bias=torch.zeros(N))
    with pytest.raises(RuntimeError, match="scaled in different ways"):
        gemm(tex, w, tensor(M, K, "block"))
    with pytest.raises(RuntimeError, match="not a multiple of 16"):
        gemm(tex, tensor(N, 24), tensor(M, 24))
    with pytest.raises(RuntimeError, match="a row of the output"):
        gemm(tex, tensor(20, K), x, output_dtype=tex.DType.kBFloat16)
    with pytest.raises(RuntimeError, match="blocks of 128 x 128"):
        gemm(tex, tensor(N, K, "block", dim=2), tensor(M, K, "block", dim=2))
    with pytest.raises(RuntimeError, match="no epilogue but"):
        gemm(tex, tensor(N, K, "block"), tensor(M, K, "block"), gelu=True)
    with pytest.raises(RuntimeError, match="MXFP8 GEMM needs compute capability 10.0"):
        gemm(tex, tensor(N, K, "mxfp8"), tensor(M, K, "mxfp8"))
    with pytest.raises(RuntimeError, match="inner dimensions differ"):
        gemm(tex, w, tensor(M, 2 * K))
    rowwise = quantizer(te, tex, "current")
    rowwise.set_usage(columnwise=False)
    with pytest.raises(RuntimeError, match="TN only"):
        gemm(tex, tex.quantize(torch.ones(K, N), rowwise), x, "NN")
    with te_on_cpu.cuda_is_cpu((10, 0)):  # a Blackwell reads the row-wise copy in any layout
        assert gemm(tex, tex.quantize(torch.ones(K, N), rowwise), x, "NN")[0].eq(K).all()
