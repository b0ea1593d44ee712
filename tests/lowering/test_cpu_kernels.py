"""The C++ of linears on a CPU against the definitions: `lowering/fp8.py`, and products in float64."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor import codecache
from torch._inductor.cpu_vec_isa import invalid_vec_isa
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from te_dynamo.lowering import fp8, packed
from te_dynamo.lowering.cpu import linears as cpu
from te_dynamo.lowering.cpu.library import ANY, DOT_PRODUCTS, TILES, library
from te_dynamo.lowering.cpu.library import compiled as compiled_kernels
from te_dynamo.lowering.fp8 import E4M3, E5M2, casting_of
from te_dynamo.lowering.opaque import forward_results
from te_dynamo.recipe import DelayedScaling, Float8CurrentScaling, Recipe
from tests import calls

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = (0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-38, 3e38, 448.0, 464.0, 2.0**-10, 2.0**-6, 57344.0, 61440.0, 2.0**-17)
OPS = torch.ops.te_dynamo
shapes = st.tuples(st.integers(0, 70), st.integers(1, 70))


@pytest.fixture(autouse=True)
def compiled() -> None:
    if library() is None:
        pytest.skip("no compiler")


@st.composite
def matrices(draw: Any, special: bool = True, like: Any = shapes) -> Tensor:
    """Matrices of any dtype, values and strides."""
    rows, columns = draw(like)
    torch.manual_seed(draw(st.integers(0, 1000)))
    whole = torch.randn(2 * rows, columns + 3) * 2.0 ** draw(st.integers(-12, 12))
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=6)) if special else ():
        if whole.numel():
            whole.view(-1)[torch.randint(whole.numel(), (3,))] = value
    whole = whole.to(draw(st.sampled_from(DTYPES)))
    how = draw(st.sampled_from(("contiguous", "rows", "columns", "transposed")))
    if how == "rows":
        return whole[::2, :columns]
    if how == "columns":
        return whole.t().contiguous().t()[:rows, :columns]
    return whole[:rows, :columns] if how == "transposed" else whole[:rows, :columns].contiguous()


def forward(x: Tensor, weights: list[Tensor], recipe: Recipe, scales: Tensor | None = None, biases: Any = None, **how: Any) -> Any:
    """(the call, outputs, FP8 of x, all scales, amaxes)"""
    delayed, biases = recipe.stateful, biases or [None] * len(weights)
    call = calls.linears_call("native", [x, weights, biases], recipe=recipe, records=delayed, calibrating=delayed, **how)
    needs = [True] * (1 + len(weights)) + [False] * len(weights)
    outputs, saved, amaxes = forward_results(OPS.site_fwd(call.key, [x, *weights, *biases], scales, 0, needs))
    return call, outputs, saved[0].data, saved[0].scale, amaxes


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise equal, except for the bits of a NaN."""
    a, b = a.float(), b.float()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num().view(torch.int32), b.nan_to_num().view(torch.int32))


def quantized(x: Tensor, scale: Tensor, dtype: torch.dtype, recipe: Recipe) -> Tensor:
    return casting_of(recipe.key).saturated(x, scale, dtype).to(dtype)


