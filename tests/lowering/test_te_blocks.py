"""Blocks of 128 and MXFP8 by Transformer Engine's kernels, on NVIDIA's Python package with a stand-in for its C++ layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from te_dynamo.backend import observing, te_fp8
from te_dynamo.ir import op_named
from te_dynamo.lowering import registry
from te_dynamo.lowering.granularity import MX, Blocks
from te_dynamo.lowering.quantized import Quantized
from te_dynamo.lowering.registry import Case
from te_dynamo.lowering.te.block_linears import BlockLinears
from te_dynamo.recipe import DelayedScaling, Float8BlockScaling, Float8RowwiseScaling, MXFP8BlockScaling, NVFP4BlockScaling, Recipe
from tests import calls as sites
from tests import te_on_cpu
from tests.models import SMALL, output
from tests.numerics import sqnr

CPU = torch.device("cpu")
HOPPER, BLACKWELL = (9, 0), (10, 0)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RECIPES: dict[str, Recipe] = {
    "block": Float8BlockScaling(),
    "block hybrid": Float8BlockScaling(fp8_format="HYBRID", power_2_scale=False, amax_epsilon=1e-3),
    "block with square gradients": Float8BlockScaling(w_block_scaling_dim=1, grad_block_scaling_dim=2),
    "mxfp8": MXFP8BlockScaling(),
    "mxfp8 hybrid with square weights": MXFP8BlockScaling(fp8_format="HYBRID", enable_2d_quantization=True),
}
FORMATS: dict[str, Blocks | MX] = {
    "1 x 128": Blocks(E4M3, 1, 128, power_of_2=True),
    "1 x 128, any scale": Blocks(E5M2, 1, 128, epsilon=0.5),
    "128 x 128": Blocks(E4M3, 128, 128, power_of_2=True),
    "1 x 32": MX(E4M3),
    "1 x 32, E5M2": MX(E5M2),
    "32 x 32": MX(E4M3, rows=32),
}
quantize, gemm = torch.ops.te_dynamo.te_block_quantize, torch.ops.te_dynamo.te_block_gemm


LINEARS = op_named("linears")


def choose_for(recipe: Recipe, requested: str, chosen: str, device: torch.device) -> tuple[str, str | None]:
    registry.load()
    choice = registry.choose_for(LINEARS, recipe, requested, chosen, device)
    return choice.provider, choice.reason


@pytest.fixture(autouse=True)
def te() -> Iterator[Any]:
    """TE, on a device that supports both recipes."""
    reason = te_on_cpu.missing()
    if reason is not None:
        pytest.skip(reason)
    module = te_on_cpu.install()
    torch._dynamo.reset()
    with te_on_cpu.pretended(BLACKWELL):
        yield module


def device_of(recipe: Recipe) -> tuple[int, int]:
    return BLACKWELL if isinstance(recipe, MXFP8BlockScaling) else HOPPER


def bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.itemsize == 1 else t


def arguments(how: Blocks | MX) -> tuple[Any, ...]:
    """`how` as the operator takes it."""
    scales = (how.power_of_2, how.epsilon) if isinstance(how, Blocks) else (True, 0.0)
    return how.dtype, how.columns, how.rows != 1, *scales


def matrix(rows: int = 160, columns: int = 416, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A matrix over six orders of magnitude, with zeros, a NaN and an infinity."""
    torch.manual_seed(0)
    x = torch.randn(rows, columns) * 10 ** torch.empty(rows, columns).uniform_(-3, 3)
    x[:, :32] = 0
    x[0, 40], x[1, 80] = torch.nan, torch.inf
    return x.to(dtype)


