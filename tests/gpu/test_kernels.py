"""The Triton kernels, run on the device, against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from te_dynamo.ir.linear import GemmRows
from te_dynamo.lowering.fp8 import amax, quantize
from tests.gpu.device import DEVICE, no_te
from tests.gpu.helpers import random

pytestmark = pytest.mark.gpu
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
SHAPES = [((128,), 128, 0), ((100,), 37, 0), ((1,), 5, 0), ((0,), 3, 0), ((130,), 260, 0), ((16, 48), 200, 0), ((32, 32, 32), 72, 8)]


def same(found: Tensor, expected: Tensor) -> bool:
    """Bitwise equal, except for the bits of a NaN."""
    nan = expected.float().isnan()
    bits = found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    return found.shape == expected.shape and torch.equal(found.float().isnan(), nan) and torch.equal(bits[0][~nan], bits[1][~nan])


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize(("sizes", "columns", "interleave"), SHAPES)
def test_cast_transpose(sizes, columns, interleave, dtype, source):
    parts = [random(n, columns, seed=i, dtype=source) for i, n in enumerate(sizes)]
    if parts[0].numel() > 9:
        parts[0].view(-1)[3], parts[-1].view(-1)[5], parts[-1].view(-1)[6] = torch.nan, 6e4, -6e4
    whole, scale = GemmRows(sizes, len(sizes) > 1, interleave).join(parts), torch.tensor(3.7, device=DEVICE)
    expected = quantize(whole, scale, dtype)
    plain, across, peaks = torch.ops.te_dynamo.cast_transpose(parts, scale, dtype, interleave, True, True)
    assert same(plain, expected) and same(across, expected.t())
    assert not peaks.numel() or peaks.max() == amax(whole)
    only, nothing, _ = torch.ops.te_dynamo.cast_transpose(parts, scale, dtype, interleave, True, False)
    assert same(only, expected) and nothing.numel() == 0
    nothing, only, _ = torch.ops.te_dynamo.cast_transpose(parts, scale, dtype, interleave, False, True)
    assert same(only, expected.t()) and nothing.numel() == 0


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_what_is_infinite(dtype):
    x = random(64, 128, dtype=torch.float32)
    x[0, 0], x[1, 1], x[2, 2] = torch.inf, -torch.inf, torch.nan
    scale = torch.tensor(2.0, device=DEVICE)
    plain, across, peaks = torch.ops.te_dynamo.cast_transpose([x], scale, dtype, 0, True, True)
    expected = quantize(x, scale, dtype)
    assert same(plain, expected) and same(across, expected.t()) and peaks.max() == torch.inf
    assert plain.float()[0, 0] == torch.finfo(dtype).max and plain.float()[2, 2].isnan()


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (100, 37), (16, 400), (1, 5), (0, 3), (1024, 4096)])
def test_transpose(shape, dtype):
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(DEVICE).view(dtype)
    found = torch.ops.te_dynamo.transpose(x)
    assert found.is_contiguous() and torch.equal(found.view(torch.uint8), x.view(torch.uint8).t())


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_te_s_kernel_is_the_definition_too(dtype):
    if (reason := no_te()) is not None:
        pytest.skip(reason)
    x, scale = random(128, 256), torch.tensor(3.5, device=DEVICE)
    x[0, 0] = 3e4
    expected = quantize(x, scale, dtype)
    plain, across, peak = torch.ops.te_dynamo.te_quantize(x, scale, dtype, True, True)
    assert same(plain, expected) and same(across, expected.t()) and peak.item() == amax(x).item()
