"""The operators around Transformer Engine's kernels, on NVIDIA's Python package with a stand-in for its C++ layer."""

from __future__ import annotations

import runpy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import te_dynamo
from te_dynamo.backend import observing, te_fp8
from te_dynamo.lowering.fp8 import amax, quantize
from te_dynamo.lowering.te import library
from te_dynamo.lowering.te.linear import gemm
from te_dynamo.runtime import compile_without_codegen
from tests import te_on_cpu
from tests.models import CASES, SMALL, Case, output
from tests.numerics import sqnr

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ONE = torch.ones(())
pytestmark = pytest.mark.usefixtures("no_codegen")


@pytest.fixture
def stand_in() -> None:
    reason = te_on_cpu.missing()
    if reason is not None:
        pytest.skip(reason)
    te_on_cpu.install()


def bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8)


def operands() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(32, 64).to(E4M3), torch.randn(48, 64).to(E4M3)


def test_a_gemm_is_the_product(stand_in):
    a, b = operands()
    a_inv, b_inv = torch.tensor(0.5), torch.tensor(4.0)
    exact = (a.double() * 0.5) @ (b.double() * 4.0).t()
    for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bias in (None, torch.randn(48).to(out_dtype)):
            y = gemm(a, b, a_inv, b_inv, out_dtype, bias, True)
            assert y.dtype == out_dtype
            expected = exact if bias is None else exact + bias.double()
            torch.testing.assert_close(y, expected.to(out_dtype), rtol=2 * torch.finfo(out_dtype).eps, atol=1e-2)


def test_forward_accumulates_fast_and_backward_does_not(stand_in, monkeypatch):
    """As TE's recipes say for Hopper: use_split_accumulator is False in forward, True in dgrad and wgrad."""
    seen, general_gemm = [], library.api().general_gemm

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["use_split_accumulator"])
        return general_gemm(*args, **kwargs)

    monkeypatch.setattr(library.api(), "general_gemm", noting)
    torch._dynamo.reset()
    run = torch.compile(nn.Linear(32, 32), backend=te_fp8, options={"provider": "te", "recipe": "current"})
    run(torch.randn(16, 32, requires_grad=True)).sum().backward()
    assert seen == [False, True, True]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_operands_lie_row_by_row_whatever_the_input_s_strides(stand_in, bias, grad):
    """TE ignores strides (the stand-in rejects operands that are not contiguous): channels-last images, transposed inputs."""
    first, second = nn.Linear(32, 48, bias=bias), nn.Linear(16, 32, bias=bias)

    def model(image: Tensor) -> Tensor:
        y = first(image.flatten(2).transpose(1, 2))  # a view [1, 16, 32] with strides (1, 16)
        return second(y.transpose(1, 2))  # and so its gradient

    image = torch.randn(1, 32, 4, 4, requires_grad=grad)
    torch._dynamo.reset()
    run = torch.compile(model, backend=te_fp8, options={"provider": "te"})
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            first.zero_grad()
            y = run(image)
            if grad:
                y.square().sum().backward()
    assert sqnr(model(image), y) > 20
    if grad:
        (expected,) = torch.autograd.grad(model(image).square().sum(), first.weight)
        assert sqnr(expected, first.weight.grad) > 17


def test_a_gradient_times_a_weight(stand_in):
    _, b = operands()
    g = torch.randn(32, 64).to(E5M2)
    y = gemm(g, b, ONE, ONE, torch.float32, None, False)
    torch.testing.assert_close(y.double(), g.double() @ b.double().t(), rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError, match="E5M2 x E5M2"):
        gemm(g, b.float().to(E5M2), ONE, ONE, torch.float32, None, False)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_quantize_is_the_cast_its_transpose_and_the_amax(stand_in, dtype):
    torch.manual_seed(0)
    x, scale = torch.randn(32, 64, dtype=torch.bfloat16), torch.tensor(3.5)
    expected = quantize(x, scale, dtype)
    plain, across, peak = torch.ops.te_dynamo.te_quantize(x, scale, dtype, True, True)
    assert torch.equal(bits(plain), bits(expected)) and torch.equal(bits(across), bits(expected.t().contiguous()))
    assert peak.item() == amax(x).item()
    only, nothing, _ = torch.ops.te_dynamo.te_quantize(x, scale, dtype, True, False)
    assert torch.equal(bits(only), bits(expected)) and nothing.numel() == 0
    nothing, only, _ = torch.ops.te_dynamo.te_quantize(x, scale, dtype, False, True)
    assert torch.equal(bits(only), bits(expected.t().contiguous())) and nothing.numel() == 0


