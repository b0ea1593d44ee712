"""Experts on a GPU: forward, dgrad and wgrad with torch's grouped FP8 GEMM, replaced here by its definition and its checks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from te_dynamo.ir.op import op_named
from te_dynamo.lowering.call import Call, spec_of
from te_dynamo.lowering.compute import scales_of
from te_dynamo.lowering.fine_grained import defined
from te_dynamo.lowering.group_rows import Groups
from te_dynamo.lowering.grouped import FineGrainedGroups, PerTensorGroups
from te_dynamo.lowering.native.grouped import NativeGroups
from te_dynamo.lowering.per_tensor import defined_mm
from te_dynamo.lowering.quantized import Scale, Scales
from te_dynamo.lowering.registry import Backward, Case, Forward, Implementation
from te_dynamo.recipe import DelayedScaling, Float8CurrentScaling, Float8RowwiseScaling, Recipe
from tests.numerics import sqnr

E, N, K = 4, 48, 64
RECIPES = [Float8CurrentScaling(), Float8RowwiseScaling(), Float8RowwiseScaling(power_2_scale=False)]
NEEDS = [True, True, False]


def scaled_grouped_mm(
    a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, *, offs: Tensor, out_dtype: torch.dtype, use_fast_accum: bool
) -> Tensor:
    """The checks of arguments in torch's GroupedBlas.cpp and of groups in GroupMMCommon.cuh, and what CUTLASS computes."""
    assert a.dtype == b.dtype == torch.float8_e4m3fn and offs.dtype == torch.int32 and out_dtype == torch.bfloat16
    assert a.dim() == 2 and a.stride(1) == 1 < a.stride(0) and b.stride(-2) == 1 < b.stride(-1)  # row-major, column-major
    assert all(size % 16 == 0 for size in (a.shape[1], *b.shape[-2:]))
    assert rows.dtype == columns.dtype == torch.float32 and rows.is_contiguous() and columns.is_contiguous()
    groups = list(pairwise([0, *offs.tolist()]))
    if b.dim() == 3:
        assert len(groups) == b.shape[0] and rows.shape == a.shape[:1] and columns.shape == (b.shape[0], b.shape[2])
        y = torch.full((a.shape[0], b.shape[2]), torch.nan)  # unwritten rows may hold anything
        for e, (start, end) in enumerate(groups):
            y[start:end] = a[start:end].float() @ b[e].float() * rows[start:end, None] * columns[e]
        return y.bfloat16()
    m, n = a.shape[0], b.shape[1]
    assert rows.shape == (len(groups) * m,) and columns.shape == (len(groups) * n,) and groups[-1][1] <= a.shape[1] == b.shape[0]
    assert all(end > start and (end - start) % 16 == 0 for start, end in groups)
    products = [a[:, start:end].float() @ b[start:end].float() for start, end in groups]
    return (torch.stack(products) * rows.view(-1, m, 1) * columns.view(-1, 1, n)).bfloat16()


@pytest.fixture(autouse=True)
def stood_in() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm)
        yield


def made(sizes: list[int], after: int = 3, spread: float = 0.0) -> tuple[list[Tensor], Tensor]:
    """[x, weight, offsets] and the gradient, whose tokens are scaled by exp(spread * a normal variate)."""
    torch.manual_seed(0)
    tokens = sum(sizes) + after
    x, weight = torch.randn(tokens, K).bfloat16(), (torch.randn(E, N, K) * 0.02).bfloat16()
    grad = (torch.randn(tokens, N) * 1e-4 * (spread * torch.randn(tokens, 1)).exp()).bfloat16()
    return [x, weight, torch.tensor(sizes).cumsum(0).to(torch.int32)], grad


def run(
    recipe: Recipe, inputs: list[Tensor], grad: Tensor, implementation: Implementation | None = None, **more: Any
) -> tuple[Forward, Backward]:
    attributes = {"out_dtype": torch.bfloat16, "in_features": K, "inputs_first": False}
    spec = spec_of(tuple(inputs))
    call = Call("grouped_linear", "native", "cuda", spec, recipe=recipe.key, attributes=attributes | more.pop("attributes", {}), **more)
    scales = scales_of(call, None)
    implementation = implementation or NativeGroups()
    done = implementation.forward(call, inputs, scales, NEEDS)
    return done, implementation.backward(call, inputs, done.saved, [grad], scales, NEEDS)


