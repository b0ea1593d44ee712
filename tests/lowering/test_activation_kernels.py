"""The kernels that compute an activation, or its gradient, and write FP8 plain and transposed: the definition, and Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import te_dynamo.lowering.kernels.activation  # noqa: F401
from te_dynamo import ops
from te_dynamo.ir.activation import SPELLINGS
from te_dynamo.lowering.activation import SLOPES, gradients, value
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.fp8 import E4M3, E5M2
from te_dynamo.lowering.kernels.tiles import KeptInputs

NUMBERS = {"alpha": 1.5, "limit": 1.25}
ONE_OF_EACH = ["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu_squared", "mish", "glu", "clamped_swiglu"]


def call_of(spelling: str, gated: bool, dtype: torch.dtype = torch.float32) -> Call:
    attributes = {"spelling": spelling, "out_dtype": dtype, **(NUMBERS if spelling == "clamped_swiglu" else {"alpha": 0.0, "limit": 0.0})}
    return Call("activation", "native", "cuda", (dtype, dtype if gated else None), attributes=attributes)


def cases() -> list[tuple[str, bool]]:
    return [(name, gated) for name in ONE_OF_EACH for gated in (False, True) if gated or SPELLINGS[name].inputs == 1]


def tensors(count: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Views of one buffer, like gate and up."""
    torch.manual_seed(0)
    return list((2 * torch.randn(rows, count * columns)).to(dtype).split(columns, 1))


def test_each_function_has_a_slope():
    assert {s.function for s in SPELLINGS.values()} - {"clamped_swiglu"} == SLOPES.keys()
    assert {SPELLINGS[name].function for name in ONE_OF_EACH} == {s.function for s in SPELLINGS.values()}


@pytest.mark.parametrize(("spelling", "gated"), cases())
def test_gradients_are_those_of_the_definition(spelling, gated):
    x, *up = (t.clone().requires_grad_() for t in tensors(1 + gated, 40, 24))
    call, grad = call_of(spelling, gated), torch.randn(40, 24)
    exact = [t.detach().double().requires_grad_() for t in (x, *up)]
    y = ops.activation(*exact, **{**call.attributes, "out_dtype": torch.float64})
    expected = torch.autograd.grad(y, exact, grad.double())
    assert torch.allclose(value(call, x, *(up or [None])).double(), y, 1e-5, 1e-5)
    for e, f in zip(expected, gradients(call, grad, x, *(up or [None])), strict=False):
        assert torch.allclose(e, f.double(), 1e-4, 1e-5)


@pytest.fixture
def comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    """opcheck compares an operator's arguments before and after it; torch.allclose cannot compare FP8."""
    allclose = torch.allclose
    bits = {E4M3: torch.uint8, E5M2: torch.uint8}
    monkeypatch.setattr(torch, "allclose", lambda a, b, **k: allclose(*(t.view(bits.get(t.dtype, t.dtype)) for t in (a, b)), **k))


ours = torch.ops.te_dynamo.activation


def made(call: Call, inputs: list[Tensor | None]) -> KeptInputs:
    return KeptInputs(*ours(call.key, inputs, [], torch.tensor(2.0), E4M3, False, 16, True, True, True)[3:])


@pytest.mark.usefixtures("comparable")
def test_opcheck():
    x, up = tensors(2, 20, 24)
    call, scale = call_of("silu", True), torch.tensor(2.0)
    for keep in (False, True):
        kept = list(made(call, [x, up]))
        torch.library.opcheck(ours.default, (call.key, [x, up], [], scale, E4M3, False, 16, True, not keep, keep))
        read = ([], kept) if keep else ([x, up], [])
        torch.library.opcheck(ours.default, (call.key, *read, scale, E4M3, False, 16, not keep, True, False))
        given = (call.key, torch.randn(20, 24), *read, scale, E5M2, False, 16, [24, 0], True, True, True)
        torch.library.opcheck(torch.ops.te_dynamo.activation_gradient.default, given)


