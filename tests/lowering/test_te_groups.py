"""Experts on a Blackwell by Transformer Engine's grouped GEMM, on NVIDIA's Python package with a stand-in for its C++ layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import te_dynamo
from te_dynamo.backend import observing, te_fp8
from te_dynamo.ir import op_named
from te_dynamo.lowering import registry
from te_dynamo.lowering.call import Call, spec_of
from te_dynamo.lowering.compute import scales_of
from te_dynamo.lowering.group_rows import Groups
from te_dynamo.lowering.grouped import PerTensorGroups
from te_dynamo.lowering.per_tensor import defined_mm
from te_dynamo.lowering.registry import Backward, Case, Forward
from te_dynamo.lowering.te import grouped, library
from te_dynamo.lowering.te.grouped import TEGroups, te_grouped_gemm
from te_dynamo.recipe import DelayedScaling, Float8CurrentScaling, Recipe
from tests import te_on_cpu
from tests.lowering.test_native_groups import NEEDS, E, K, N, errors, made, run
from tests.numerics import sqnr
from tests.test_experts import Experts

CPU = torch.device("cpu")
HOPPER, BLACKWELL = (9, 0), (10, 0)
SIZES = [[16, 16, 16, 16], [64, 0, 0, 0], [0, 1, 40, 19], [5, 0, 300, 0]]


@pytest.fixture(autouse=True)
def te() -> Iterator[Any]:
    """TE, on a Blackwell where results, and rows in no group, are NaN until they are written."""
    if (reason := te_on_cpu.missing()) is not None:
        pytest.skip(reason)
    module = te_on_cpu.install()
    torch._dynamo.reset()
    with te_on_cpu.pretended(BLACKWELL), pytest.MonkeyPatch.context() as patch:
        empty = grouped._empty
        patch.setattr(grouped, "_empty", lambda *given: empty(*given).fill_(torch.nan))
        yield module
    grouped._why_not.cache_clear()


@pytest.mark.parametrize("recipe", [DelayedScaling(), Float8CurrentScaling()], ids=["delayed", "current"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_all_three_products_are_the_definition_s(recipe: Recipe, sizes: list[int]) -> None:
    inputs, grad = made(sizes)
    ours, defined = (run(recipe, inputs, grad, i, calibrating=True) for i in (TEGroups(), PerTensorGroups(defined_mm)))
    used = sum(sizes)
    for a, b in zip((*ours[0].outputs, *ours[1].gradients[:2]), (*defined[0].outputs, *defined[1].gradients[:2]), strict=True):
        a, b = (t[:used] if t.dim() == 2 else t for t in (a, b))
        assert sqnr(b, a) > 45  # one rounding to bf16
    for mine, theirs in zip(ours, defined, strict=True):
        assert [t.amax().item() for t in mine.amaxes] == [t.amax().item() for t in theirs.amaxes]
    assert all(found > 23 for found in errors(inputs, grad, ours))


@pytest.mark.parametrize("garbage", [torch.nan, 1e30])
def test_rows_of_no_expert_are_not_read(garbage: float) -> None:
    inputs, grad = made([5, 0, 40, 19])
    clean = run(Float8CurrentScaling(), inputs, grad, TEGroups())
    inputs[0][-3:], grad[-3:] = garbage, garbage
    dirty = run(Float8CurrentScaling(), inputs, grad, TEGroups())
    for a, b in zip((*clean[0].outputs, *clean[1].gradients[:2]), (*dirty[0].outputs, *dirty[1].gradients[:2]), strict=True):
        assert torch.equal(a[:64] if a.dim() == 2 else a, b[:64] if b.dim() == 2 else b)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), after=st.integers(0, 20))
def test_rows_that_are_spread_out_are_found_again(sizes: list[int], after: int) -> None:
    groups = Groups(torch.tensor(sizes).cumsum(0).to(torch.int32), sum(sizes) + after)
    x = torch.arange(1.0, groups.tokens + 1).unsqueeze(1)
    wide = groups.spread_out(x)
    assert torch.equal(wide[groups.place_of_row][: sum(sizes)], x[: sum(sizes)])
    assert torch.equal(wide.sum(), x[: sum(sizes)].sum())  # and zeros in between


def test_an_overflow_is_seen_by_its_expert() -> None:
    inputs, grad = made([8, 8, 8, 8], after=0)
    grad[9, 2] = torch.inf
    dx, dw, _ = run(Float8CurrentScaling(), inputs, grad, TEGroups())[1].gradients
    assert not dx[9].isfinite().any() and dx[:8].isfinite().all()
    assert not dw[1, 2].isfinite().any() and dw[[0, 2, 3]].isfinite().all()


def test_the_gradient_lies_as_the_weight_does() -> None:
    inputs, grad = made([16, 4, 32, 12])
    straight = run(Float8CurrentScaling(), inputs, grad, TEGroups())[1].gradients[1]
    inputs[1] = inputs[1].transpose(1, 2).contiguous().transpose(1, 2)
    turned = run(Float8CurrentScaling(), inputs, grad, TEGroups(), attributes={"inputs_first": True})[1].gradients[1]
    assert turned.stride() == inputs[1].stride() and torch.equal(straight, turned)


def test_backward_makes_again_what_is_not_kept() -> None:
    inputs, grad = made([16, 4, 32, 12])
    kept = run(Float8CurrentScaling(), inputs, grad, TEGroups())
    remade = run(Float8CurrentScaling(), inputs, grad, TEGroups(), remakes=("input", "weights"))
    assert kept[0].saved[1].data is not None and remade[0].saved[1].data is None
    assert all(torch.equal(a[:64], b[:64]) for a, b in zip(kept[1].gradients[:2], remade[1].gradients[:2], strict=True))


@pytest.mark.parametrize("cached", ["inference", "training"])
def test_weights_that_are_kept(cached: str) -> None:
    inputs, grad = made([16, 0, 32, 16])
    recipe, implementation = Float8CurrentScaling(), TEGroups()
    expected, _ = run(recipe, inputs, grad, implementation)
    attributes = {"out_dtype": torch.bfloat16, "in_features": K, "inputs_first": False}
    call = Call("grouped_linear", "te", "cpu", spec_of(tuple(inputs)), recipe=recipe.key, attributes=attributes, cached=cached)
    kept = implementation.quantize_weights(call, [inputs[1]])
    given = [inputs[0], kept, inputs[2]] if cached == "inference" else [*inputs, kept]
    done = implementation.forward(call, given, scales_of(call, None), [False] * 3 if cached == "inference" else NEEDS)
    assert torch.equal(done.outputs[0][:64], expected.outputs[0][:64])
    if cached == "training":
        gradients = implementation.backward(call, inputs, done.saved, [grad], scales_of(call, None), NEEDS).gradients
        assert min(errors(inputs, grad, (done, Backward(gradients, [])))) > 23 and kept[0].amax == inputs[1].abs().max()


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The operator and its arguments, by layout."""
    ends, one, fp8 = torch.tensor([16, 48], dtype=torch.int32), torch.tensor(0.5), torch.float8_e4m3fn
    rows, other, weight = (torch.randn(*s).to(fp8) for s in ((64, 32), (64, 48), (2, 48, 32)))
    operands = {"TN": (rows, weight), "NN": (other, weight), "NT": (other, rows)}
    op, rest = torch.ops.te_dynamo.te_grouped_gemm, (one, one, ends)
    return {f"te_grouped_gemm, {layout}": (op, (a, b, *rest, layout, torch.bfloat16, False)) for layout, (a, b) in operands.items()}