def truth(inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dw) in float64, the first two for rows in groups only."""
    x, weight, offsets = inputs
    groups = list(pairwise([0, *offsets.tolist()]))
    y = [x[a:b].double() @ w.double().t() for (a, b), w in zip(groups, weight, strict=True)]
    dx = [grad[a:b].double() @ w.double() for (a, b), w in zip(groups, weight, strict=True)]
    return torch.cat(y), torch.cat(dx), torch.stack([grad[a:b].double().t() @ x[a:b].double() for a, b in groups])


def errors(inputs: list[Tensor], grad: Tensor, done: tuple[Forward, Backward]) -> list[float]:
    """SQNR in dB of y, dx and dw."""
    used = int(inputs[2][-1])
    (y,), (dx, dw, _) = done[0].outputs, done[1].gradients
    return [sqnr(a, b) for a, b in zip(truth(inputs, grad), (y[:used], dx[:used], dw), strict=True)]


def definition_of(recipe: Recipe) -> Implementation:
    return FineGrainedGroups(defined) if isinstance(recipe, Float8RowwiseScaling) else PerTensorGroups(defined_mm)


@pytest.mark.parametrize("recipe", RECIPES, ids=["current", "rowwise", "rowwise, any scale"])
@pytest.mark.parametrize("sizes", [[16, 16, 16, 16], [64, 0, 0, 0], [0, 1, 40, 19], [5, 0, 300, 0]], ids=str)
def test_all_three_products_are_fp8_s(recipe: Recipe, sizes: list[int]) -> None:
    inputs, grad = made(sizes)
    ours, defined = (errors(inputs, grad, run(recipe, inputs, grad, i)) for i in (None, definition_of(recipe)))
    assert all(27 < found < 31 for found in ours)
    # A row's largest element is exact in E4M3, unless scales are powers of two: that matters in rows of 16.
    less = 1 if getattr(recipe, "power_2_scale", True) else 2
    assert all(a > b - less for a, b in zip(ours, defined, strict=True))  # dB


@pytest.mark.parametrize(("capability", "there"), [((8, 9), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)], ids=str)
def test_where_the_kernel_is(capability: tuple[int, int], there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    inputs, _ = made([16] * E)
    given = dict(zip(("x", "weight", "offsets"), inputs, strict=True))
    case = Case(op_named("grouped_linear"), given, {"out_dtype": torch.bfloat16}, RECIPES[0], torch.device("cuda"), trains=True)
    reason = NativeGroups().unsupported(case)
    assert (reason is None) == there and (there or "Hopper" in str(reason))


@pytest.mark.parametrize("spread", [0.0, 2.0, 4.0])
def test_gradients_in_e4m3_lose_less_than_in_e5m2(spread: float) -> None:
    """Compared with the recipe's definition, also if tokens differ by orders of magnitude; and for each expert."""
    inputs, grad = made([40, 8, 300, 19], spread=spread)
    recipe = Float8CurrentScaling()
    ours, defined = (run(recipe, inputs, grad, i) for i in (None, definition_of(recipe)))
    assert all(a > b + 1 for a, b in zip(errors(inputs, grad, ours)[1:], errors(inputs, grad, defined)[1:], strict=True))
    _, _, dw = truth(inputs, grad)
    assert all(sqnr(w, v) > 27 for w, v in zip(dw, ours[1].gradients[1], strict=True))


def test_a_weight_s_row_of_zeros_has_a_gradient() -> None:
    inputs, grad = made([16, 5, 30, 9])
    inputs[1][:, 3] = 0
    inputs[1][0, 7] *= 2.0**-40
    y, dx, dw = errors(inputs, grad, done := run(Float8RowwiseScaling(), inputs, grad))
    assert min(y, dx, dw) > 27
    _, _, true = truth(inputs, grad)
    assert sqnr(true[:, 3], done[1].gradients[1][:, 3]) > 27 and sqnr(true[0, 7], done[1].gradients[1][0, 7]) > 24


@pytest.mark.parametrize("garbage", [torch.nan, 1e30])
@pytest.mark.parametrize("recipe", RECIPES[:2], ids=["current", "rowwise"])
def test_rows_of_no_expert_are_not_read(recipe: Recipe, garbage: float) -> None:
    inputs, grad = made([5, 0, 40, 19])
    clean = run(recipe, inputs, grad)
    inputs[0][-3:], grad[-3:] = garbage, garbage
    dirty = run(recipe, inputs, grad)
    assert torch.equal(clean[0].outputs[0][:64], dirty[0].outputs[0][:64])
    assert torch.equal(clean[1].gradients[0][:64], dirty[1].gradients[0][:64])
    assert torch.equal(clean[1].gradients[1], dirty[1].gradients[1])
    measured = ([a.amax().item() for part in done for a in part.amaxes] for done in (clean, dirty))
    assert next(measured) == next(measured)


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=["current", "rowwise"])
def test_an_overflow_is_seen_by_its_expert(recipe: Recipe) -> None:
    """A GradScaler looks for non-finite values: an infinite gradient must not be cast to a finite one."""
    inputs, grad = made([8, 8, 8, 8], after=0)
    grad[9, 2] = torch.inf
    dx, dw, _ = run(recipe, inputs, grad)[1].gradients
    assert not dx[9].isfinite().any() and dx[:8].isfinite().all()
    assert not dw[1, 2].isfinite().any() and dw[[0, 2, 3]].isfinite().all()