@pytest.mark.parametrize("columns", [24, 64, 130])
def test_what_is_kept_is_as_near_as_e4m3_comes(columns):
    """There is a scale for each row of a tile, so the error is half an E4M3 step relative to the largest of 64 elements."""
    x, up = tensors(2, 20, columns)
    x[3] *= 1e-6
    x[4] = 0
    kept = made(call_of("silu", True), [x, up])
    assert kept.data.shape == (2, 20, columns) and kept.scale_inv.shape == (2, 20, -(-columns // 64))
    for part, t in enumerate((x, up)):
        whole = kept.part(part)
        for start in range(0, columns, 64):
            exact, found = t[:, start : start + 64], whole[:, start : start + 64]
            bound = torch.maximum(exact.abs() / 16, exact.abs().amax(1, keepdim=True) * 2**-10 / 448 * 1.01)
            assert bool(((found - exact).abs() <= bound).all())
    assert not whole.isnan().any() and not kept.part(0)[4].any()


def test_what_is_not_finite_is_kept_so():
    x = torch.tensor([[float("nan"), 2.0, 1.0], [float("inf"), 2.0, 1.0]])
    nan, infinite = made(call_of("relu", False), [x, None]).part(0)
    assert nan[0].isnan() and nan[1:].tolist() == [2, 1]
    assert not infinite.isfinite().any()


# Triton's interpreter rounds to FP8 differently from hardware: it loses the carry. So the kernels first write to float32, which shows the
# values before rounding, and torch rounds them; then to FP8, with values that are exact in FP8.
KERNEL = """
    import torch
    from te_dynamo.lowering.activation import gradients, value
    from te_dynamo.lowering.fp8 import FP8_MAX, Casting
    from te_dynamo.lowering.kernels.activation import _empty, _empty_gradient, launch, launch_gradient
    from te_dynamo.lowering.kernels.tiles import KeptInputs, fill_both, fill_kept
    from tests.lowering.test_activation_kernels import call_of, cases, tensors

    E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

    def compare(found, expected, dtype, case):
        for name in ("data", "transposed"):
            a, b = (getattr(both, name) for both in (found, expected))
            assert a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-4), (name, case, (a - b).abs().max())
            assert not a.numel() or (a.to(dtype).float() == b.to(dtype).float()).float().mean() > 0.995, (name, case)
        assert torch.allclose(found.amaxes.max(), expected.amaxes.max(), 1e-5), case
        assert torch.allclose(found.sums.sum(0), expected.sums.sum(0), 1e-3, 1e-3), case

    def cast(x, scale, dtype, saturate):
        return Casting(saturates_infinite=saturate).saturated(x, scale, dtype)

    scale = torch.tensor(20.0)
    shapes = [(64, 64), (70, 48), (16, 80), (33, 130), (1, 5)]
    for n, (spelling, gated) in enumerate(cases()):
        for m, (rows, columns) in enumerate(shapes[n % 2 :: 2] if n else shapes):
            dtype = (torch.float32, torch.bfloat16, torch.float16)[(n + m) % 3]
            call, saturate = call_of(spelling, gated, dtype), bool(m % 2)
            x, *up = tensors(1 + gated, rows, columns, dtype)
            up, grad = up[0] if up else None, torch.randn(rows, columns).to(dtype)
            case = (spelling, gated, rows, columns, dtype)
            FP8_MAX[torch.float32] = FP8_MAX[E4M3]
            keep, both = bool((n + m) % 2), ((True, True), (True, False), (False, True))[(n + m) % 3]
            given = [x, up], [], torch.float32, 16, *both, keep
            (found, kept), (expected, by_definition) = _empty(*given), _empty(*given)
            kept = KeptInputs(kept.data.float(), kept.scale_inv)
            launch(call, [x, up], [], scale, found, kept, saturate)
            made = value(call, x, up)
            fill_both(expected, made, cast(made, scale, E4M3, saturate))
            compare(found, expected, E4M3, case)
            fill_kept(by_definition, [t for t in (x, up) if t is not None] if keep else [])
            assert torch.allclose(kept.scale_inv, by_definition.scale_inv, 1e-6, 0), case
            same = kept.data.to(E4M3).float() == by_definition.data.float()
            assert not keep or same.float().mean() > 0.995, case
            read = [x, up], []
            if keep:  # what backward reads is what was kept
                x, up = (*(by_definition.part(i) for i in range(1 + gated)), None)[:2]
                read = [], [by_definition.data.float(), by_definition.scale_inv]
                (again, _), (expected, _) = (_empty(*read, torch.float32, 16, False, True, False) for _ in range(2))
                launch(call, *read, scale, again, KeptInputs(*(torch.empty(0, 0, 0),) * 2), saturate)
                fill_both(expected, value(call, x, up), cast(value(call, x, up), scale, E4M3, saturate))
                compare(again, expected, E4M3, case)
            FP8_MAX[torch.float32] = FP8_MAX[E5M2]
            wanted = [(True, True, True), (True, True, False), (False, True, True)][(n + m) % 3]
            found, expected = (_empty_gradient(grad, 1 + gated, torch.float32, 16, *wanted) for _ in range(2))
            starts = [columns, 0] if n % 2 and gated else [0, columns][: 1 + gated]
            launch_gradient(call, grad, *read, scale, found, saturate, starts)
            whole = torch.cat([g for _, g in sorted(zip(starts, gradients(call, grad, x, up)), key=lambda p: p[0]) if g is not None], 1)
            fill_both(expected, whole, cast(whole, scale, E5M2, saturate))
            compare(found, expected, E5M2, case)
    x, up = (t.to(E5M2).float() for t in tensors(2, 70, 48))
    call, two = call_of("relu", True), torch.tensor(2.0)
    (found, kept), (expected, _) = (_empty([x, up], [], E5M2, 16, True, True, True) for _ in range(2))
    launch(call, [x.sign(), up], [], two, found, kept, False)
    assert torch.equal(kept.part(0), x.sign())
    made = value(call, x.sign(), up)
    fill_both(expected, made, cast(made, two, E5M2, False).to(E5M2))
    assert torch.equal(found.data.float(), expected.data.float()) and torch.equal(found.transposed.float(), expected.transposed.float())
    x = torch.tensor([[float("nan"), float("inf"), 1e6, 1.0]])  # what is not finite, and what is too large
    for saturate in (False, True):
        found, kept = _empty([x], [], torch.float32, 1, True, True, False)
        launch(call_of("relu", False), [x], [], torch.tensor(1.0), found, kept, saturate)
        (nan, infinite, *finite), top = found.data[0].tolist(), FP8_MAX[E5M2]
        assert nan != nan and finite == [top, 1.0] and (infinite == top if saturate else infinite != infinite)
        assert found.amaxes.max() == float("inf")
"""


def test_the_kernels(interpreter):
    interpreter(KERNEL)
