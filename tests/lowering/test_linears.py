"""FP8 linears against FP8's theoretical error, and the operators that compute them."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from te_dynamo.lowering import site
from te_dynamo.lowering.call import flattened
from te_dynamo.lowering.fp8 import E4M3, amax, row_amax
from te_dynamo.lowering.quantized import Quantized
from te_dynamo.recipe import DelayedScaling
from tests import calls

SIZE = 1024
PROVIDERS = ("reference", "native:cpu", "native:cuda")  # the last is the code that is generated for a GPU, run on a CPU here
FORMATS = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}  # bits of mantissa, least exponent, largest value


def rounded(x: Tensor, name: str) -> Tensor:
    """`x` rounded to an FP8 format with a scale from its own amax: by the format's definition, in float64."""
    mantissa, least, top = FORMATS[name]
    scale = top / x.abs().max()
    scaled = x * scale
    exponent = torch.floor(torch.log2(scaled.abs().clamp(min=1e-300))).clamp(min=least)
    step = torch.exp2(exponent - mantissa)
    return (torch.round(scaled / step) * step).clamp(-top, top) / scale


def sqnr(exact: Tensor, value: Tensor) -> float:
    return 20 * torch.log10(exact.double().norm() / (exact.double() - value.double()).norm()).item()


def draw(distribution: str) -> Tensor:
    x = torch.randn(SIZE, SIZE)
    if distribution == "outlier":
        return torch.where(torch.rand(SIZE, SIZE) < 0.001, 50 * x, x)
    if distribution == "student":
        return torch.distributions.StudentT(3.0).sample((SIZE, SIZE))
    return x


def run(provider: str, x: Tensor, weights, biases, *, first=True, **given):
    return calls.linears(provider, x, weights, biases, records=True, calibrating=first, **given)


