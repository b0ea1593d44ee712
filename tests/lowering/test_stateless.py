"""Linears with the stateless recipes: against the theoretical error of their formats, and the operators that compute them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.compilers import nop
from torch.utils.flop_counter import FlopCounterMode

from te_dynamo.backend import te_fp8
from te_dynamo.ir import op_named
from te_dynamo.lowering import registry
from te_dynamo.lowering.call import flattened
from te_dynamo.lowering.fine_grained import OPERANDS, operands_of
from te_dynamo.lowering.quantized import Quantized
from te_dynamo.lowering.registry import Case
from te_dynamo.recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Float8RowwiseScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
    from_key,
)
from tests import calls
from tests.numerics import sqnr

CPU = torch.device("cpu")
LINEARS = op_named("linears")


def unavailable(provider: str, recipe: Recipe, device: torch.device = CPU) -> str | None:
    return registry.why_not(LINEARS, recipe, provider, device)


RECIPES = {
    "rowwise": Float8RowwiseScaling(),
    "rowwise hybrid": Float8RowwiseScaling(fp8_format="HYBRID", power_2_scale=False),
    "rowwise with wgrad in high precision": Float8RowwiseScaling(high_precision_wgrad=True),
    "block": Float8BlockScaling(),
    "block without powers of 2": Float8BlockScaling(power_2_scale=False),
    "block with a gradient in 2 dimensions": Float8BlockScaling(w_block_scaling_dim=1, grad_block_scaling_dim=2),
    "mxfp8": MXFP8BlockScaling(),
    "mxfp8 in 2 dimensions": MXFP8BlockScaling(fp8_format="HYBRID", enable_2d_quantization=True),
    "nvfp4": NVFP4BlockScaling(),
    "nvfp4 plain": NVFP4BlockScaling(disable_rht=True, disable_stochastic_rounding=True, disable_2d_quantization=True),
}
PROVIDERS = [(name, kind) for name, recipe in RECIPES.items() for kind in ("reference", "native") if not unavailable(kind, recipe)]


@pytest.fixture
def linears():
    """A function that runs linears with a provider and a recipe."""

    def call(kind: str, recipe: str, x, weights, biases, *, merged=False, interleave=0, out_dtype=None):
        options = {"merged": merged, "interleave": interleave, "out_dtype": out_dtype}
        ys = calls.linears(kind, x, weights, biases, recipe=RECIPES[recipe], **options)
        assert len(ys) == len(weights)  # and no amax
        return ys

    return call


# --- the error in theory

FORMATS = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0), "e2m1": (1, 0, 6.0)}  # bits of mantissa, least exponent, largest


def noise(t: Tensor, format: str, block: tuple[int, int], power_of_2: str = "", stochastic: bool = False) -> float:
    """Noise-to-signal ratio of a matrix quantized along its rows, in float64. block: rows x columns per scale, 0 for all;
    power_of_2: the scale is rounded "down", or its inverse "up", to a power of two; both keep the largest value in range."""
    mantissa, least, top = FORMATS[format]
    r, c = (size or whole for size, whole in zip(block, t.shape, strict=True))
    blocks = t.reshape(t.shape[0] // r, r, t.shape[1] // c, c)
    step = blocks.abs().amax((1, 3), keepdim=True) / top
    if power_of_2:
        step = torch.exp2(torch.ceil(torch.log2(step)))
    if format == "e2m1":  # its scales are E4M3, with 3 bits of mantissa, and a second-level scale maps the largest to 448
        unit = t.abs().max() / 448 / 6
        exponent = torch.floor(torch.log2(step / unit))
        step = torch.round(step / unit / torch.exp2(exponent - 3)) * torch.exp2(exponent - 3) * unit
    scaled = (blocks / step).clamp(-top, top)
    ulp = torch.exp2(torch.floor(torch.log2(scaled.abs().clamp(min=1e-300))).clamp(min=least) - mantissa)
    if stochastic:  # the variance of a choice between neighbors
        part = scaled / ulp - torch.floor(scaled / ulp)
        error = part * (1 - part) * ulp**2 * step**2 + (scaled * step - blocks) ** 2
    else:
        error = (torch.round(scaled / ulp) * ulp * step - blocks) ** 2
    return (error.sum() / blocks.square().sum()).item()


HADAMARD = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(16)] for i in range(16)], dtype=torch.float64) / 4
HADAMARD *= torch.tensor([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])[:, None]
ROW, TENSOR = (1, 0), (0, 0)
# (x, w) of forward, (g, w.T) of dgrad, (g.T, x.T) of wgrad; None: in high precision
THEORY = {
    "rowwise": [(("e4m3", ROW, "up"), ("e4m3", ROW, "up"))] * 3,
    "rowwise hybrid": [(("e4m3", ROW), ("e4m3", ROW)), (("e5m2", ROW), ("e4m3", ROW)), (("e5m2", ROW), ("e4m3", ROW))],
    "rowwise with wgrad in high precision": [
        (("e4m3", ROW, "up"), ("e4m3", ROW, "up")),
        (("e4m3", ROW, "up"), ("e4m3", TENSOR, "up")),
        None,
    ],
    "block": [(("e4m3", (1, 128), "up"), ("e4m3", (128, 128), "up"))] * 2 + [(("e4m3", (1, 128), "up"),) * 2],
    "block without powers of 2": [(("e4m3", (1, 128)), ("e4m3", (128, 128)))] * 2 + [(("e4m3", (1, 128)),) * 2],
    "mxfp8": [(("e4m3", (1, 32), "up"),) * 2] * 3,
    "mxfp8 in 2 dimensions": [
        (("e4m3", (1, 32), "up"), ("e4m3", (32, 32), "up")),
        (("e5m2", (1, 32), "up"), ("e4m3", (32, 32), "up")),
        (("e5m2", (1, 32), "up"), ("e4m3", (1, 32), "up")),
    ],
    "nvfp4": [
        (("e2m1", (1, 16)), ("e2m1", (16, 16))),
        (("e2m1", (1, 16), "", True), ("e2m1", (16, 16))),
        (("e2m1", (1, 16), "", True), ("e2m1", (1, 16))),
    ],
    "nvfp4 plain": [(("e2m1", (1, 16)),) * 2] * 3,
}


def exact(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, w, g = (t.detach().double() for t in (x, w, g))
    return x @ w.T, g @ w, g.T @ x


def draw(distribution: str) -> Tensor:
    t = torch.randn(1024, 1024)
    return torch.where(torch.rand_like(t) < 0.001, 50 * t, t) if distribution == "outlier" else t


CASES = [(*p, "gaussian") for p in PROVIDERS if p[0] in THEORY] + [(name, "reference", "outlier") for name in ("rowwise", "mxfp8", "nvfp4")]


@pytest.mark.parametrize(("recipe", "kind", "distribution"), CASES)
def test_errors_are_those_of_the_formats(linears, recipe, kind, distribution):
    torch.manual_seed(0)
    x, w, g = (draw(distribution) for _ in range(3))
    x.requires_grad_()
    w.requires_grad_()
    (y,) = linears(kind, recipe, x, [w], [None])
    results = (y, *torch.autograd.grad(y, (x, w), g))
    xd, wd, gd = (t.detach().double() for t in (x, w, g))
    operands = ((xd, wd), (gd, wd.T), (gd.T, xd.T))
    for name, theory, pair, value, truth in zip(("y", "dx", "dw"), THEORY[recipe], operands, results, exact(x, w, g), strict=True):
        found = sqnr(truth, value)
        if theory is None:
            assert found > 100
            continue
        if recipe == "nvfp4" and name == "dw":
            pair = tuple((t.unflatten(1, (-1, 16)) @ HADAMARD).flatten(1) for t in pair)
        expected = -10 * math.log10(sum(noise(t, *how) for t, how in zip(pair, theory, strict=True)))
        # among outliers a few products carry most of the noise
        assert abs(found - expected) < (0.5 if distribution == "gaussian" else 1), (name, found, expected)


# --- layouts, dtypes, needs


def three(linears, kind, recipe, merged, interleave, dtype=torch.bfloat16, tokens=40):
    """Three linears of one input, and their gradients."""
    torch.manual_seed(0)
    x = torch.randn(2, tokens // 2, 64, dtype=dtype, requires_grad=True)
    weights = [torch.randn(32, 64, dtype=dtype).mul_(0.1).requires_grad_() for _ in range(3)]
    biases = [torch.randn(32, dtype=dtype, requires_grad=True) if i != 1 else None for i in range(3)]
    ys = linears(kind, recipe, x, weights, biases, merged=merged, interleave=interleave)
    ys = [y.flatten(-2) if interleave else y for y in ys]
    gs = [torch.randn(2, tokens // 2, 32, dtype=dtype) for _ in ys]
    inputs = [x, *weights, biases[0], biases[2]]
    grads = torch.autograd.grad(ys, inputs, gs)
    truth = [
        torch.nn.functional.linear(x.float(), w.float(), None if b is None else b.float()) for w, b in zip(weights, biases, strict=True)
    ]
    return ys, truth, grads, torch.autograd.grad(truth, inputs, [g.float() for g in gs])


@pytest.mark.parametrize(("merged", "interleave"), [(False, 0), (True, 0), (True, 16)])
@pytest.mark.parametrize(("recipe", "kind"), PROVIDERS)
def test_linears_of_one_input(linears, recipe, kind, merged, interleave):
    ys, truth, grads, true_grads = three(linears, kind, recipe, merged, interleave)
    floor = 13 if "nvfp4" in recipe else 22
    for y, e in zip((*ys, *grads), (*truth, *true_grads), strict=True):
        assert y.dtype == torch.bfloat16 and y.shape == e.shape and sqnr(e, y) > floor


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise with wgrad in high precision", "mxfp8"])
def test_merging_changes_nothing_where_rows_are_scaled_apart(linears, recipe):
    for kind in ("reference", "native"):
        if unavailable(kind, RECIPES[recipe]):
            continue
        apart, merged, mixed = (three(linears, kind, recipe, *how) for how in ((False, 0), (True, 0), (True, 16)))
        for other in (merged, mixed):
            for a, b in zip(apart[0], other[0], strict=True):
                torch.testing.assert_close(a, b)
            for a, b in zip(apart[2][1:], other[2][1:], strict=True):  # dgrad sums over N, so its scales are of the merged weight
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise hybrid"])
def test_native_is_the_definition(linears, recipe):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tokens in (2, 38):
            here, there = (three(linears, kind, recipe, True, 0, dtype, tokens) for kind in ("reference", "native"))
            for a, b in zip((*here[0], *here[2]), (*there[0], *there[2]), strict=True):
                torch.testing.assert_close(
                    a, b, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=2e-2 if dtype == torch.bfloat16 else 1e-2
                )


def test_one_rounding_to_the_output(linears):
    """bfloat16 inputs have the outputs and gradients of float32 inputs with the same values, rounded."""
    torch.manual_seed(0)
    x, w, g = (torch.randn(48, 48).bfloat16() for _ in range(3))
    bias = torch.randn(48).bfloat16()
    outcomes = []
    for dtype in (torch.float32, torch.bfloat16):
        xs, ws, bs = (t.to(dtype).requires_grad_() for t in (x, w, bias))
        (y,) = linears("reference", "block", xs, [ws], [bs])
        outcomes.append([y, *torch.autograd.grad(y, (xs, ws, bs), g.to(dtype))])
    for wide, narrow in zip(*outcomes, strict=True):
        assert torch.equal(wide.bfloat16(), narrow)


@pytest.mark.parametrize("recipe", RECIPES)
def test_mixed_dtypes(linears, recipe):
    x = torch.randn(16, 32, dtype=torch.float16, requires_grad=True)
    w, b = torch.randn(48, 32, requires_grad=True), torch.randn(48, requires_grad=True)
    (y,) = linears("reference", recipe, x, [w], [b], out_dtype=torch.bfloat16)
    grads = torch.autograd.grad(y, (x, w, b), torch.ones_like(y))
    assert y.dtype == torch.bfloat16 and [t.dtype for t in grads] == [torch.float16, torch.float32, torch.float32]
    assert sqnr(x.float() @ w.T + b, y) > 13


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize(("recipe", "kind"), PROVIDERS)
def test_few_tokens(linears, recipe, kind, tokens):
    x, w, b = torch.randn(tokens, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True), torch.randn(16, requires_grad=True)
    (y,) = linears(kind, recipe, x, [w], [b])
    dx, dw, db = torch.autograd.grad(y, (x, w, b), torch.ones_like(y))
    assert y.shape == (tokens, 16) and dx.shape == x.shape and dw.shape == w.shape
    assert torch.equal(db, torch.full((16,), float(tokens)))
    assert torch.equal(dw, torch.zeros_like(w)) if tokens == 0 else sqnr(x.expand(16, 32), dw) > 10


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise with wgrad in high precision", "mxfp8"])
def test_what_is_not_needed_is_not_computed(linears, recipe):
    torch.manual_seed(0)
    x, weights, g = torch.randn(32, 32), [torch.randn(32, 32) for _ in range(2)], torch.randn(32, 32)

    def gradients(merged: bool, *needed: int) -> dict[int, Tensor]:
        inputs = [t.clone().requires_grad_(i in needed) for i, t in enumerate((x, *weights))]
        ys = linears("reference", recipe, inputs[0], inputs[1:], [None, None], merged=merged)
        return dict(zip(needed, torch.autograd.grad(ys, [inputs[i] for i in needed], [g, g]), strict=True))

    for merged in (False, True):
        everything = gradients(merged, 0, 1, 2)
        for needed in ((0,), (1,), (2,), (0, 2)):
            for i, grad in gradients(merged, *needed).items():
                assert torch.equal(grad, everything[i])


BYTES = {"rowwise": 1, "rowwise with wgrad in high precision": 4, "block": 1 + 4 / 128, "mxfp8": 1 + 1 / 32, "nvfp4": 0.5 + 4 / 16}


@pytest.mark.parametrize(("recipe", "bytes_per_element"), BYTES.items())
@pytest.mark.parametrize("frozen", [False, True])
def test_the_input_is_saved_once_as_wgrad_reads_it(linears, recipe, bytes_per_element, frozen):
    x, w = torch.randn(512, 256, requires_grad=True), torch.randn(64, 256, requires_grad=not frozen)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linears("reference", recipe, x, [w], [None])
    size = sum(t.nbytes for t in saved if t is not w)
    assert size == 0 if frozen else abs(size / x.numel() - bytes_per_element) < 0.01


@pytest.mark.parametrize(("recipe", "kind"), PROVIDERS)
def test_inference_gives_what_training_gives(linears, recipe, kind):
    torch.manual_seed(0)
    x = torch.randn(3, 20, 64, dtype=torch.bfloat16)
    weights = [torch.randn(32, 64, dtype=torch.bfloat16) for _ in range(3)]
    for merged, interleave in ((False, 0), (True, 0), (True, 16)):
        how = {"merged": merged, "interleave": interleave, "recipe": RECIPES[recipe]}
        ys = calls.inference(kind, x, calls.quantized_weights(kind, weights, **how), [None] * 3, sizes=(32, 32, 32), **how)
        expected = linears(kind, recipe, x, weights, [None] * 3, merged=merged, interleave=interleave)
        assert all(torch.equal(a, b) for a, b in zip(ys, expected, strict=True))


@pytest.mark.parametrize(("recipe", "kind"), PROVIDERS)
def test_nan_is_not_lost(linears, recipe, kind):
    x, w = torch.randn(4, 32), torch.randn(16, 32)
    x[1, 3] = float("nan")
    (y,) = linears(kind, recipe, x, [w], [None])
    assert y[1].isnan().all() and y.isfinite().all(1).tolist() == [True, False, True, True]


def test_compiled(linears):
    """In one graph; what is saved depends on what needs gradients."""
    torch.manual_seed(0)
    x, w = torch.randn(20, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    for recipe, kind in PROVIDERS:
        if recipe == "nvfp4":
            continue  # draws at random

        def f(x, w, recipe=recipe, kind=kind):
            return linears(kind, recipe, x, [w], [None])[0].sin().sum()

        compiled = aot_function(f, nop)
        for frozen in (False, True):
            inputs = (x, w.detach() if frozen else w)
            wanted = inputs[: 1 if frozen else 2]
            for a, b in zip(torch.autograd.grad(compiled(*inputs), wanted), torch.autograd.grad(f(*inputs), wanted), strict=True):
                assert torch.equal(a, b)


# --- the table of recipes


def test_every_stateless_recipe_has_its_operands():
    for recipe in RECIPES.values():
        assert operands_of(recipe) == operands_of(from_key(recipe.key))
    assert {type(r) for r in RECIPES.values()} == set(OPERANDS)
    for recipe in (DelayedScaling(), Float8CurrentScaling()):
        with pytest.raises(KeyError):
            operands_of(recipe)


def test_where_native_is_available():
    meta = torch.device("meta")
    for name, recipe in RECIPES.items():
        assert unavailable("reference", recipe, meta) is None
        reason = unavailable("native", recipe)
        assert reason is None if "rowwise" in name else "torch._scaled_mm" in reason
    recipe = RECIPES["rowwise"]
    assert "meta" in unavailable("native", recipe, meta)

    def unsupported(device: str, k: int, n: int, dtype: torch.dtype) -> str | None:
        case = Case(LINEARS, {"weights": [torch.empty(n, k)]}, {"out_dtype": dtype}, recipe, torch.device(device), trains=True)
        return registry.find(LINEARS, "native", recipe, torch.device(device)).unsupported(case)

    assert unsupported("cpu", 7, 5, torch.float32) is None
    assert "in_features 7" in unsupported("cuda", 7, 16, torch.float32)
    assert "float64" in unsupported("cpu", 16, 16, torch.float64)


# --- the operators


def samples(count=2):
    """Linears with `count` weights; if there are two, the last is not trained, and their input has 3 dimensions."""
    torch.manual_seed(0)
    rows = (2, 8) if count == 2 else (16,)
    x, weights, biases = torch.randn(*rows, 32), [torch.randn(16, 32) for _ in range(count)], [torch.randn(16), None][:count]
    grads = [torch.randn(*rows, 16) for _ in weights]
    ops, some = torch.ops.te_dynamo, [True, True, False, True, False] if count == 2 else [True] * 3
    needs, nothing = [True, *(True for _ in weights), *(b is not None for b in biases)], [None] * count
    found = {}
    for name in ("rowwise", "rowwise with wgrad in high precision", "block", "mxfp8", "nvfp4 plain"):
        how, kind = {"recipe": RECIPES[name]}, "native" if "rowwise" in name else "reference"
        wgrad = operands_of(RECIPES[name]).wgrad.b
        saved = Quantized() if wgrad is None else wgrad.quantize(x.reshape(16, 32).t())
        call = calls.linears_call(kind, [x, weights, biases], out_dtype=torch.bfloat16, **how)
        served = calls.linears_call(kind, [x, [], biases], sizes=(16,) * count, cached="inference", **how)
        quantized = flattened(calls.quantized_weights(kind, weights, **how))
        read = [x if wgrad is None else None, *weights, *nothing]
        found |= {
            f"fwd {name}": (ops.site_fwd, (call.key, [x, *weights, *biases], None, 0, needs)),
            f"bwd {name}": (ops.site_bwd, (call.key, read, flattened([saved]), grads, None, 0, some)),
            f"inference {name}": (ops.site_fwd, (served.key, [x, *biases, *quantized], None, 0, [False] * (1 + count))),
        }
    merged = calls.linears_call("reference", [x, weights, nothing], recipe=RECIPES["mxfp8"], merged=True, interleave=8)
    apart = calls.linears_call("reference", [x, weights, nothing], recipe=RECIPES["mxfp8"])
    found |= {
        "fwd without": (ops.site_fwd, (merged.key, [x, *weights, *nothing], None, 0, [False] * len(needs))),
        "bwd without": (
            ops.site_bwd,
            (apart.key, [None, *weights, *nothing], flattened([Quantized()]), grads, None, 0, [True] + [False] * (len(needs) - 1)),
        ),
    }
    return found


@pytest.mark.parametrize("name", samples())
def test_opcheck(name, monkeypatch):
    # opcheck compares an operator's arguments before and after it; torch.allclose cannot compare FP8
    allclose = torch.allclose

    def bits(t: Tensor) -> Tensor:
        return t.view(torch.uint8) if t.dtype.itemsize == 1 else t

    monkeypatch.setattr(torch, "allclose", lambda a, b, **k: allclose(bits(a), bits(b), **k))
    # With symbolic shapes, blocks take seconds for each weight, and for each dimension of the input that is not its own symbol. The number
    # of weights and dimensions only matters to the operator, whatever the recipe.
    op, args = samples(2 if "rowwise" in name else 1)[name]
    torch.library.opcheck(op.default, args)


def test_flops_are_the_gemms():
    values = samples()
    one = 2 * 16 * 32 * 16  # tokens, in, out
    for name, gemms in (("fwd block", 2), ("bwd block", 3), ("bwd without", 2), ("inference block", 2)):
        op, args = values[name]
        with FlopCounterMode(display=False) as counter:
            op(*args)
        counted = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
        assert counted[f"te_dynamo.{op.default.name().partition('::')[2]}"] == gemms * one, name


def test_by_rows_on_a_gpu_is_traced_and_gives_the_same(no_codegen, monkeypatch):
    """On a GPU, running operator by operator would cost more than the GEMMs gain. Traced on a CPU, the result is the opaque operators'."""
    rowwise = Float8RowwiseScaling()
    on_gpu, here = (registry.find(LINEARS, "native", rowwise, torch.device(device)) for device in ("cuda", "cpu"))
    assert not on_gpu.opaque and here.opaque and isinstance(on_gpu, type(here))

    def results() -> list[Tensor]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
        model, x = nn.Sequential(model), torch.randn(40, 64, requires_grad=True)
        y = torch.compile(model, backend=te_fp8, options={"recipe": rowwise, "include_logits": True})(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in model.parameters())]

    opaque = results()
    monkeypatch.setattr(type(here), "opaque", False)
    for one, other in zip(opaque, results(), strict=True):
        assert torch.equal(one, other)
