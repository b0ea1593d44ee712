"""The rotation of q and k before they are rounded, and the kernel that rotates and casts: the definition, and Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import te_dynamo.lowering.kernels.cast_rotated  # noqa: F401
from te_dynamo.lowering.fp8 import E4M3, amax
from te_dynamo.lowering.limits import DTYPES
from te_dynamo.lowering.rotation import hadamard, rotated, rotated_amax
from tests.numerics import sqnr

ours = torch.ops.te_dynamo
SIZES = [4, 16, 24, 48, 64, 80, 96, 128, 192, 256]


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(heads=st.integers(1, 3), size=st.sampled_from(SIZES), dtype=st.sampled_from(list(DTYPES)))
def test_it_keeps_every_score(heads, size, dtype):
    q, k = (gaussian(1, heads, 9, size, dtype=dtype, seed=seed) for seed in (0, 1))
    found, expected = (a.double() @ b.double().mT for a, b in ((rotated(q), rotated(k)), (q, k)))
    assert sqnr(expected, found) > (120 if dtype == torch.float32 else 40)
    assert rotated(q).dtype == dtype


@pytest.mark.parametrize("size", [16, 64, 128, 256])
def test_it_spreads_one_channel_and_all(size):
    matrix = hadamard(size, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))
    alike = torch.ones(size) @ matrix  # without the signs of its rows all would meet in one channel, of sqrt(size)
    assert alike.abs().amax() <= 2**0.5 + 1e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("centered", [False, True])
def test_a_bound_of_its_amax(size, centered):
    x = gaussian(2, 3, 40, size)
    x[0, 0, 0, 0] = torch.nan
    center = gaussian(2, 3, 1, size, seed=1) if centered else None
    exact = amax(rotated(x - center if centered else x))
    assert exact <= rotated_amax(x, center) * (1 + 1e-6) < 8 * exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [24, 64, 96, 128, 256])
@pytest.mark.parametrize("keys", [None, 0, 1])
def test_the_cast(size, keys, dtype):
    x = gaussian(2, 70, 3, 2 * size, dtype=dtype)[..., size:]
    center = None if keys is None else x.float().mean(keys, keepdim=True).to(dtype)
    values = rotated(x.float() if center is None else x.float() - center.float())
    data, peaks = ours.cast_rotated(x, center, torch.tensor(20.0), E4M3)
    assert data.is_contiguous() and sqnr(values, data.float() / 20) > 30
    torch.testing.assert_close(peaks.max(), amax(values), rtol=1e-2, atol=0)


def test_what_is_not_finite():
    """A non-finite value spoils its own row only, and counts as infinite for the amax; finite values saturate."""
    x = gaussian(1, 3, 2, 64, dtype=torch.bfloat16)
    x[0, 0, 0, 5], x[0, 1, 1, 6] = torch.nan, torch.inf
    data, peaks = ours.cast_rotated(x, None, torch.tensor(1e6), E4M3)
    bad = data.float().isnan()
    assert bad[0, 0, 0].all() and bad[0, 1, 1].all() and bad.sum() == 128 and peaks.max() == torch.inf
    assert (data.float()[~bad].abs() == 448).float().mean() > 0.9


@pytest.mark.parametrize("centered", [False, True])
def test_opcheck(centered, monkeypatch):
    allclose = torch.allclose  # which cannot compare FP8
    monkeypatch.setattr(torch, "allclose", lambda *ts, **k: allclose(*(t.view(torch.uint8) if t.dtype == E4M3 else t for t in ts), **k))
    x = gaussian(2, 5, 3, 64, dtype=torch.bfloat16)
    torch.library.opcheck(ours.cast_rotated.default, (x, x[:, :1] if centered else None, torch.tensor(2.0), E4M3))


KERNEL = """
    import torch
    from te_dynamo.lowering.fp8 import FP8_MAX
    from te_dynamo.lowering.kernels.cast_rotated import _empty, _reference, launch
    from tests.numerics import sqnr

    torch.manual_seed(0)
    FP8_MAX[torch.float32] = 448.0  # memory of float32: the interpreter rounds to FP8 otherwise than hardware
    shapes = [(2, 9, 3, 128), (1, 70, 2, 64), (3, 5, 1, 96), (2, 3, 2, 16), (1, 4, 2, 80), (1, 3, 2, 24), (0, 3, 2, 64)]
    for a, b, heads, size in shapes:
        for dtype in (torch.bfloat16, torch.float16):
            x = torch.randn(a, b, heads, 2 * size).to(dtype)[..., :size]
            for center in (None, x.float().mean(1, keepdim=True).to(dtype), x.float().sum(0, keepdim=True).to(dtype)):
                (found, peak), (expected, peaks) = made = [_empty(x, torch.float32) for _ in range(2)]
                launch(x, center, torch.tensor(150.0), *made[0])
                _reference(x, center, torch.tensor(150.0), *made[1])
                if not x.numel():
                    continue
                if dtype == torch.bfloat16 and center is None:
                    assert torch.allclose(found, expected, 1e-5, 1e-3) and torch.allclose(peak.max(), peaks.max(), 1e-5)
                else:  # the interpreter cuts float32 to bfloat16 instead of rounding
                    assert sqnr(expected, found) > 40 and torch.allclose(peak.max(), peaks.max(), 1e-2)
"""


def test_the_kernel(interpreter):
    interpreter(KERNEL)
