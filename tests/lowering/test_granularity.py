"""Quantization by rows, blocks, MX and NVFP4 against the formats' definitions, written out in numpy with tables of their values."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_dynamo.lowering.granularity import MX, NVFP4, Blocks
from te_dynamo.lowering.quantized import Quantized
from tests import te_on_cpu
from tests.numerics import sqnr

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
f32 = np.float32


def table(mantissa: int, least: int, top: float) -> np.ndarray:
    """The non-negative values of a small float format, ascending and indexed by code, so that even codes have even indices."""
    below = [m * 2.0 ** (least - mantissa) for m in range(2**mantissa)]
    above = [(1 + m / 2**mantissa) * 2.0**e for e in range(least, 17) for m in range(2**mantissa)]
    return np.array([v for v in below + above if v <= top])


TABLES = {E4M3: table(3, -6, 448), E5M2: table(2, -14, 57344), "e2m1": table(1, 0, 6)}


def nearest(values: np.ndarray, format: Any) -> np.ndarray:
    """`values` in a format: to nearest, ties to the even code, saturating; NaN stays."""
    grid = TABLES[format]
    magnitude = np.minimum(np.abs(values.astype(np.float64)), grid[-1])
    above = np.clip(np.searchsorted(grid, np.nan_to_num(magnitude)), 1, len(grid) - 1)
    down, up = magnitude - grid[above - 1], grid[above] - magnitude
    place = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    return np.where(np.isnan(values), np.nan, np.copysign(grid[place], values))


def largest(block: np.ndarray) -> np.float32:
    numbers = np.abs(block[~np.isnan(block)])
    return f32(numbers.max()) if numbers.size else f32(0)


def quantized_block(kind: Blocks | MX | NVFP4, block: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The quantized values of one block; whole: the matrix."""
    amax = largest(block)
    if isinstance(kind, Blocks):
        top = f32(TABLES[kind.dtype][-1])
        amax = max(amax, f32(kind.epsilon))
        scale = f32(1) if amax == 0 or np.isinf(amax) else min(top / amax, np.finfo(f32).max)
        if kind.power_of_2:
            scale = f32(2.0 ** math.floor(math.log2(scale)))
        values = nearest(block * scale, kind.dtype).astype(f32) * (f32(1) / scale)
        return np.full_like(values, np.nan) if np.isinf(amax) else values  # an overflow must stay visible
    if isinstance(kind, MX):
        ratio = float(amax) / TABLES[kind.dtype][-1]
        exponent = 127 if np.isinf(ratio) else -127 if ratio == 0 else max(math.ceil(math.log2(ratio)), -127)
        return nearest(block * f32(2.0**-exponent), kind.dtype).astype(f32) * f32(2.0**exponent)
    encode = min(f32(448 * 6) / largest(whole), np.finfo(f32).max)
    encode = encode if encode > 0 else f32(1)
    decode = f32(1) / encode
    scale = f32(nearest(np.array([amax * (encode * f32(1 / 6))]), E4M3)[0]) * decode
    values = nearest(block * min(f32(1) / scale, np.finfo(f32).max), "e2m1").astype(f32) * scale
    return np.full_like(values, np.nan) if not np.isfinite(block).all() else values


@np.errstate(all="ignore")
def by_definition(kind: Blocks | MX | NVFP4, t: Tensor) -> np.ndarray:
    values = t.float().numpy()
    out = np.empty_like(values)
    height, width = kind.rows or max(t.shape[0], 1), kind.columns or max(t.shape[1], 1)
    for r in range(0, t.shape[0], height):
        for c in range(0, t.shape[1], width):
            where = np.s_[r : r + height, c : c + width]
            out[where] = quantized_block(kind, values[where], values)
    return out


def pair(quantized: Quantized) -> tuple[Tensor, Tensor]:
    return quantized.data, quantized.scale_inv


def check(kind: Blocks | MX | NVFP4, t: Tensor) -> None:
    quantized = kind.quantize(t)
    np.testing.assert_array_equal(kind.dequantize(quantized, t.shape[1]).numpy(), by_definition(kind, t))
    assert all(made.is_contiguous() for made in pair(quantized))