@pytest.mark.parametrize("distribution", ["gaussian", "outlier", "student"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_errors_are_those_of_the_formats(provider, distribution):
    torch.manual_seed(0)
    x, w, g = (draw(distribution) for _ in range(3))
    x.requires_grad_()
    w.requires_grad_()
    y, _ = run(provider, x, [w], [None])
    dx, dw = torch.autograd.grad(y, (x, w), g)

    xd, wd, gd = (t.detach().double() for t in (x, w, g))
    x8, w8, g8 = rounded(xd, "e4m3"), rounded(wd, "e4m3"), rounded(gd, "e5m2")
    for name, exact, in_theory, value, gaussian in (
        ("output", xd @ wd.T, x8 @ w8.T, y, 28.5),
        ("input's gradient", gd @ wd, g8 @ w8, dx, 24.6),
        ("weight's gradient", gd.T @ xd, g8.T @ x8, dw, 24.6),
    ):
        found = sqnr(exact, value)
        assert abs(found - sqnr(exact, in_theory)) < 0.5, (name, found, sqnr(exact, in_theory))
        if distribution == "gaussian":
            assert abs(found - gaussian) < 0.5, (name, found)


def three(provider, merged, interleave, tokens=40):
    """Three linears of one input, and their gradients."""
    torch.manual_seed(0)
    x = torch.randn(2, tokens // 2, 64, dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.randn(32, 64, dtype=torch.bfloat16).mul_(0.1).requires_grad_() for _ in range(3)]
    biases = [torch.randn(32, dtype=torch.bfloat16, requires_grad=True) if i != 1 else None for i in range(3)]
    sink = torch.zeros(3, requires_grad=True)
    *ys, seen = run(provider, x, weights, biases, sink=sink, merged=merged, interleave=interleave)
    ys = [y.flatten(-2) if interleave else y for y in ys]
    gs = [torch.randn(2, tokens // 2, 32, dtype=torch.bfloat16) for _ in ys]
    inputs = [x, *weights, biases[0], biases[2]]
    grads = torch.autograd.grad(ys, [*inputs, sink], gs)
    exact = [
        torch.nn.functional.linear(x.float(), w.float(), None if b is None else b.float()) for w, b in zip(weights, biases, strict=True)
    ]
    return ys, exact, grads, torch.autograd.grad(exact, inputs, [g.float() for g in gs]), seen, (x, weights, gs)


@pytest.mark.parametrize(("merged", "interleave"), [(False, 0), (True, 0), (True, 16)])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_linears_of_one_input(provider, merged, interleave):
    ys, exact, grads, exact_grads, seen, (x, weights, gs) = three(provider, merged, interleave)
    for y, e in zip(ys, exact, strict=True):
        assert y.dtype == torch.bfloat16 and sqnr(e, y) > 25
    for grad, e in zip(grads, exact_grads, strict=False):
        assert grad.shape == e.shape and sqnr(e, grad) > 22
    shared = torch.stack([amax(w) for w in weights]).amax().expand(3) if merged else torch.stack([amax(w) for w in weights])
    assert torch.equal(seen, torch.stack([amax(x).expand(3), shared], -1).flatten())
    peaks = torch.stack([amax(g) for g in gs])
    assert torch.equal(grads[-1], peaks.amax().expand(3) if merged else peaks)


@pytest.mark.parametrize("tokens", [16, 38])
def test_the_formulation_for_a_gpu_gives_what_the_cpus_gives(tokens):
    """Its padding, copies and merged weight gradient do not change the results."""
    for merged, interleave in ((False, 0), (True, 0), (True, 16)):
        here, there = (three(p, merged, interleave, tokens) for p in ("native:cpu", "native:cuda"))
        assert torch.equal(here[4], there[4])
        # sums in another order may round differently
        for a, b in zip((*here[0], *here[2]), (*there[0], *there[2]), strict=True):
            torch.testing.assert_close(a, b, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_given_scales_are_used_and_unset_ones_are_not(provider):
    torch.manual_seed(0)
    x, w = torch.randn(32, 64, requires_grad=True), torch.randn(16, 64, requires_grad=True)

    def outputs(scale: Tensor, grad_scale: Tensor, first: bool):
        packed = provider == "native:cpu"
        pair = [(t, 0) if packed else site.unpack(t) for t in (scale, grad_scale)]
        y, _ = run(provider, x, [w], [None], scales=pair[0], grad_scales=pair[1], first=first)
        return y, *torch.autograd.grad(y, (x, w), torch.ones_like(y))

    own = run(provider, x, [w], [None])[0]
    unset = outputs(torch.zeros(2), torch.zeros(1), True)
    assert torch.equal(unset[0], own)
    coarse = outputs(torch.tensor([2.0, 2.0]), torch.tensor([4.0]), False)
    exact = x @ w.T
    assert sqnr(exact, coarse[0]) > 20  # a float format: a coarse scale costs little until it underflows
    clipped = outputs(torch.tensor([4480.0, 2.0]), torch.tensor([4.0]), False)  # x saturates at 0.1
    assert sqnr(exact, clipped[0]) < 5


def test_nan_does_not_count_and_empty_is_zero():
    x = torch.tensor([[1.0, float("nan"), -3.0], [float("nan")] * 3])
    assert row_amax(x).tolist() == [3.0, 0.0]
    assert amax(x) == 3 and amax(torch.tensor(float("nan"))) == 0 and amax(torch.tensor(-2.0)) == 2
    assert amax(torch.empty(0, 3)) == 0 and row_amax(torch.empty(2, 0)).tolist() == [0, 0]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_empty_batch(provider):
    x, w = torch.randn(0, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    y, seen = run(provider, x, [w], [None])
    dx, dw = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    assert y.shape == (0, 16) and dx.shape == x.shape and seen[0] == 0
    assert torch.equal(dw, torch.zeros_like(w))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_inference_gives_what_training_gives(provider):
    torch.manual_seed(0)
    x = torch.randn(3, 20, 64, dtype=torch.bfloat16)
    weights = [torch.randn(32, 64, dtype=torch.bfloat16) for _ in range(3)]
    for merged, interleave in ((False, 0), (True, 0), (True, 16)):
        how = {"merged": merged, "interleave": interleave}
        ys = calls.inference(provider, x, calls.quantized_weights(provider, weights, **how), [None] * 3, sizes=(32, 32, 32), **how)
        *expected, _ = run(provider, x, weights, [None] * 3, **how)
        assert all(torch.equal(a, b) for a, b in zip(ys, expected, strict=True))


def samples():
    torch.manual_seed(0)
    x, weights = torch.randn(2, 8, 32), [torch.randn(16, 32), torch.randn(16, 32)]
    biases, scale = [torch.randn(16), None], torch.ones(6)
    x8 = Quantized(x.reshape(16, 32).to(E4M3), scale=torch.ones(5))
    grads = [torch.randn(2, 8, 16) for _ in weights]
    ops = torch.ops.te_dynamo
    common = {"recipe": DelayedScaling(), "calibrating": True}
    apart = calls.linears_call("native", [x, weights, biases], out_dtype=torch.bfloat16, records=True, **common)
    merged = calls.linears_call("native", [x, weights, [None, None]], merged=True, interleave=8, records=True, **common)
    served = calls.linears_call("native", [x, [], biases], sizes=(16, 16), cached="inference", **common)
    bare = calls.linears_call("native", [x, weights, [None, None]], records=True, **common)
    all_needed, some = [True] * 4 + [False], [True, True, False, True, False]
    quantized = flattened([Quantized(w.to(E4M3), torch.ones(())) for w in weights])
    return {
        "forward": (ops.site_fwd, (apart.key, [x, *weights, *biases], scale, 1, all_needed)),
        "forward merged": (ops.site_fwd, (merged.key, [x, *weights, None, None], None, 0, [False] * 5)),
        "backward": (
            ops.site_bwd,
            (apart.key, [None, *weights, None, None], flattened([x8]), [g.bfloat16() for g in grads], torch.ones(2), 0, some),
        ),
        "backward without": (
            ops.site_bwd,
            (bare.key, [None, *weights, None, None], flattened([x8._replace(data=None)]), grads, None, 0, [True] + [False] * 4),
        ),
        "inference": (ops.site_fwd, (served.key, [x, *biases, *quantized], scale, 0, [False] * 3)),
        "unpack": (ops.unpack, (torch.rand(5),)),
        "largest": (ops.largest, ([torch.rand(3), torch.rand(4), torch.rand(0)], [0, 1, 0, 2])),
        "agreed": (ops.agreed, (torch.rand(()), torch.ones(()), "0")),
        "transpose": (ops.transpose, (x8.data,)),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name, monkeypatch):
    # opcheck compares an operator's arguments before and after it; torch.allclose cannot compare FP8
    allclose = torch.allclose

    def bits(t: Tensor) -> Tensor:
        return t.view(torch.uint8) if t.dtype == E4M3 else t

    monkeypatch.setattr(torch, "allclose", lambda a, b, **k: allclose(bits(a), bits(b), **k))
    op, args = samples()[name]
    torch.library.opcheck(op.default, args)


def test_every_operator_is_checked():
    checked = {op.default.name() for op, _ in samples().values()}
    ours = {"site_fwd", "site_bwd", "unpack", "largest", "agreed", "transpose"}
    assert checked == {f"te_dynamo::{name}" for name in ours}


def test_flops_are_the_gemms():
    values = samples()
    one = 2 * 16 * 32 * 16  # tokens, in, out
    for name, gemms in (("forward", 2), ("backward", 3), ("backward without", 2), ("inference", 2)):
        op, args = values[name]
        with FlopCounterMode(display=False) as counter:
            op(*args)
        counted = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
        assert counted[f"te_dynamo.{op.default.name().partition('::')[2]}"] == gemms * one, name


def test_scalars_taken_apart():
    packed = torch.tensor([2.0, 4.0, 0.5])
    values, inverses = site.unpack(packed)
    assert [v.item() for v in values] == packed.tolist()
    assert [v.item() for v in inverses] == packed.reciprocal().tolist()
    assert all(t.dim() == 0 and t.data_ptr() % 16 == 0 for t in (*values, *inverses))
    packed.zero_()
    assert values[0] == 2


def test_largest_and_transpose():
    parts = [torch.tensor([1.0, 5.0]), torch.tensor([2.0]), torch.empty(0)]
    assert torch.ops.te_dynamo.largest(parts, [1, 0, 0, 2]).tolist() == [2, 5, 5, 0]
    x = torch.randn(5, 7).to(E4M3)
    copy = torch.ops.te_dynamo.transpose(x)
    assert copy.is_contiguous() and torch.equal(copy.float(), x.float().t())