@given(matrices(), st.floats(2.0**-8, 2.0**8, width=32), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_cast_of_an_input_under_a_known_scale(x, scale, like_te):
    recipe = DelayedScaling(like_te=like_te)
    _, _, x8, scales, amaxes = forward(x, [torch.ones(1, x.shape[1])], recipe, torch.tensor([scale, 1.0]))
    assert same(x8, quantized(x, torch.tensor(scale), E4M3, recipe))
    assert scales[0] == 1 / torch.tensor(scale)
    assert torch.equal(amaxes[0], fp8.amax(x)) and amaxes[1] == 1


@given(matrices(), st.floats(2.0**-8, 2.0**8, width=32), st.sampled_from(("HYBRID", "E4M3")))
@settings(max_examples=150, deadline=None)
def test_the_cast_of_a_gradient(g, scale, fp8_format):
    """Multiplied by one."""
    recipe = DelayedScaling(fp8_format=fp8_format)
    one, x = torch.eye(g.shape[1]), torch.zeros(g.shape[0], g.shape[1])
    call, _, _, scales, _ = forward(x, [one], recipe, torch.ones(2), out_dtype=g.dtype)
    saved = [None, None, None, None, scales, None]
    amax, dx = OPS.site_bwd(call.key, [None, one, None], saved, [g], torch.tensor([scale]), 0, [True, False, False])
    value = torch.tensor(scale)
    expected = fp8.dequantize(quantized(g, value, E5M2 if fp8_format == "HYBRID" else E4M3, recipe), value.reciprocal())
    finite = expected.isfinite().all(-1)
    assert torch.equal(dx[finite], expected[finite]) and not dx[~finite].isfinite().all(-1).any()
    assert torch.equal(amax[0], fp8.amax(g))


@given(matrices(), matrices(like=st.tuples(st.integers(1, 40), st.just(1))), st.booleans(), st.sampled_from((0.0, 2.0**-3)))
@settings(max_examples=100, deadline=None)
def test_scales_of_an_own_amax(x, w, power_of_2, epsilon):
    recipes: list[Recipe] = [
        Float8CurrentScaling(power_2_scale=power_of_2, amax_epsilon=epsilon),
        DelayedScaling(margin=None if power_of_2 else 1),
    ]
    for recipe in recipes:
        casting = casting_of(recipe.key)
        w_all = w.expand(-1, x.shape[1])
        _, _, _, scales, _ = forward(x, [w_all], recipe, torch.tensor([0.0, -0.0]) if recipe.stateful else None)
        of_x, of_w = (casting.scale_of(fp8.amax(t), role, gradient=False) for t, role in ((x, "input"), (w, "weight")))
        assert torch.equal(scales, torch.stack([of_x.reciprocal(), of_w, of_w.reciprocal()]))


@given(matrices(), st.sampled_from(((False, 0), (True, 0), (True, 2))))
@settings(max_examples=60, deadline=None)
def test_weights_that_are_kept(w, form):
    merged, interleave = form
    weights = [w[: w.shape[0] // 2 * 2], w[: w.shape[0] // 2 * 2] * 2]
    how = {"merged": merged, "interleave": interleave, "recipe": Float8CurrentScaling()}
    made = calls.quantized_weights("native:cpu", weights, **how)
    expected = calls.quantized_weights("reference", weights, **how)
    for a, b in zip(made, expected, strict=True):
        assert same(a.data, b.data) and torch.equal(a.scale_inv, b.scale_inv)


@given(matrices(like=st.tuples(st.integers(1, 40), st.integers(1, 40))), st.booleans())
@settings(max_examples=40, deadline=None)
def test_fake_results_lie_as_real_ones(x, across):
    """For any strides of the operands; also for quantized weights, whose fakes torch's own operators compute."""

    def described(values: Any) -> Any:
        return [(t.shape, t.stride(), t.dtype) for t in values]

    w = torch.randn(x.shape[1], 8, dtype=x.dtype).t() if across else torch.randn(8, x.shape[1], dtype=x.dtype)
    g = torch.randn(8, x.shape[0], dtype=x.dtype).t()
    call, _, x8, scales, _ = forward(x, [w], DelayedScaling())
    arguments = [(call.key, [x, w, None], None, 0, [True, True, False])]
    arguments.append((call.key, [None, w, None], [x8, None, None, None, scales, None], [g], None, 0, [True, True, False]))
    kept = calls.quantized_weights("native:cpu", [w])[0]
    for op, passed in zip((OPS.site_fwd, OPS.site_bwd), arguments, strict=True):
        real = described(op(*passed))
        with FakeTensorMode() as mode:
            fakes = tree_map_only(Tensor, mode.from_tensor, passed)
            assert described(op(*fakes)) == real
    with FakeTensorMode() as mode:
        assert described(calls.quantized_weights("native:cpu", [mode.from_tensor(w)])[0][:2]) == described(kept[:2])


VECTORS = ("x86-64-v3", "x86-64") if platform.machine() == "x86_64" else ()


@pytest.fixture(params=[ANY, DOT_PRODUCTS, TILES, *VECTORS])
def instructions(request: Any, monkeypatch: Any) -> Iterator[None]:
    """Each kind of multiplication instruction that this processor has, and vectors of other widths than its own."""
    if isinstance(request.param, str):
        if not hasattr(torch._inductor.config.cpp, "march"):
            pytest.skip("torch 2.11 compiles for the processor it runs on alone")
        monkeypatch.setattr(codecache, "pick_vec_isa", lambda: invalid_vec_isa)
        with torch._inductor.config.patch({"cpp.march": request.param}):
            other = compiled_kernels()
        for module in (cpu, packed):
            monkeypatch.setattr(module, "library", lambda: other)
        assert other.te_use_instructions(TILES) == ANY
        yield
        return
    best = library().te_use_instructions(TILES)
    if request.param > best or (request.param == TILES and not torch.cpu._init_amx()):
        pytest.skip("this processor does not have them")
    library().te_use_instructions(request.param)
    yield
    library().te_use_instructions(best if torch.cpu._init_amx() else min(best, DOT_PRODUCTS))


def near(value: Tensor, a: Tensor, b: Tensor, bias: float = 0.0) -> None:
    """`value` is a @ b + bias up to the rounding errors of a float32 sum, and of the cast to its dtype."""
    exact, size = a.double() @ b.double() + bias, a.double().abs() @ b.double().abs()
    unit = torch.finfo(value.dtype).eps
    assert ((value.double() - exact).abs() <= size * 2.0**-20 + exact.abs() * unit).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_of_an_activation_s_inputs(instructions, dtype):
    """Bitwise equal, with vectors of any width."""
    torch.manual_seed(0)
    for v in (torch.randn(9, 131, dtype=dtype)[:, :130], torch.randn(3, 256, dtype=dtype)):
        found, expected = torch.ops.te_dynamo.pack_kept(v), packed.pack(v)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))
        assert torch.equal(torch.ops.te_dynamo.unpack_kept(*found, dtype), packed.unpack(*expected, dtype))


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 33, 31), (64, 32, 96), (40, 1100, 70), (1030, 130, 520)])
@pytest.mark.parametrize("form", [(False, 0), (True, 0), (True, 5)])
def test_products(instructions, out, size, form):
    """The three GEMMs of several linears are the sums of products of the FP8 values; and the gradients of biases."""
    tokens, k, n = size
    merged, interleave = form
    n = -(-n // 5) * 5
    torch.manual_seed(0)
    x, weights = torch.randn(tokens, k), [torch.randn(n, k), torch.randn(n, k)]
    biases = [torch.full((n,), 1.25, dtype=torch.float16)] * 2
    how = {"merged": merged, "interleave": interleave, "out_dtype": out, "biases": biases}
    call, ys, x8, scales, _ = forward(x, weights, Float8CurrentScaling(), **how)
    xq = x8.double() * scales[0]
    joined = calls.quantized_weights("reference", weights, merged=merged, interleave=interleave, recipe=Float8CurrentScaling())
    wqs = [w.data.double() * w.scale_inv for w in joined]
    for y, wq in zip(ys, wqs, strict=True):
        near(y, xq, wq.t(), 1.25)
    grads = [torch.randn_like(y) for y in ys]
    saved = [x8, None, None, None, scales, None]
    _, dx, dw0, dw1, db1 = OPS.site_bwd(call.key, [None, *weights, None, None], saved, grads, None, 0, [True] * 3 + [False, True])
    gqs = []
    for g in grads:
        scale = casting_of(call.recipe).scale_of(fp8.amax(g), "grad_output", gradient=True)
        gqs.append(quantized(g, scale, E5M2, call.scaling).double() * scale.reciprocal())
    near(dx, torch.cat(gqs, 1), torch.cat(wqs))
    apart = cpu.GemmRows.of(call.attributes)
    for number, gemm in enumerate(apart.gemms()):
        for member, i in enumerate(gemm):
            near((dw0, dw1)[i], apart.rows(gqs[number].t(), member, len(gemm)), xq)
            if i == 1:
                near(db1.unsqueeze(1), apart.rows(grads[number].t(), member, len(gemm)), torch.ones(tokens, 1))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(7, 70), (64, 128), (130, 300)])