def as_defined(data: Tensor, scale_inv: Tensor, how: Blocks | MX, across: bool) -> Quantized:
    """TE's copy in the form of `granularity`: the matrix with the summed dimension last, scales in plain order, without padding."""
    if isinstance(how, MX):
        plain = te_on_cpu.mx.unswizzle(scale_inv.reshape(scale_inv.shape[::-1]) if across else scale_inv)
        data = data.t() if across else data
        scales = plain[: data.shape[0] : how.rows, : data.shape[1] // 32].view(torch.float8_e8m0fnu)
    else:
        down, along = -(-data.shape[0] // how.rows), -(-data.shape[1] // 128)
        scales = (scale_inv if how.rows == 128 else scale_inv.t())[:down, :along]
    return Quantized(data, scales)


# --- the operators


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_a_cast_is_the_definition(name, dtype):
    """Bit for bit: payload and scales of the matrix, and of its transpose."""
    how, x = FORMATS[name], matrix(dtype=dtype)
    made = quantize(x, *arguments(how), True, True)
    for copy, t, across in ((made[:2], x, False), (made[2:], x.t(), True)):
        found, expected = as_defined(*copy, how, across), how.quantize(t)
        kept = ~t.isnan()  # the bits of a NaN do not matter
        assert torch.equal(found.data.float().isnan(), ~kept)
        assert torch.equal(bits(found.data.contiguous())[kept], bits(expected.data)[kept])
        # TE's kernel saturates an infinity, which hides it; by definition its block is NaN.
        visible = ~expected.scale_inv.float().isnan()
        assert (~visible).sum() == isinstance(how, Blocks)
        assert torch.equal(bits(found.scale_inv.contiguous())[visible], bits(expected.scale_inv)[visible])


@pytest.mark.parametrize("name", FORMATS)
def test_a_cast_is_te_s_quantizer(te, name):
    how, x = FORMATS[name], matrix()
    made = quantize(x, *arguments(how), True, True)
    with te_on_cpu.cuda_is_cpu():
        fp8 = te.DType.kFloat8E4M3 if how.dtype == E4M3 else te.DType.kFloat8E5M2
        if isinstance(how, MX):
            quantizer = te.MXFP8Quantizer(fp8, with_2d_quantization=how.rows == 32)
            quantizer.optimize_for_gemm = True
        else:
            scales = {"force_pow_2_scales": how.power_of_2, "amax_epsilon": how.epsilon, "block_scaling_dim": 2 if how.rows == 128 else 1}
            quantizer = te.Float8BlockQuantizer(fp8, rowwise=True, columnwise=True, **scales)
        theirs = quantizer(x)
        copies = [theirs._rowwise_data, theirs._rowwise_scale_inv, theirs._columnwise_data, theirs._columnwise_scale_inv]
    for ours, other in zip(made, copies, strict=True):
        assert ours.shape == other.shape and torch.equal(bits(ours), other)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(160, 416), (32, 32), (512, 128), (0, 64)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_fake_is_what_comes_out(name, shape, wanted):
    how, x = FORMATS[name], torch.randn(shape)
    made = quantize(x, *arguments(how), *wanted)
    both = quantize(x, *arguments(how), True, True)
    with FakeTensorMode() as mode:
        fakes = quantize(mode.from_tensor(x), *arguments(how), *wanted)
    for i, (real, fake) in enumerate(zip(made, fakes, strict=True)):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
        assert torch.equal(bits(real), bits(both[i])) if wanted[i // 2] else real.numel() == 0


# Not two operands in E5M2, nor two with blocks of 128 x 128: no device multiplies them.
PRODUCTS = [
    (a, b)
    for a, how_a in FORMATS.items()
    for b, how_b in FORMATS.items()
    if how_a.columns == how_b.columns and not (how_a.dtype == how_b.dtype == E5M2) and not (how_a.rows == how_b.rows == 128)
]


@pytest.mark.parametrize("layout", ["TN", "NN", "NT"])
@pytest.mark.parametrize(("a", "b"), PRODUCTS)
def test_a_gemm_is_the_product_of_what_was_quantized(a, b, layout):
    """The product of the dequantized operands, whichever copy is used."""
    torch.manual_seed(0)
    how_a, how_b = FORMATS[a], FORMATS[b]
    t, u = torch.randn(64, 160), torch.randn(96, 160)
    exact = how_a.dequantize(how_a.quantize(t), 160).double() @ how_b.dequantize(how_b.quantize(u), 160).double().t()
    a8 = quantize(t.t(), *arguments(how_a), False, True)[2:] if layout[1] == "T" else quantize(t, *arguments(how_a), True, False)[:2]
    b8 = quantize(u, *arguments(how_b), True, False)[:2] if layout[0] == "T" else quantize(u.t(), *arguments(how_b), False, True)[2:]
    how = layout if isinstance(how_a, MX) else "TN"
    for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bias in (None, torch.randn(96).bfloat16()):
            y = gemm(a8[0], b8[0], a8[1], b8[1], how_a.rows != 1, how_b.rows != 1, how, bias, out_dtype, False)
            expected = exact if bias is None else exact + bias.double()
            assert y.dtype == out_dtype
            torch.testing.assert_close(y, expected.to(out_dtype), rtol=2 * torch.finfo(out_dtype).eps, atol=1e-4)


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    torch.manual_seed(0)
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {
        f"te_block_quantize, {name} {which}": (quantize, (torch.randn(96, 64), *arguments(how), *which))
        for name, how in FORMATS.items()
        for which in ((True, True), (False, True))
    }
    x, w = FORMATS["1 x 128"].quantize(torch.randn(64, 128)), FORMATS["128 x 128"].quantize(torch.randn(32, 128))
    scales = (x.scale_inv.t().contiguous(), nn.functional.pad(w.scale_inv, (0, 3)))
    found["te_block_gemm, block"] = (gemm, (x.data, w.data, *scales, False, True, "TN", torch.randn(32).bfloat16(), torch.bfloat16, False))
    g8, x8 = torch.randn(64, 32).to(E5M2), torch.randn(64, 96).to(E4M3)
    g_inv, x_inv = (torch.full((4, 128), 127, dtype=torch.uint8) for _ in range(2))
    found["te_block_gemm, mxfp8"] = (gemm, (g8, x8, g_inv, x_inv, False, False, "NT", None, torch.float32, False))
    return found


@pytest.mark.parametrize("name", samples())
def test_opcheck(name, monkeypatch):
    # opcheck compares an operator's arguments before and after it; torch.allclose cannot compare FP8
    allclose = torch.allclose
    monkeypatch.setattr(torch, "allclose", lambda a, b, **k: allclose(bits(a), bits(b), **k))
    op, args = samples()[name]
    torch.library.opcheck(op.default, args)


def test_flops():
    for name, expected in (("te_block_gemm, block", 2 * 64 * 128 * 32), ("te_block_gemm, mxfp8", 2 * 32 * 64 * 96)):
        op, args = samples()[name]
        with FlopCounterMode(display=False) as counter:
            op(*args)
        assert counter.get_total_flops() == expected


# --- linears


pytestmark = pytest.mark.usefixtures("no_codegen")


def linears(
    provider: str, recipe: Recipe, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], **layout: Any
) -> list[Tensor]:
    """A function that runs linears with a provider and a recipe."""
    ys = sites.linears(provider, x, weights, biases, recipe=recipe, **layout)
    assert len(ys) == len(weights)  # and no amax
    return ys


def compiled(model: Callable[..., Any], recipe: Any, provider: str = "te", **kwargs: Any) -> tuple[Any, list[Any]]:
    """The compiled model, and a list that gets its sites when it is called."""
    sites: list[Any] = []
    call = torch.compile(model, backend=te_fp8, options={"recipe": recipe, "provider": provider}, **kwargs)

    def watched(*args: Any, **inputs: Any) -> Any:
        with observing(lambda gm, found, options: sites.extend(found)):
            return call(*args, **inputs)

    return watched, sites


def three(provider: str, recipe: Recipe, dtype: torch.dtype, tokens: int = 74, **layout: Any) -> list[Tensor]:
    """Three linears of one input, and all gradients."""
    torch.manual_seed(0)
    x = torch.randn(2, tokens // 2, 192, dtype=dtype, requires_grad=True)
    weights = [torch.randn(96, 192, dtype=dtype).mul_(0.1).requires_grad_() for _ in range(3)]
    biases = [torch.randn(96, dtype=dtype, requires_grad=True) if i != 1 else None for i in range(3)]
    ys = linears(provider, recipe, x, weights, biases, **layout)
    gs = [torch.randn(2, tokens // 2, 96, dtype=dtype).reshape(y.shape) for y in ys]
    return [*ys, *torch.autograd.grad(ys, [x, *weights, biases[0], biases[2]], gs)]


def assert_one_rounding(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal to one rounding of the dtype, up to the order in which float32 sums."""
    for a, b in zip(found, expected, strict=True):
        sums = 256 * torch.finfo(torch.float32).eps * b[b.isfinite()].abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=torch.finfo(b.dtype).eps, atol=sums, equal_nan=True)


@pytest.mark.parametrize(("merged", "interleave"), [(False, 0), (True, 0), (True, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RECIPES)
def test_linears_of_one_input_are_the_definition(name, dtype, merged, interleave):
    layout = {"merged": merged, "interleave": interleave}
    with te_on_cpu.pretended(device_of(RECIPES[name])):
        found = three("te", RECIPES[name], dtype, **layout)
    assert_one_rounding(found, three("reference", RECIPES[name], dtype, **layout))


@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("name", ["block", "mxfp8"])
def test_any_number_of_tokens(name, tokens):
    """Tokens are padded for the GEMMs; the padding is not visible."""
    outcomes = []
    for provider in ("te", "reference"):
        torch.manual_seed(0)
        x, w, b = (torch.randn(s, requires_grad=True) for s in ((tokens, 64), (32, 64), (32,)))
        (y,) = linears(provider, RECIPES[name], x, [w], [b])
        outcomes.append([y, *torch.autograd.grad(y, (x, w, b), torch.randn_like(y))])
    assert_one_rounding(*outcomes)


@pytest.mark.parametrize("name", ["block", "mxfp8"])
def test_what_is_not_needed_is_not_computed(name):
    torch.manual_seed(0)
    x, weights, g = torch.randn(32, 32), [torch.randn(32, 32) for _ in range(2)], torch.randn(32, 32)

    def gradients(merged: bool, *needed: int) -> tuple[dict[int, Tensor], int]:
        inputs = [t.clone().requires_grad_(i in needed) for i, t in enumerate((x, *weights))]
        with FlopCounterMode(display=False) as counter:
            ys = linears("te", RECIPES[name], inputs[0], inputs[1:], [None, None], merged=merged)
            grads = torch.autograd.grad(ys, [inputs[i] for i in needed], [g, g])
        return dict(zip(needed, grads, strict=True)), counter.get_total_flops() // (2 * 32**3)

    for merged in (False, True):
        everything, gemms = gradients(merged, 0, 1, 2)
        assert gemms == 6  # of the size of one linear's
        for needed, fewer in (((0,), 4), ((1,), 4 if merged else 3), ((0, 2), 6 if merged else 5)):
            some, gemms = gradients(merged, *needed)
            assert gemms == fewer and all(torch.equal(some[i], everything[i]) for i in needed)


class Calls(TorchDispatchMode):
    """Counts the calls of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "te_dynamo":
            self.count[func.name().partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ["block", "mxfp8"])
def test_each_tensor_is_quantized_once(name, merged):
    """For three linears: the input, and each weight and gradient of a GEMM, plain and transposed in one kernel."""
    gemms = 1 if merged else 3
    with Calls() as calls:
        three("te", RECIPES[name], torch.bfloat16, merged=merged)
    assert calls.count == {"te_block_quantize": 1 + 2 * gemms, "te_block_gemm": 3 * gemms}


@pytest.mark.parametrize("name", ["block", "mxfp8"])
def test_activation_checkpointing_changes_nothing(name):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)), torch.randn(64, 64)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    outcomes = []
    for function in (model, checkpointed):
        torch._dynamo.reset()
        call, sites = compiled(function, name, fullgraph=True)
        y = call(x)
        outcomes.append([y, *torch.autograd.grad(y.sin().sum(), list(model.parameters()))])
        assert [s.provider for s in sites if "linear" in s.kind] == ["te", "te"]
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize(("name", "scale"), [("block", 4 / 128), ("mxfp8", 1 / 32)])
@pytest.mark.parametrize("needed", ["x", "w", "both"])
def test_what_backward_keeps(name, scale, needed):
    """The column-wise copies of the input and of the weight, and nothing in high precision; also in the compiled graph."""
    x, model = torch.randn(512, 256, requires_grad=needed != "w"), nn.Linear(256, 128, bias=False)
    w = model.weight.requires_grad_(needed != "x")
    call, sites = compiled(model, name)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(x)
    assert [s.provider for s in sites] == ["te"]
    elements = (x.numel() if needed != "x" else 0) + (w.numel() if needed != "w" else 0)
    size = sum(t.nbytes for t in saved if isinstance(t, Tensor) and t is not w and t is not x)
    per_element = size / elements - 1
    assert 0 <= per_element < 2 * scale  # square blocks have fewer scales, padded to four


@pytest.mark.parametrize("name", RECIPES)
def test_inference_gives_what_training_gives(name):
    torch.manual_seed(0)
    x, weights = torch.randn(3, 21, 64, dtype=torch.bfloat16), [torch.randn(32, 64, dtype=torch.bfloat16) for _ in range(3)]
    biases = [torch.randn(32, dtype=torch.bfloat16) for _ in range(3)]
    for merged, interleave in ((False, 0), (True, 0), (True, 16)):
        how = {"recipe": RECIPES[name], "merged": merged, "interleave": interleave}
        ys = sites.inference("te", x, sites.quantized_weights("te", weights, **how), biases, sizes=(32, 32, 32), **how)
        expected = linears("te", RECIPES[name], x, weights, biases, merged=merged, interleave=interleave)
        assert all(torch.equal(a, b) for a, b in zip(ys, expected, strict=True))


# --- against TE's own module

TOKENS, K, N = 96, 160, 192


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [TOKENS, K] and dy [TOKENS, N] over six orders of magnitude; by turns all zero, with NaN, infinite, tiny."""
    torch.manual_seed(step)
    x, dy = (torch.randn(TOKENS, n) * 10 ** torch.empty(TOKENS, n).uniform_(-3, 3) for n in (K, N))
    if step == 1:
        x.zero_()
    if step == 2:
        x[0, 0], dy[3, 0] = torch.nan, torch.nan
    if step == 3:
        x[1, 1], dy[1, 1] = torch.inf, -torch.inf
    if step == 4:
        x, dy = x * 1e-42, dy * 1e-42
    return x.to(dtype), dy.to(dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", ["block", "mxfp8", "mxfp8 hybrid with square weights"])
def test_a_linear_is_te_s(te, name, dtype, bias):
    """Bitwise equal: the same copies go to the same GEMMs. Only a bias's gradient is summed in another order, and infinities do not
    saturate."""
    from transformer_engine.common import recipe as recipes

    theirs_of = {
        "block": recipes.Float8BlockScaling,
        "mxfp8": recipes.MXFP8BlockScaling,
        "mxfp8 hybrid with square weights": lambda: recipes.MXFP8BlockScaling(
            fp8_format=recipes.Format.HYBRID, enable_2d_quantization=True
        ),
    }
    recipe, autocast = RECIPES[name], theirs_of[name]()
    with te_on_cpu.pretended(device_of(recipe)):
        torch.manual_seed(0)
        ours = nn.Linear(K, N, bias=bias, dtype=dtype)
        with te_on_cpu.cuda_is_cpu():
            theirs = te.Linear(K, N, bias=bias, params_dtype=dtype, device="cpu")
        with torch.no_grad():
            if bias:  # TE passes the bias to an FP8 GEMM in bf16
                ours.bias.copy_(ours.bias.bfloat16())
                theirs.bias.copy_(ours.bias)
            theirs.weight.copy_(ours.weight)
        compiled = torch.compile(ours, backend=te_fp8, fullgraph=True, options={"recipe": autocast, "provider": "te"})
        for step in range(6):
            x, dy = batch(step, dtype)
            mine, other = (x.clone().requires_grad_() for _ in range(2))
            for model in (ours, theirs):
                model.zero_grad()
            y = compiled(mine)
            y.backward(dy)
            with te_on_cpu.cuda_is_cpu():
                with te.autocast(enabled=True, recipe=autocast):
                    z = theirs(other)
                z.backward(dy)
            if bias:
                assert_one_rounding([ours.bias.grad], [theirs.bias.grad])
            if step == 3 and name == "block":  # TE saturates an infinity; here it stays visible wherever it is multiplied in
                assert [(~t.isfinite()).all(1).nonzero().flatten().tolist() for t in (y, mine.grad)] == [[1], [1]]
                assert (~ours.weight.grad.isfinite()).sum() == K + N - 1
                continue
            for what, a, b in (("y", y, z), ("dx", mine.grad, other.grad), ("dw", ours.weight.grad, theirs.weight.grad)):
                assert a.dtype == b.dtype == dtype
                assert torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()), f"step {step}: {what}"


# --- whole models


@pytest.mark.parametrize("name", ["block", "mxfp8"])
def test_a_llama_trains_as_with_the_reference(name):
    case, losses, providers = SMALL["llama"], [], []
    for provider in ("te", "reference"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, trace = case.model(), []
        call, sites = compiled(model, name, provider, fullgraph=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(10):
            loss = output(call(**case.inputs())).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trace.append(loss.item())
        losses.append(trace)
        providers.append({s.provider for s in sites if "linear" in s.kind and s.provider})
    assert providers == [{"te"}, {"reference"}]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=2e-3, atol=0)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("name", ["block", "mxfp8"])
def test_inference(name):
    model, x = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval(), torch.randn(21, 64)
    call, sites = compiled(model, name)
    with torch.no_grad():
        y = call(x)
        assert torch.equal(call(x), y) and sqnr(model(x), y) > 25
    assert [s.provider for s in sites] == ["te", "te"]


@pytest.mark.parametrize("name", ["block", "mxfp8"])
def test_a_number_of_tokens_that_changes(name):
    """One graph for all numbers of tokens, padded or not."""
    torch.manual_seed(0)
    model, graphs = nn.Linear(64, 32), []
    call, _ = compiled(model, name, dynamic=True, fullgraph=True)
    with observing(lambda gm, sites, options: graphs.append(gm)):
        for tokens in (48, 37, 5, 128):
            x, dy = torch.randn(tokens, 64, requires_grad=True), torch.randn(tokens, 32)
            (expected,) = linears("reference", RECIPES[name], x, [model.weight], [model.bias])
            y, inputs = call(x), (x, model.weight)
            assert_one_rounding([y], [expected])
            assert_one_rounding(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy))
    assert len(graphs) == 1


@pytest.mark.parametrize(("name", "multiple", "k", "n"), [("block", 16, 56, 96), ("mxfp8", 32, 48, 80)])
def test_dimensions_that_it_cannot_take_are_left_with_the_reason(name, multiple, k, n):
    model = nn.Sequential(nn.Linear(64, k), nn.Linear(k, 96), nn.Linear(96, 64))
    call, sites = compiled(model, name)
    call(torch.randn(5, 64)).sum().backward()
    assert [s.provider for s in sites if "linear" in s.kind].count("te") == 1
    assert sum(f"{k} is not a multiple of {multiple}, which " in (s.reason or "") for s in sites) == 2

    def unsupported(n: int, dtype: torch.dtype) -> str:
        case = Case(LINEARS, {"weights": [torch.empty(n, 64)]}, {"out_dtype": dtype}, RECIPES[name], CPU, trains=True)
        return BlockLinears().unsupported(case) or ""

    assert unsupported(40, torch.bfloat16).startswith(f"out_features 40 is not a multiple of {multiple}")
    assert "float64" in unsupported(64, torch.float64)


@pytest.mark.parametrize(
    ("recipe", "device", "words"),
    [
        (Float8BlockScaling(), HOPPER, None),
        (Float8BlockScaling(), BLACKWELL, None),
        (Float8BlockScaling(), (8, 9), "it needs compute capability 9.0 or newer, this device has 8.9"),
        (Float8BlockScaling(power_2_scale=False), HOPPER, None),
        (Float8BlockScaling(power_2_scale=False), BLACKWELL, "scales that are powers of two (power_2_scale=True)"),
        (MXFP8BlockScaling(), BLACKWELL, None),
        (MXFP8BlockScaling(), HOPPER, "it needs compute capability 10.0 or newer, this device has 9.0"),
        (Float8RowwiseScaling(), BLACKWELL, "Transformer Engine has no row-wise recipe"),
        (NVFP4BlockScaling(), BLACKWELL, "Transformer Engine's NVFP4 is not connected"),
    ],
)
def test_where_it_is_and_why_not(recipe, device, words):
    with te_on_cpu.pretended(device):
        if words is None:
            assert choose_for(recipe, "te", "te", CPU) == ("te", None)
            return
        key, reason = choose_for(recipe, "auto", "te", CPU)
        assert key == "reference" and reason is not None and words in reason
        with pytest.raises(RuntimeError, match=f"provider='te' does not have the recipe '{recipe.name}': .*Remedy"):
            choose_for(recipe, "te", "te", CPU)


def test_auto_takes_te_for_the_recipes_that_native_does_not_have(monkeypatch):
    device, block = torch.device("cuda"), Float8BlockScaling()
    monkeypatch.setattr("te_dynamo.lowering.te.library.unavailable", lambda device: None)
    monkeypatch.setattr("te_dynamo.lowering.te.provider.unavailable_recipe", lambda recipe, device: None)
    monkeypatch.setattr("te_dynamo.lowering.te.block_linears.unavailable_recipe", lambda recipe, device: None)
    key, reason = choose_for(block, "auto", "native", device)
    assert key == "te" and "torch._scaled_mm" in reason
    monkeypatch.setattr("te_dynamo.lowering.te.block_linears.unavailable_recipe", lambda recipe, device: "not here")
    assert choose_for(block, "auto", "native", device)[0] == "reference"
    assert choose_for(DelayedScaling(), "auto", "native", device) == ("native", None)
