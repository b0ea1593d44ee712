"""Inputs of a dumped script in one-byte float formats, which torch can neither draw nor compare."""

from __future__ import annotations

import pytest
import torch

from te_dynamo.report.dump.inputs import fill

FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.t(), lambda t: t[:1].expand(4, 6)], ids=["plain", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_an_input_in_fp8_can_be_made(dtype, make, known):
    value = make((torch.rand(4, 6) + 1).to(dtype))
    made = eval(fill(value, value if known else None, None))
    assert (made.dtype, made.shape, made.stride()) == (dtype, value.shape, value.stride())
    assert not known or made.float().isfinite().all()