@pytest.mark.parametrize("layout", ["TN", "NN", "NT"])
def test_opcheck(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allclose, fp8 = torch.allclose, torch.float8_e4m3fn  # opcheck compares arguments with it
    monkeypatch.setattr(torch, "allclose", lambda *ts, **k: allclose(*(t.view(torch.uint8) if t.dtype == fp8 else t for t in ts), **k))
    monkeypatch.setattr(grouped, "_empty", lambda *given: _zeros(*given))
    op, arguments = samples()[f"te_grouped_gemm, {layout}"]
    torch.library.opcheck(te_grouped_gemm, arguments)
    with FlopCounterMode(display=False) as counted:
        op(*arguments)
    assert counted.get_total_flops() == 2 * 64 * 48 * 32


def _zeros(a: Tensor, b: Tensor, ends: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    shape = {"TN": (a.shape[0], b.shape[-2]), "NN": (a.shape[0], b.shape[-1]), "NT": (ends.shape[0], a.shape[1], b.shape[-1])}
    return a.new_zeros(shape[layout], dtype=dtype)


# --- where it is, and who is chosen


@pytest.mark.parametrize(
    ("capability", "cublas", "why"),
    [
        ((8, 9), 130400, "this device has 8.9"),
        (HOPPER, 130500, "this device has 9.0"),
        (BLACKWELL, 130200, "needs cuBLASLt 13.3 or newer, this is 13.2"),
        (BLACKWELL, 130300, None),
        ((10, 3), 130400, None),
        ((12, 0), 130400, "this device has 12.0"),
    ],
)
def test_where_the_kernel_is(capability: tuple[int, int], cublas: int, why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped._why_not.cache_clear()
    monkeypatch.setattr(te_on_cpu.device, "CUBLAS_LT", cublas)
    inputs, _ = made([16] * E)
    given = dict(zip(("x", "weight", "offsets"), inputs, strict=True))
    case = Case(op_named("grouped_linear"), given, {"out_dtype": torch.bfloat16}, Float8CurrentScaling(), CPU, trains=True)
    with te_on_cpu.pretended(capability):
        reason = TEGroups().unsupported(case)
        assert TEGroups().suits(CPU) == (why is None)
    assert reason is None if why is None else why in str(reason)


def wrong(*given: Any, **more: Any) -> Any:
    given[2].rowwise_data.zero_()


def failing(*given: Any, **more: Any) -> Any:
    raise RuntimeError("No suitable algorithm found for grouped GEMM\nat line 1")


@pytest.mark.parametrize(("multiply", "why"), [(wrong, "wrong results"), (failing, "No suitable algorithm found for grouped GEMM")])
def test_a_kernel_that_fails_its_trial_is_not_used(multiply: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an untested device and cuBLAS, the experts stay in high precision, with the reason."""
    monkeypatch.setattr(library.api(), "grouped_gemm", multiply)
    grouped._why_not.cache_clear()
    assert why in str(grouped.why_not(CPU)) and "\n" not in str(grouped.why_not(CPU))


@pytest.mark.parametrize(
    ("capability", "with_te", "provider"),
    [(HOPPER, True, "native"), (BLACKWELL, True, "te"), (BLACKWELL, False, "native"), ((8, 9), True, "native")],
    ids=str,
)
def test_who_computes_experts_on_a_gpu(capability: Any, with_te: bool, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernels on a Hopper, TE's on a Blackwell; without either, native says why experts are left in high precision."""
    grouped._why_not.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if not with_te:
        missing = registry.Provider("te", lambda device: "the package transformer_engine is not installed")
        monkeypatch.setitem(registry.PROVIDERS, "te", missing)
    cuda, op, recipe = torch.device("cuda"), op_named("grouped_linear"), DelayedScaling()
    with te_on_cpu.pretended(capability):
        monkeypatch.setattr(grouped, "_tried", lambda device: None)  # it would put tensors on the device
        choice = registry.choose_for(op, recipe, "auto", "native", cuda)
        assert registry.choose_for(op, recipe, "native", "native", cuda).provider == "native"
    assert choice.provider == provider and (choice.reason is not None) == (provider != "native")
    if provider == "native" and capability != HOPPER:
        inputs, _ = made([16] * E)
        given = dict(zip(("x", "weight", "offsets"), inputs, strict=True))
        assert choice.implementation is not None
        reason = choice.implementation.unsupported(Case(op, given, {"out_dtype": torch.bfloat16}, recipe, cuda, trains=True))
        assert "is for Hopper" in str(reason)


# --- in a graph


@pytest.mark.parametrize("recipe", ["delayed", "current"])
@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.inductor)])
def test_a_model_trains_and_infers(recipe: str, inductor: bool, request: pytest.FixtureRequest) -> None:
    if not inductor:
        request.getfixturevalue("no_codegen")
    torch.manual_seed(0)
    experts, sizes = Experts().to(torch.bfloat16), [5, 0, 40, 19]
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32)
    x = torch.randn(67, K).bfloat16().requires_grad_()
    run = torch.compile(experts, backend=te_fp8, fullgraph=True, options={"recipe": recipe, "provider": "te"})
    found: list[Any] = []
    with observing(lambda gm, sites, options: found.extend(sites.taken())):
        for _ in range(3):
            y = run(x, offsets)
            dx, dw = torch.autograd.grad(y[:64].float().square().sum(), (x, experts.weight))
    assert {(site.kind, site.provider) for site in found} == {("grouped_linear", "te")}
    exact = experts(x, offsets)
    truth = torch.autograd.grad(exact[:64].float().square().sum(), (x, experts.weight))
    assert sqnr(exact[:64], y[:64]) > 25 and sqnr(truth[0][:64], dx[:64]) > 20 and sqnr(truth[1], dw) > 20
    assert bool(te_dynamo.scale_state(experts).state_dict()) == (recipe == "delayed")
    with torch.no_grad():
        assert sqnr(exact[:64], run(x, offsets)[:64]) > 25


