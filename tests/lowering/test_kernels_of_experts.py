"""The kernels that cast experts' weights plain and transposed, and transpose rows into groups: the definition, and Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import te_dynamo.lowering.kernels.cast_matrices
import te_dynamo.lowering.kernels.transpose_rows  # noqa: F401
from te_dynamo.lowering.fp8 import dequantize, quantize
from te_dynamo.lowering.granularity import Blocks

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8)


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("dtype", FP8)
def test_a_scale_for_each_row(dtype: torch.dtype, power_of_2: bool) -> None:
    """Like `Blocks`, which is tested separately."""
    torch.manual_seed(0)
    x = torch.randn(3, 40, 48) * torch.randn(3, 40, 1).exp()
    x[0, 0, 0], x[1, 2, 3], x[2, 5] = torch.nan, torch.inf, 0
    plain, across, inverse, peaks = torch.ops.te_dynamo.cast_matrices(x, None, dtype, power_of_2, True, True)
    assert torch.equal(bits(across), bits(plain.transpose(1, 2).contiguous())) and peaks.max() == torch.inf
    for e, matrix in enumerate(x):
        expected = Blocks(dtype, 1, None, power_of_2).quantize(matrix)
        zero = (matrix == 0).all(1)
        assert torch.equal(bits(plain[e]), bits(expected.data))
        torch.testing.assert_close(inverse[e], expected.scale_inv.flatten().masked_fill(zero, 0), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(inverse[e] == 0, zero)


@pytest.mark.parametrize("dtype", FP8)
def test_one_scale_for_all(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(3, 48, 40).transpose(1, 2), torch.tensor(3.7)
    plain, across, inverse, peaks = torch.ops.te_dynamo.cast_matrices(x, scale, dtype, False, True, True)
    assert torch.equal(bits(plain), bits(quantize(x.contiguous(), scale, dtype))) and plain.is_contiguous() and across.is_contiguous()
    assert torch.equal(bits(across), bits(plain.transpose(1, 2).contiguous()))
    assert peaks.max() == x.abs().max() and inverse.numel() == 0
    for data, transposed in ((True, False), (False, True)):
        alone = torch.ops.te_dynamo.cast_matrices(x, scale, dtype, False, data, transposed)
        assert [t.numel() for t in alone[:2]] == [data * x.numel(), transposed * x.numel()]
        assert torch.equal(bits(alone[transposed]), bits((plain, across)[transposed])) and torch.equal(alone[3], peaks)


def test_rows_go_where_they_are_told() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 5).to(FP8[0])
    rows = torch.tensor([3, -1, 0, 6, 6, -1], dtype=torch.int32)
    taken = torch.ops.te_dynamo.transpose_rows(x, rows, None).float()
    assert (taken[:, [1, 5]] == 0).all() and torch.equal(taken[:, [0, 2, 3, 4]], x.float()[[3, 0, 6, 6]].t())
    factor = torch.tensor([0.5, torch.nan, 1, 2**-20, 1, 1])
    halved = torch.ops.te_dynamo.transpose_rows(x, rows, factor).float()
    torch.testing.assert_close(halved[:, 0], x.float()[3] / 2, rtol=0, atol=2**-10)  # except for the smallest numbers
    assert (halved[:, [1, 3, 5]] == 0).all() and torch.equal(halved[:, [2, 4]], taken[:, [2, 4]])


@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize(("data", "transposed"), [(True, True), (True, False), (False, True)])
def test_opcheck_of_the_cast(scale: float | None, data: bool, transposed: bool, fp8_allclose: None) -> None:
    given = (torch.randn(2, 16, 40), None if scale is None else torch.tensor(scale), FP8[0], True, data, transposed)
    torch.library.opcheck(torch.ops.te_dynamo.cast_matrices.default, given)


@pytest.mark.parametrize("factor", [None, torch.ones(4)], ids=["", "factor"])
def test_opcheck_of_the_transpose(factor: Tensor | None, fp8_allclose: None) -> None:
    given = (torch.randn(3, 5).to(FP8[0]), torch.tensor([0, 2, -1, 1], dtype=torch.int32), factor)
    torch.library.opcheck(torch.ops.te_dynamo.transpose_rows.default, given)


@pytest.fixture
def fp8_allclose(monkeypatch: pytest.MonkeyPatch) -> None:
    """opcheck compares an operator's arguments before and after it; torch.allclose cannot compare FP8."""
    allclose = torch.allclose
    monkeypatch.setattr(torch, "allclose", lambda a, b, **k: allclose(*(bits(t) if t.dtype in FP8 else t for t in (a, b)), **k))


def test_the_scale_of_a_row_undoes_it() -> None:
    """Independent of the code under test: the dequantized values are within FP8's step of the originals."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 64) * torch.tensor([1e-6, 1e6]).view(2, 1, 1)
    plain, across, inverse, _ = torch.ops.te_dynamo.cast_matrices(x, None, FP8[0], True, True, True)
    assert ((dequantize(plain, inverse.unsqueeze(-1)) - x).abs() <= x.abs() / 16 + x.abs().amax(-1, keepdim=True) * 2**-17).all()
    assert torch.equal(dequantize(across, inverse.unsqueeze(1)), dequantize(plain, inverse.unsqueeze(-1)).transpose(1, 2))
    assert torch.equal(inverse.log2(), inverse.log2().round())


# Values that are exact in FP8, with scales that keep them so: Triton's interpreter loses the carry when it rounds, and a NaN.
KERNELS = """
    import torch
    from te_dynamo.lowering.kernels import cast_matrices as cast, transpose_rows as rows_of

    def same(found, expected):
        numbers = ~expected.float().isnan()
        return found.shape == expected.shape and torch.equal(found.float()[numbers], expected.float()[numbers])

    torch.manual_seed(0)
    dtype = torch.float8_e4m3fn
    for shape in ((2, 40, 300), (2, 1, 5), (0, 4, 4)):
        x = torch.randn(shape).to(dtype).bfloat16()
        if x.numel() > 10:
            x[..., 0] = torch.finfo(dtype).max / 2
            x[0, 0], x[1, -1, 1] = 0, torch.nan
        for source in (x, x.transpose(1, 2).contiguous().transpose(1, 2).float()):
            for scale in (None, torch.tensor(2.0)):
                for wanted in ((True, True), (True, False), (False, True)):
                    made = cast._empty(source, scale, dtype, *wanted)
                    cast.launch(source, scale, True, *made)
                    *expected, peaks = cast._reference(source, scale, dtype, True, *wanted)
                    assert all(map(same, made, expected)), (shape, scale, wanted)
                    assert not peaks.numel() or made[3].max() == peaks.max()
    values = torch.randint(8, 15, (130, 200)).float()
    for tokens, columns, places in ((5, 7, 40), (130, 200, 260), (0, 3, 16)):
        x = values[:tokens, :columns].to(torch.float8_e4m3fn)
        rows = torch.randint(-1, max(tokens, 0), (places,), dtype=torch.int32) if tokens else torch.full((places,), -1, dtype=torch.int32)
        for factor in (None, torch.exp2(-torch.randint(0, 3, (places,)).float())):
            assert same(rows_of.launch(x, rows, factor), rows_of._reference(x, rows, factor)), (tokens, columns)
"""


def test_the_kernels(interpreter) -> None:
    interpreter(KERNELS)