def test_where_its_casts_do_not_transpose_a_kernel_of_ours_does(stand_in):
    torch.manual_seed(0)
    x, scale = torch.randn(32, 64), torch.tensor(3.5)
    for data in (True, False):
        expected = torch.ops.te_dynamo.te_quantize(x, scale, E4M3, data, True)
        with te_on_cpu.pretended((10, 0)):
            found = torch.ops.te_dynamo.te_quantize(x, scale, E4M3, data, True)
            grad = torch.ops.te_dynamo.te_bgrad_quantize(x, scale, E5M2)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(expected, found, strict=True))
        assert torch.equal(bits(grad[1]), bits(grad[0].t().contiguous()))


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    a, b = operands()
    ops = torch.ops.te_dynamo
    return {
        "te_gemm": (ops.te_gemm, (a, b, ONE, ONE.clone(), None, torch.float32, True)),
        "te_gemm with a bias": (ops.te_gemm, (a, b, ONE, ONE.clone(), torch.randn(48).bfloat16(), torch.bfloat16, False)),
        "te_quantize": (ops.te_quantize, (torch.randn(32, 64), ONE, E5M2, True, True)),
        "te_quantize transposed": (ops.te_quantize, (torch.randn(32, 64), ONE, E4M3, False, True)),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(stand_in, name, monkeypatch):
    # opcheck compares an operator's arguments before and after it; torch.allclose cannot compare FP8
    allclose = torch.allclose
    monkeypatch.setattr(torch, "allclose", lambda a, b, **k: allclose(*(bits(t) if t.itemsize == 1 else t for t in (a, b)), **k))
    op, args = samples()[name]
    torch.library.opcheck(op.default, args)


def test_flops(stand_in):
    op, args = samples()["te_gemm"]
    with FlopCounterMode(display=False) as counter:
        op(*args)
    assert counter.get_total_flops() == 2 * 32 * 64 * 48


# --- where it is available


@pytest.mark.parametrize(
    ("found", "loaded", "device", "words"),
    [
        (None, None, CUDA, "transformer_engine is not installed (pip install"),
        ("2.11.0", None, CUDA, "2.11.0 is not supported (pip install --no-build-isolation 'transformer_engine[pytorch]>=2.20,<3.0')"),
        ("3.1", None, CUDA, "transformer_engine 3.1 is not supported"),
        ("2.20.2", None, CUDA, "without its extension for PyTorch, transformer_engine_torch"),
        ("2.20.2", SimpleNamespace(), CPU, "are for CUDA devices, not cpu"),
        ("2.20.2", SimpleNamespace(), CUDA, None),
        ("2.21.0", SimpleNamespace(__stand_in__=True), CPU, None),
    ],
)
def test_what_is_missing_is_named(monkeypatch, found, loaded, device, words):
    def version(name: str) -> str:
        if found is None:
            raise library.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(library, "version", version)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(library, "import_error", lambda: None)
    if loaded is None:
        monkeypatch.delitem(sys.modules, library.EXTENSION, raising=False)
    else:
        monkeypatch.setitem(sys.modules, library.EXTENSION, loaded)
    reason = library.unavailable(device)
    assert reason is None if words is None else words in reason


def test_on_a_device_without_fp8(stand_in):
    torch._dynamo.reset()
    with te_on_cpu.pretended((8, 0)), pytest.raises(Exception, match="provider='te' is not available: it needs compute capability 8.9"):
        torch.compile(nn.Linear(16, 16), backend=te_fp8, options={"provider": "te"})(torch.randn(16, 16))


def test_one_that_cannot_be_imported_is_not_there(monkeypatch):
    def undefined() -> None:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(library, "version", lambda name: "2.20.2")
    monkeypatch.setitem(sys.modules, library.EXTENSION, SimpleNamespace())
    monkeypatch.setattr(library, "api", undefined)
    library.import_error.cache_clear()
    try:
        assert "cannot be imported: undefined symbol: _ZN3c10 (pip install" in library.unavailable(CUDA)
    finally:
        library.import_error.cache_clear()


def test_asked_for_by_name_and_not_there(monkeypatch):
    monkeypatch.setattr(library, "unavailable", lambda device: "it is not there")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="provider='te' is not available: it is not there. Remedy"):
        torch.compile(nn.Linear(16, 16), backend=te_fp8, options={"provider": "te"})(torch.randn(16, 16))


