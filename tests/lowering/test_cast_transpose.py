"""The kernel that casts, transposes and computes the amax in one pass: the definition, and Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import te_dynamo.lowering.kernels.cast_transpose  # noqa: F401
from te_dynamo.ir.linear import GemmRows
from te_dynamo.lowering.fp8 import amax, quantize

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8)


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize(("sizes", "interleave"), [((48,), 0), ((16, 32, 8), 0), ((32, 32, 32), 8)])
def test_definition(sizes, interleave, dtype):
    torch.manual_seed(0)
    parts = [torch.randn(n, 40) for n in sizes]
    parts[0][0, 0], parts[-1][1, 1] = torch.nan, 1e4
    whole = GemmRows(sizes, len(sizes) > 1, interleave).join(parts)
    scale = torch.tensor(3.7)
    plain, across, peaks = torch.ops.te_dynamo.cast_transpose(parts, scale, dtype, interleave, True, True)
    expected = quantize(whole, scale, dtype)
    assert torch.equal(bits(plain), bits(expected)) and torch.equal(bits(across), bits(expected.t().contiguous()))
    assert peaks.max() == amax(whole) == 1e4
    only, nothing, _ = torch.ops.te_dynamo.cast_transpose(parts, scale, dtype, interleave, True, False)
    assert torch.equal(bits(only), bits(plain)) and nothing.numel() == 0
    nothing, only, _ = torch.ops.te_dynamo.cast_transpose(parts, scale, dtype, interleave, False, True)
    assert torch.equal(bits(only), bits(across)) and nothing.numel() == 0


@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (1, 1)])
def test_edges(shape):
    plain, across, peaks = torch.ops.te_dynamo.cast_transpose([torch.ones(shape)], torch.tensor(2.0), FP8[0], 0, True, True)
    assert plain.shape == shape and across.shape == shape[::-1]
    assert peaks.sum() == (1 if plain.numel() else 0)


@pytest.mark.parametrize(("data", "transposed"), [(True, True), (True, False), (False, True)])
def test_opcheck(data, transposed, monkeypatch):
    # opcheck compares an operator's arguments before and after it; torch.allclose cannot compare FP8
    allclose = torch.allclose
    monkeypatch.setattr(torch, "allclose", lambda a, b, **k: allclose(*(bits(t) if t.dtype in FP8 else t for t in (a, b)), **k))
    parts = [torch.randn(16, 40), torch.randn(16, 40)]
    torch.library.opcheck(torch.ops.te_dynamo.cast_transpose.default, (parts, torch.tensor(2.0), FP8[1], 8, data, transposed))


# Values that are exact in FP8, with a scale of 2: unlike hardware, Triton's interpreter loses the carry when it rounds, and a NaN.
KERNEL = """
    import torch
    from te_dynamo.lowering.kernels.cast_transpose import _blocks, _reference, launch

    torch.manual_seed(0)
    shapes = [((128,), 128, 0), ((100,), 37, 0), ((16, 48), 200, 0), ((32, 32, 32), 72, 8), ((1,), 5, 0), ((0,), 3, 0), ((130,), 260, 0)]
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        for sizes, columns, interleave in shapes:
            for source in (torch.bfloat16, torch.float32):
                parts = [torch.randn(n, columns).to(dtype).to(source) for n in sizes]
                if parts[0].numel() > 9:
                    parts[0].view(-1)[3], parts[-1].view(-1)[5], parts[-1].view(-1)[6] = torch.nan, 1e6, -1e9
                for data, transposed in ((True, True), (True, False), (False, True)):
                    rows, scale = sum(sizes), torch.tensor(2.0)
                    plain = torch.zeros((rows, columns) if data else (0, 0), dtype=dtype)
                    across = torch.zeros((columns, rows) if transposed else (0, 0), dtype=dtype)
                    amax = torch.zeros(sum(_blocks(p) for p in parts))
                    launch(parts, scale, plain, across, amax, interleave)
                    a, b, c = _reference(parts, scale, dtype, interleave, data, transposed)
                    for found, expected in ((plain, a), (across, b)):
                        numbers = ~expected.float().isnan()
                        assert torch.equal(found.float()[numbers], expected.float()[numbers]), (sizes, columns)
                    assert not amax.numel() or amax.max() == c.max()
"""


def test_the_kernel(interpreter):
    interpreter(KERNEL)