def test_te_s_own_module_is_as_near_to_the_truth(te: Any) -> None:
    """It has a scale for each expert's rows and weight: its error is within 1.5 dB of ours, with one scale for all experts."""
    from transformer_engine.common.recipe import Float8CurrentScaling as Current

    inputs, grad = made([16, 32, 48, 16], after=0)
    with te_on_cpu.cuda_is_cpu(BLACKWELL):
        theirs = te.GroupedLinear(E, K, N, bias=False, params_dtype=torch.bfloat16)
        with torch.no_grad():
            for e in range(E):
                getattr(theirs, f"weight{e}").copy_(inputs[1][e])
        x = inputs[0].clone().requires_grad_()
        with te.autocast(enabled=True, recipe=Current()):
            y = theirs(x, [16, 32, 48, 16])
        y.backward(grad)
    dw = torch.stack([getattr(theirs, f"weight{e}").grad for e in range(E)])
    assert x.grad is not None
    ours = errors(inputs, grad, run(Float8CurrentScaling(), inputs, grad, TEGroups()))
    their_own = errors(inputs, grad, (Forward([y.detach()], [], []), Backward([x.grad, dw, None], [])))
    assert all(abs(a - b) < 1.5 for a, b in zip(ours, their_own, strict=True)), (ours, their_own)