KINDS = {
    "tensor": Blocks(E4M3, None, None),
    "rows": Blocks(E4M3, 1, None, power_of_2=True),
    "rows e5m2": Blocks(E5M2, 1, None),
    "1x128": Blocks(E4M3, 1, 128, power_of_2=True),
    "128x128": Blocks(E4M3, 128, 128),
    "with epsilon": Blocks(E4M3, 1, 128, epsilon=0.5),
    "mx": MX(E4M3),
    "mx e5m2": MX(E5M2),
    "mx 32x32": MX(E4M3, rows=32),
    "nvfp4": NVFP4(),
    "nvfp4 16x16": NVFP4(rows=16),
}


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_is_the_definition(name, data):
    rows, columns = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 300))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    t = torch.randn(rows, columns) * torch.exp2(data.draw(st.integers(-8, 8)) * torch.rand(rows, columns))
    check(KINDS[name], t.to(dtype))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-44, 1e-38, 1e-30, 1e30])
def test_is_the_definition_at_the_edges(name, scale):
    torch.manual_seed(0)
    t = torch.randn(33, 150) * scale
    t[0] = 0
    t[1, 3], t[2, 5:8] = float("nan"), 0
    t[4] = float("nan")
    check(KINDS[name], t)
    t[5, 2], t[6, 140] = float("inf"), -float("inf")
    check(KINDS[name], t)


@pytest.mark.parametrize("name", KINDS)
def test_a_matrix_of_any_strides(name):
    torch.manual_seed(0)
    t = torch.randn(70, 40)
    for of_view, of_copy in zip(*(pair(KINDS[name].quantize(m)) for m in (t.t(), t.t().contiguous())), strict=True):
        assert of_view.is_contiguous()
        assert torch.equal(of_view.view(torch.uint8), of_copy.view(torch.uint8))


@pytest.mark.parametrize("kind", [KINDS[name] for name in ("rows", "1x128", "mx", "mx e5m2", "mx 32x32")])
def test_what_is_representable_stays(kind):
    grid = TABLES[kind.dtype]
    t = torch.from_numpy(np.concatenate([grid[::-1], -grid])).float()[None]
    t = torch.cat([t[:, :1].expand(1, 32), t], 1)  # the largest in the first block: others have finer scales
    assert torch.equal(kind.dequantize(kind.quantize(t), t.shape[1]), t)


def test_mx_never_saturates_and_never_wastes_a_power():
    """The largest value of a block is scaled into (fp8_max / 2, fp8_max]."""
    torch.manual_seed(0)
    t = torch.rand(4000, 1) * torch.exp2(torch.randint(-60, 60, (4000, 1)))
    t[:60] = 448 * torch.exp2(torch.arange(-30, 30.0))[:, None]
    data, scale_inv = pair(MX(E4M3).quantize(t))
    scaled = t / scale_inv.float()
    assert scaled.max() <= 448 and scaled.min() > 224
    assert torch.equal(data[:60].float(), torch.full((60, 1), 448.0))


def test_a_block_is_scaled_by_what_is_in_it():
    t = torch.ones(2, 300)
    t[0, 130] = 1000
    expected = torch.tensor([[1.0, 1000.0, 1.0], [1.0, 1.0, 1.0]]) / 448
    torch.testing.assert_close(Blocks(E4M3, 1, 128).quantize(t).scale_inv, expected)
    assert Blocks(E4M3, 128, 128).quantize(t).scale_inv.shape == (1, 3)


def test_finer_scales_are_better_where_there_are_outliers():
    """With 0.1% of outliers, the error of the other elements. The outliers must be large, since FP8 spans 18 octaves."""
    torch.manual_seed(0)
    x = torch.randn(1024, 1024)
    outlier = torch.rand_like(x) < 0.001

    def errors(factor: float, *kinds: Blocks | MX | NVFP4) -> list[float]:
        t = torch.where(outlier, factor * x, x)
        return [sqnr(x[~outlier], kind.dequantize(kind.quantize(t), 1024)[~outlier]) for kind in kinds]

    found = errors(2.0**16, *(Blocks(E4M3, *size) for size in ((None, None), (128, 128), (1, None), (1, 128), (1, 32))), MX(E4M3))
    assert all(finer > coarser + 1 for coarser, finer in pairwise(found[:-1])), found
    assert found[-1] > found[-3]  # MX's power-of-two scales cost up to 2 dB compared with other scales for the same blocks
    coarse, fine = errors(50, NVFP4(rows=16), NVFP4())
    assert fine > coarse + 3
    assert max(errors(50, Blocks(E4M3, None, None), MX(E4M3))) < 32


# --- NVFP4


def test_nvfp4_is_packed():
    t = torch.tensor([[0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 6]])
    data, scale_inv = pair(NVFP4().quantize(t))
    assert data.tolist() == [[0x10, 0x32, 0x54, 0x76, 0xA9, 0xCB, 0xED, 0x7F]]
    assert torch.allclose(scale_inv, torch.ones(1, 1))
    odd = t[:, 1:8]
    assert torch.allclose(NVFP4().dequantize(NVFP4().quantize(odd), 7), odd)


