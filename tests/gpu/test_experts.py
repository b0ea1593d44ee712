"""Experts on the device: the kernels against their definitions, and the grouped FP8 GEMM in all three products: torch's, or TE's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_dynamo.lowering.kernels import cast_matrices, transpose_rows
from te_dynamo.lowering.te import grouped
from tests.gpu.device import DEVICE, no_te
from tests.gpu.helpers import compiled, random, sites_of
from tests.gpu.test_kernels import same
from tests.numerics import sqnr

pytestmark = pytest.mark.gpu
E, N, K = 4, 256, 128
E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(("data", "transposed"), [(True, True), (False, True)])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("scale", [None, 3.7])
@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("shape", [(3, 40, 300), (2, 1, 5), (2, 128, 4096)])
def test_cast_matrices(
    shape: tuple[int, ...], power_of_2: bool, scale: float | None, by_columns: bool, data: bool, transposed: bool
) -> None:
    x = random(*shape)
    x[0, 0, 0], x[1, -1, 1], x[1, 0] = torch.inf, torch.nan, 0
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if by_columns else x
    given = (None if scale is None else torch.tensor(scale), E4M3, power_of_2, data, transposed)
    *expected, peaks = cast_matrices._reference(x.cpu(), *given)
    on_device = (None if scale is None else torch.tensor(scale, device=DEVICE), *given[1:])
    *found, measured = torch.ops.te_dynamo.cast_matrices(x, *on_device)
    assert all(same(a.cpu(), b) for a, b in zip(found[:2], expected[:2], strict=True))
    torch.testing.assert_close(found[2].cpu(), expected[2], rtol=0, atol=0, equal_nan=True)
    assert measured.max().item() == peaks.max()


@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize(("tokens", "columns", "places"), [(5, 7, 40), (300, 200, 528), (1024, 4096, 2048)])
def test_transpose_rows(tokens: int, columns: int, places: int, multiplied: bool) -> None:
    x, rows = random(tokens, columns).to(E4M3), torch.randint(-1, tokens, (places,), dtype=torch.int32)
    factor = torch.exp2(-torch.randint(0, 12, (places,)).float()) if multiplied else None
    found = torch.ops.te_dynamo.transpose_rows(x, rows.to(DEVICE), None if factor is None else factor.to(DEVICE))
    assert same(found.cpu(), transpose_rows._reference(x.cpu(), rows, factor))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(E, N, K) * 0.02)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.weight.transpose(-2, -1), offs=offsets)


@pytest.mark.parametrize("recipe", ["delayed", "current", "rowwise"])
@pytest.mark.parametrize("sizes", [[64, 64, 64, 64], [5, 0, 300, 19], [0, 0, 0, 17]], ids=str)
def test_the_three_products(recipe: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    provider = "native" if torch.cuda.get_device_capability(DEVICE)[0] == 9 else "te"
    if provider == "te" and (reason := no_te() or grouped.why_not(DEVICE)) is not None:
        pytest.skip(f"torch's grouped FP8 GEMM is for Hopper; {reason}")
    if provider == "te" and recipe == "rowwise":
        pytest.skip("Transformer Engine has no row-wise scales")
    least = 26 if provider == "native" else 22  # dB: gradients by row in E4M3, or in E5M2
    monkeypatch.setattr("te_dynamo.lowering.cost.not_worth_it", lambda *_, **__: None)
    model, used = Experts(), sum(sizes)
    x, grad = random(used + 3, K), random(used + 3, N, seed=2)
    x[used:], grad[used:] = torch.nan, torch.nan
    x.requires_grad_()
    offsets = torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)
    run, found = compiled(model, provider=provider, recipe=recipe), list[Any]()

    def step() -> None:
        y = run(x, offsets)
        found[:] = [y, *torch.autograd.grad(y, (x, model.weight), grad)]

    (site,) = sites_of(step)
    assert (site.kind, site.provider) == ("grouped_linear", provider)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()  # reads nothing back to the host
    finally:
        torch.cuda.set_sync_debug_mode("default")
    y, dx, dw = found
    for e, (a, b) in enumerate(pairwise([0, *offsets.tolist()])):
        rows, weight, g = x[a:b].double(), model.weight[e].double(), grad[a:b].double()
        if b > a:
            assert sqnr(rows @ weight.t(), y[a:b]) > 26 and sqnr(g @ weight, dx[a:b]) > least and sqnr(g.t() @ rows, dw[e]) > least
        else:
            assert (dw[e] == 0).all()