def test_few_tokens_give_what_many_do(instructions, tokens, shape):
    """With kept weights, biases, and NaN in the same places."""
    torch.manual_seed(0)
    n, k = shape
    x, w, b = torch.randn(8, k), torch.randn(n, k), torch.randn(n)
    w[3, 5], x[1, 1] = torch.nan, torch.inf
    scales = torch.tensor([20.0, 1.0])
    kept = calls.quantized_weights("native:cpu", [w])

    def run(rows: Tensor) -> Tensor:
        call = calls.linears_call("native", [rows, [], [b]], sizes=(n,), cached="inference", calibrating=True)
        return OPS.site_fwd(call.key, [rows, b, *kept[0]], scales, 0, [False, False])[2]

    torch.testing.assert_close(run(x[:tokens]), run(x)[:tokens], equal_nan=True)
    assert run(x[:tokens])[:, 3].isnan().all() and run(x[:1])[:, :3].isfinite().all()


def test_results_do_not_depend_on_threads():
    torch.manual_seed(0)
    x, w, b, g = torch.randn(300, 700), torch.randn(500, 700), torch.randn(500), torch.randn(300, 500)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            call, ys, x8, scales, amaxes = forward(x, [w], DelayedScaling(), biases=[b])
            back = OPS.site_bwd(call.key, [None, w, None], [x8, None, None, None, scales, None], [g], None, 0, [True] * 3)
            found.append([*ys, x8.float(), scales, amaxes, *back])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_without_a_compiler_torch_computes_the_same(monkeypatch):
    torch.manual_seed(0)
    x, w, g = torch.randn(40, 64), torch.randn(48, 64), torch.randn(40, 48)

    def run() -> list[Tensor]:
        call, ys, x8, scales, amaxes = forward(x, [w], DelayedScaling())
        back = OPS.site_bwd(call.key, [None, w, None], [x8, None, None, None, scales, None], [g], None, 0, [True, True, False])
        return [*ys, x8.float(), scales, amaxes, *back]

    compiled = run()
    monkeypatch.setattr(cpu, "library", lambda: None)
    for a, b in zip(compiled, run(), strict=True):
        torch.testing.assert_close(a, b)


def test_ranks_agree_on_a_first_scale_elsewhere():
    """An unset slot is +0 if ranks share it, -0 if this rank runs alone: C++ only handles the latter."""
    x, w = torch.randn(8, 32), torch.randn(16, 32)
    call = calls.linears_call("native", [x, [w], [None]], records=True, calibrating=True, amax_group="0")
    made = cpu.CPULinears()
    for slots, done in (([0.0, 1.0], False), ([1.0, 0.0], False), ([-0.0, -0.0], True), ([1.0, 1.0], True)):
        assert (made.packed_forward(call, [x, w, None], torch.tensor(slots), 0, [True, True, False]) is not None) is done
    kept, x8 = torch.ones(3), x.to(E4M3)
    for slots, done in (([0.0], False), ([-0.0], True), ([2.0], True)):
        saved = [x8, None, None, None, kept, None]
        result = made.packed_backward(call, [None, w, None], saved, [torch.randn(8, 16)], torch.tensor(slots), 0, [True, True, False])
        assert (result is not None) is done
