"""The quantizers against FP8's definition, block by block."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.te_on_cpu.truth import FORMATS, decode, round_to_fp8

E4M3, E5M2 = 7, 8


def spread(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values over many orders of magnitude, a different magnitude in each block of 32."""
    generator = torch.Generator().manual_seed(rows + columns)
    magnitudes = 10 ** torch.empty(math.ceil(rows / 32), math.ceil(columns / 32)).uniform_(-3, 3, generator=generator)
    blocks = magnitudes.repeat_interleave(32, 0).repeat_interleave(32, 1)[:rows, :columns]
    return (torch.randn(rows, columns, generator=generator) * blocks).to(dtype)


def scale_for(block: Tensor, top: float, power_of_2: bool = True) -> float:
    amax = block.abs().max().double().item()
    if amax == 0:
        return 1.0
    exact = torch.tensor(top, dtype=torch.float32).div(torch.tensor(amax, dtype=torch.float32)).item()
    return 2.0 ** math.floor(math.log2(exact)) if power_of_2 else exact


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_delayed_scaling_uses_the_scale_it_is_given(te, tex, dtype):
    x = spread(48, 64)
    quantizer = te.Float8Quantizer(torch.tensor([3.5]), torch.tensor([7.0]), tex.DType(dtype))
    q = tex.quantize(x, quantizer)
    assert torch.equal(decode(q._data, dtype), round_to_fp8(x.float() * 3.5, dtype))
    assert torch.equal(q._transpose, q._data.t())
    assert q._scale_inv == torch.tensor([1 / 3.5])
    assert quantizer.amax == max(7.0, x.abs().max().item())
    tex.quantize(x / 1e9, quantizer)
    assert quantizer.amax == max(7.0, x.abs().max().item())  # it never decreases here


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_current_scaling_takes_the_amax_to_the_top(te, tex, dtype, power_of_2):
    x = spread(48, 64)
    q = tex.quantize(x, te.Float8CurrentScalingQuantizer(tex.DType(dtype), "cuda", force_pow_2_scales=power_of_2))
    scale = scale_for(x, FORMATS[dtype][2], power_of_2)
    assert torch.equal(decode(q._data, dtype), round_to_fp8(x.float() * torch.tensor(scale), dtype))
    assert q._scale_inv.item() == pytest.approx(1 / scale, rel=1e-7)