def test_wgrad_in_high_precision() -> None:
    inputs, grad = made([16, 0, 32, 16])
    (_, _, dw) = errors(inputs, grad, run(Float8RowwiseScaling(high_precision_wgrad=True), inputs, grad))
    assert dw > 40


def test_the_gradient_lies_as_the_weight_does() -> None:
    """[E, K, N] in memory, as in gpt-oss: a gradient with other strides than its weight would be copied."""
    inputs, grad = made([16, 4, 32, 12])
    straight = run(RECIPES[1], inputs, grad)[1].gradients[1]
    inputs[1] = inputs[1].transpose(1, 2).contiguous().transpose(1, 2)
    turned = run(RECIPES[1], inputs, grad, attributes={"inputs_first": True})[1].gradients[1]
    assert turned.stride() == inputs[1].stride() and torch.equal(straight, turned)


def test_scales_of_delayed_scaling() -> None:
    """The slots' scales are used as they are, and amaxes are measured: the gradient's too, although each of its rows has its own scale."""
    inputs, grad = made([16, 16, 16, 16], after=0)
    recipe = DelayedScaling()
    call = Call(
        "grouped_linear",
        "native",
        "cuda",
        spec_of(tuple(inputs)),
        recipe=recipe.key,
        records=True,
        attributes={"out_dtype": torch.bfloat16, "in_features": K, "inputs_first": False},
    )
    known = [Scale(torch.tensor(s), torch.tensor(1 / s)) for s in (64.0, 2048.0)]
    scales = Scales(known, call.operation.roles, scales_of(call, None).casting, calibrating=False)
    implementation = NativeGroups()
    done = implementation.forward(call, inputs, scales, NEEDS)
    x8, w8 = done.saved
    assert x8.scale_inv == 1 / 64 and w8.scale_inv == 1 / 2048
    assert [a.amax().item() for a in done.amaxes] == [inputs[0].abs().max(), inputs[1].abs().max()]
    gradient = Scales([Scale(torch.tensor(1e9), torch.tensor(1e-9))], call.operation.roles, scales.casting, calibrating=False)
    (measured,) = implementation.backward(call, inputs, done.saved, [grad], gradient, NEEDS).amaxes
    assert measured.amax() == grad.abs().max()


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=["current", "rowwise"])
@pytest.mark.parametrize("cached", ["inference", "training"])
def test_weights_that_are_kept(recipe: Recipe, cached: str) -> None:
    inputs, grad = made([16, 0, 32, 16])
    implementation = NativeGroups()
    expected, _ = run(recipe, inputs, grad)
    attributes = {"out_dtype": torch.bfloat16, "in_features": K, "inputs_first": False}
    call = Call("grouped_linear", "native", "cuda", spec_of(tuple(inputs)), recipe=recipe.key, attributes=attributes, cached=cached)
    kept = implementation.quantize_weights(call, [inputs[1]])
    assert (kept[0].transposed is not None) == (cached == "training")
    given = [inputs[0], kept, inputs[2]] if cached == "inference" else [*inputs, kept]
    needs = [False] * 3 if cached == "inference" else NEEDS
    done = implementation.forward(call, given, scales_of(call, None), needs)
    assert torch.equal(done.outputs[0][:64], expected.outputs[0][:64])
    if kept[0].amax is not None:
        assert kept[0].amax == inputs[1].abs().max()
    if cached == "training":
        gradients = implementation.backward(call, inputs, done.saved, [grad], scales_of(call, None), NEEDS).gradients
        assert min(errors(inputs, grad, (done, Backward(gradients, [])))) > 27


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), after=st.integers(0, 20))
def test_where_groups_are_spread_to(sizes: list[int], after: int) -> None:
    """Against a loop: each group begins at a multiple of 16, in order, and has all of its rows."""
    groups = Groups(torch.tensor(sizes).cumsum(0).to(torch.int32), sum(sizes) + after)
    ends, rows, group = groups.spread
    expected, ended, row = [], [], 0
    for size in sizes:
        room = max(16, -(-size // 16) * 16)
        expected += [*range(row, row + size), *[-1] * (room - size)]
        ended.append(len(expected))
        row += size
    assert ends.tolist() == ended and ends.dtype == rows.dtype == torch.int32 and rows.shape[0] % 16 == 0
    assert rows.tolist() == expected + [-1] * (rows.shape[0] - len(expected))
    assert all(ended[g - 1] <= p < ended[g] if g else p < ended[0] for p, g in enumerate(group.tolist()[: ended[-1]]))
    peaks = groups.largest(torch.arange(1.0, sum(sizes) + after + 1))
    assert peaks.tolist() == [sum(sizes[: i + 1]) if size else 0 for i, size in enumerate(sizes)]