def hadamard() -> np.ndarray:
    signs = np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])
    return signs[:, None] * np.array([[(-1) ** bin(i & j).count("1") for j in range(16)] for i in range(16)]) / 4


def test_hadamard_transform():
    assert np.array_equal(hadamard() @ hadamard().T, np.eye(16))
    torch.manual_seed(0)
    t = torch.randint(-50, 50, (5, 40)).float()  # whole numbers: the transform is exact
    padded = np.pad(t.numpy(), ((0, 0), (0, 8))).reshape(5, 3, 16)
    transformed = torch.from_numpy((padded @ hadamard()).reshape(5, 48)).float()
    for found, expected in zip(pair(NVFP4(hadamard=True).quantize(t)), pair(NVFP4().quantize(transformed)), strict=True):
        assert torch.equal(found, expected)
    back = NVFP4().dequantize(NVFP4().quantize(transformed), 48).numpy().reshape(5, 3, 16) @ hadamard().T
    here = NVFP4(hadamard=True)
    np.testing.assert_allclose(here.dequantize(here.quantize(t), 40).numpy(), back.reshape(5, 48)[:, :40], atol=1e-4)


def test_hadamard_transform_spreads_outliers():
    """A block with one large value needs a quarter of the range."""
    torch.manual_seed(0)
    t = torch.randn(64, 256)
    t[:, ::16] *= 50
    plain, spread = (kind.quantize(t).scale_inv.mean() for kind in (NVFP4(), NVFP4(hadamard=True)))
    assert 0.25 <= spread / plain < 0.35


def test_stochastic_rounding_is_right_on_average():
    torch.manual_seed(0)
    t = torch.cat([torch.linspace(-6, 6, 241)[None], torch.full((1, 15), 6.0)], 1).flatten()
    blocks = torch.cat([t[:240].reshape(-1, 15), torch.full((16, 1), 6.0)], 1)  # 6 in each: all have the same scale
    kind = NVFP4(stochastic=True)
    draws = torch.stack([kind.dequantize(kind.quantize(blocks), 16) for _ in range(2000)])
    grid = torch.tensor(np.concatenate([-TABLES["e2m1"][::-1], TABLES["e2m1"]])).float()
    assert torch.isclose(draws.unique()[:, None], grid, atol=1e-5).any(1).all()
    assert (draws - blocks).abs().amax() <= 2
    assert (draws.mean(0) - blocks).abs().max() < 5 / 2000**0.5  # 5 standard deviations of a step of 2
    assert draws[:, blocks == 6].sub(6).abs().max() < 1e-5
    nearest_error = (NVFP4().dequantize(NVFP4().quantize(blocks), 16) - blocks).abs().max()
    assert nearest_error > 0.9


def test_stochastic_rounding_repeats_with_the_seed():
    t = torch.randn(20, 48)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(NVFP4(stochastic=True).quantize(t).data)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# --- Transformer Engine's own reference


@pytest.mark.parametrize(("rows", "transform"), [(1, False), (16, False), (1, True)])
def test_nvfp4_is_that_of_transformer_engine(rows, transform):
    if (reason := te_on_cpu.missing()) is not None:
        pytest.skip(reason)
    te_on_cpu.install()
    from transformer_engine.pytorch.custom_recipes import reference_nvfp4, reference_utils

    theirs = reference_nvfp4.NVFP4QuantizerRef(
        dtype=reference_utils.Fp4Formats.E2M1, quant_tile_shape=(rows, 16), pow_2_scales=False, with_rht=transform
    )
    torch.manual_seed(0)
    t = torch.randint(-500, 500, (64, 96)).float()
    result = theirs.quantize(t)
    # their transposed copy is quantized along the tokens, and transformed
    for kind, matrix, data, scale, amax in (
        (NVFP4(rows), t, result.data, result.scale, result.global_amax_row),
        (NVFP4(rows, hadamard=transform), t.t(), result.data_t, result.scale_t, result.global_amax_col),
    ):
        ours = kind.quantize(matrix)
        assert torch.equal(*(reference_nvfp4.cast_from_fp4x2(d, torch.float32) for d in (ours.data, data)))
        expected = scale.float() * amax / (448 * 6)
        torch.testing.assert_close(ours.scale_inv.repeat_interleave(rows, 0), expected, rtol=1e-6, atol=0)