def test_an_epsilon_bounds_the_amax_and_zeros_have_scale_one(te, tex):
    q = tex.quantize(torch.full((16, 16), 1e-9), te.Float8CurrentScalingQuantizer(tex.DType(E4M3), "cuda", amax_epsilon=1e-3))
    assert q._scale_inv.item() == pytest.approx(1e-3 / 448, rel=1e-6)
    for values in (torch.zeros(16, 16), torch.full((16, 16), torch.inf)):
        q = tex.quantize(values, te.Float8CurrentScalingQuantizer(tex.DType(E4M3), "cuda"))
        assert q._scale_inv == 1 and decode(q._data, E4M3).max() == (448 if values.max() else 0)


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_block_scaling(te, tex, dtype, dim, power_of_2):
    rows, columns = 200, 304  # ragged
    x = spread(rows, columns)
    quantizer = te.Float8BlockQuantizer(
        tex.DType(dtype), rowwise=True, columnwise=True, force_pow_2_scales=power_of_2, block_scaling_dim=dim
    )
    q = tex.quantize(x, quantizer)
    copies = ((x, q._rowwise_data, q._rowwise_scale_inv), (x.t(), q._columnwise_data, q._columnwise_scale_inv))
    for matrix, data, scale_inv in copies:
        height = 128 if dim == 2 else 1
        for i, j in itertools.product(range(0, matrix.shape[0], height), range(0, matrix.shape[1], 128)):
            block = matrix[i : i + height, j : j + 128]
            scale = scale_for(block, FORMATS[dtype][2], power_of_2)
            at = (i // 128, j // 128) if dim == 2 else (j // 128, i)
            assert scale_inv[at].item() == pytest.approx(1 / scale, rel=1e-7)
            expected = round_to_fp8(block.float() * torch.tensor(scale), dtype)
            assert torch.equal(decode(data[i : i + height, j : j + 128], dtype), expected)
    assert scale_inv.shape[1] % 4 == 0
    limit = 2.0 ** -FORMATS[dtype][0]
    back = tex.dequantize(q, tex.DType.kFloat32)
    assert ((back - x).abs() <= limit * x.abs() + back.abs().max() * 1e-5).all()


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_mxfp8(te, tex, dtype, square):
    rows, columns = 64, 160
    x = spread(rows, columns)
    q = tex.quantize(x, te.MXFP8Quantizer(tex.DType(dtype), with_2d_quantization=square))
    assert q._rowwise_scale_inv.shape == (128, 8) and q._columnwise_scale_inv.shape == (4, 256)
    for i, j in itertools.product(range(0, rows, 32), range(0, columns, 32)):
        tile = x[i : i + 32, j : j + 32]
        for n in range(32):
            blocks = (tile, tile) if square else (tile[n], tile[:, n])
            values = ((tile[n], q._rowwise_data[i + n, j : j + 32]), (tile[:, n], q._columnwise_data[i : i + 32, j + n]))
            scales = (q._rowwise_scale_inv[i + n, j // 32], q._columnwise_scale_inv[i // 32, j + n])
            for block, (line, data), scale in zip(blocks, values, scales, strict=True):
                # The smallest power of two with which nothing exceeds the largest number.
                exponent = math.ceil(math.log2(block.abs().max().double().item() / FORMATS[dtype][2]))
                assert scale.item() == exponent + 127
                assert torch.equal(decode(data, dtype), round_to_fp8(line.double() * 2.0**-exponent, dtype))
    for usage in ("rowwise", "columnwise"):
        only = te.MXFP8Quantizer(tex.DType(dtype), rowwise=usage == "rowwise", columnwise=usage == "columnwise")
        back = tex.dequantize(tex.quantize(x, only), tex.DType.kFloat32)
        assert ((back - x).abs() <= 2.0 ** -FORMATS[dtype][0] * x.abs() + back.abs().max() * 1e-5).all()


def test_mxfp8_scales_in_the_order_of_the_gemm(te, tex):
    x = spread(256, 256)
    plain = tex.quantize(x, te.MXFP8Quantizer(tex.DType(E4M3)))
    quantizer = te.MXFP8Quantizer(tex.DType(E4M3))
    quantizer.optimize_for_gemm = True
    swizzled = tex.quantize(x, quantizer)
    assert swizzled._with_gemm_swizzled_scales
    row, block = 77, 6  # in the second tile across: r % 32 * 16 + r // 32 * 4 + c
    address = 512 + row % 32 * 16 + row // 32 * 4 + block % 4
    assert swizzled._rowwise_scale_inv.flatten()[address] == plain._rowwise_scale_inv[row, block]
    assert torch.equal(tex.dequantize(swizzled, tex.DType.kFloat32), tex.dequantize(plain, tex.DType.kFloat32))
    assert not torch.equal(swizzled._columnwise_scale_inv, plain._columnwise_scale_inv)


def quantizers(te: Any, tex: Any) -> list[Any]:
    e4m3 = tex.DType(E4M3)
    return [
        te.Float8Quantizer(torch.ones(1), torch.zeros(1), e4m3),
        te.Float8CurrentScalingQuantizer(e4m3, "cuda"),
        te.Float8BlockQuantizer(e4m3, rowwise=True, columnwise=True),
        te.MXFP8Quantizer(e4m3),
    ]


def test_what_a_tensor_is_quantized_into(te, tex):
    """The tensor gets the copies that the quantizer requests; with a noop flag, all stay as they are."""
    x, other = spread(64, 128), spread(64, 128) * 3
    for quantizer in quantizers(te, tex):
        q = tex.quantize(x, quantizer)
        before = tex.dequantize(q, tex.DType.kFloat32)
        assert tex.quantize(other, quantizer, q, torch.ones(1)) is q
        assert torch.equal(tex.dequantize(q, tex.DType.kFloat32), before)
        quantizer.set_usage(rowwise=True, columnwise=False)
        tex.quantize(other, quantizer, q, torch.zeros(1))
        assert getattr(q, "_transpose", None) is None and getattr(q, "_columnwise_data", None) is None
        assert not torch.equal(tex.dequantize(q, tex.DType.kFloat32), before)
        quantizer.set_usage(columnwise=True)
        tex.quantize(other, quantizer, q)
        copy = q._transpose if hasattr(q, "_transpose") else q._columnwise_data
        assert copy.numel() == x.numel()


def test_what_goes_with_a_quantization(te, tex):
    x = spread(64, 128)
    for quantizer in [None, *quantizers(te, tex)]:
        bias_grad, q = tex.bgrad_quantize(x, quantizer)
        assert torch.equal(bias_grad, x.double().sum(0).bfloat16())
        assert q is x if quantizer is None else torch.equal(q.dequantize(), tex.quantize(x, quantizer).dequantize())
    amax = torch.zeros(1)
    tex.compute_amax(torch.tensor([1.0, -3.0, torch.nan]), amax)
    assert amax == 3
    parts = tex.split_quantize(x, [32, 32], quantizers(te, tex)[1:3])
    assert [type(part).__name__ for part in parts] == ["Float8Tensor", "Float8BlockwiseQTensor"]
    assert torch.equal(tex.fp8_transpose(parts[0]._data, tex.DType(E4M3), out=None), parts[0]._data.t())


def test_what_is_refused(te, tex):
    with pytest.raises(RuntimeError, match="divisible by 32"):
        tex.quantize(torch.zeros(48, 64), te.MXFP8Quantizer(tex.DType(E4M3)))
    with pytest.raises(RuntimeError, match="amax must be a float"):
        tex.compute_amax(torch.zeros(1), torch.zeros(1).half())
    with pytest.raises(NotImplementedError, match="NVFP4Quantizer has no stand-in"):
        tex.quantize(torch.zeros(64, 64), te.NVFP4Quantizer())