# --- whole models


def test_the_lowered_graph_s_script_runs(stand_in, tmp_path, capsys):
    """Like every dumped stage, it runs by itself if TE or its stand-in is there."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    run = torch.compile(model, backend=te_fp8, options={"provider": "te", "debug_dir": str(tmp_path), "keep_weights": True})
    for _ in range(2):
        run(torch.randn(32, 64)).sum().backward()
    (script,) = tmp_path.glob("*/*_lower.py")
    capsys.readouterr()
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "(32, 32)" in printed and "nan" not in printed, printed
    assert "'op': 'norm'" in script.read_text()  # as a producer


def test_on_a_blackwell(stand_in):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)), torch.randn(32, 64)
    found = []
    for capability in ((9, 0), (10, 0)):
        torch._dynamo.reset()
        te_dynamo.scale_state(model).reset()
        model.zero_grad()
        with te_on_cpu.pretended(capability):
            run = torch.compile(model, backend=te_fp8, options={"provider": "te"})
            for _ in range(2):
                y = run(x)
                y.sum().backward()
        found.append([y.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dimensions_that_it_cannot_take_are_left_with_the_reason(stand_in):
    model, found = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 32), nn.Linear(32, 32)), []
    torch._dynamo.reset()
    with observing(lambda gm, sites, options: found.extend(sites)):
        torch.compile(model, backend=te_fp8, options={"provider": "te"})(torch.randn(5, 32)).sum().backward()  # 5 tokens: padded
    assert [s.provider for s in found if "linear" in s.kind].count("te") == 1
    assert sum("is not a multiple of 16" in (s.reason or "") for s in found) == 2


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        pytest.param(name, recipe, marks=() if recipe == usual and name in ("llama", "bert") else pytest.mark.slow)
        for name, usual in (("llama", "delayed"), ("bert", "current"), ("gpt2", "delayed"), ("vit", "current"))
        for recipe in ("delayed", "current")
    ],
)
def test_a_model_trains_as_with_the_reference(stand_in, monkeypatch, name, recipe):
    """8 steps, one graph: losses and scale state are bitwise the definition's."""
    check_training(SMALL[name], recipe, monkeypatch, exactly=True)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("recipe", ["delayed", "current"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "vit"])
def test_a_model_trains_as_with_the_reference_under_inductor(stand_in, monkeypatch, name, recipe):
    """The same, except that Inductor sums in another order around other GEMMs."""
    check_training(CASES[name], recipe, monkeypatch, exactly=False)


def check_training(case: Case, recipe: str, monkeypatch: pytest.MonkeyPatch, exactly: bool) -> None:
    losses, states, providers = [], [], []
    for provider in ("te", "reference"):
        torch._dynamo.reset()
        model = case.model()
        if provider == "reference":  # the definition, however the other is compiled
            monkeypatch.setattr("te_dynamo.runtime.compile_inductor", compile_without_codegen)
        compiled = torch.compile(model, backend=te_fp8, fullgraph=True, options={"recipe": recipe, "provider": provider})
        optimizer, seen = torch.optim.SGD(model.parameters(), lr=1e-2), []
        with observing(lambda gm, sites, options, seen=seen: seen.append({s.provider for s in sites.taken()})):
            trace = []
            for _ in range(8):
                loss = output(compiled(**case.inputs())).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                trace.append(loss.item())
        losses.append(trace)
        providers.append(seen)
        states.append(te_dynamo.scale_state(model).state_dict())
    assert providers == [[{"te"}], [{"reference"}]]
    assert losses[0][-1] < losses[0][0]
    assert states[0].keys() == states[1].keys() and bool(states[0]) == (recipe == "delayed")
    if exactly:
        assert losses[0] == losses[1]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    else:
        torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=2e-3, atol=0)


@pytest.mark.inductor
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_under_inductor(stand_in, grad):
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), torch.randn(20, 32)
    run = torch.compile(model.train(grad), backend=te_fp8, options={"provider": "te"})
    with torch.set_grad_enabled(grad):
        for _ in range(2):  # with the scales that the first call sets, too
            model.zero_grad()
            y = run(x)
            if grad:
                y.square().sum().backward()
    assert sqnr(model(x), y) > 22
    if grad:
        found = [p.grad for p in model.parameters()]
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        assert all(sqnr(a, b) > 17 for a, b in zip(expected, found, strict=True))
