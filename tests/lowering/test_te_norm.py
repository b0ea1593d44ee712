"""TE's norms that write FP8, and its cast that sums a bias's gradient: the operators, when they are chosen, and te.LayerNormLinear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_dynamo.backend import observing, te_fp8
from te_dynamo.lowering.fp8 import amax, quantize
from te_dynamo.lowering.te import norm as te_norm
from te_dynamo.state import FORWARD, GRADIENT, STATE
from tests import te_on_cpu
from tests.slots import CPU, history_of, index_of

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(scope="module", autouse=True)
def te() -> Any:
    reason = te_on_cpu.missing()
    if reason is not None:
        pytest.skip(reason)
    return te_on_cpu.install()


pytestmark = pytest.mark.usefixtures("no_codegen")


def bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8)


# --- the operators


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_norm_in_fp8(kind, dtype, zero_centered):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(32, 64, dtype=dtype), torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    scale = torch.tensor(20.0)
    h8, mean, inverse, peak = torch.ops.te_dynamo.te_norm(
        x, weight, bias if kind == "layer" else None, scale, E4M3, kind, 1e-5, zero_centered
    )
    shape, factor = (64,), weight.float() + zero_centered
    exact = (
        nn.functional.layer_norm(x.float(), shape, factor, bias.float())
        if kind == "layer"
        else nn.functional.rms_norm(x.float(), shape, factor, 1e-5)
    )
    torch.testing.assert_close(h8.float() / 20, exact, rtol=2**-4, atol=2**-10)  # E4M3 has three mantissa bits
    assert (bits(h8) != bits(quantize(exact, scale, E4M3))).sum() <= 4  # float32 sums in another order
    torch.testing.assert_close(peak.item(), amax(exact).item(), rtol=1e-6, atol=0)
    assert mean.numel() == (32 if kind == "layer" else 0) and inverse.shape == (32,)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_its_backward_is_autograd_s(kind, zero_centered):
    torch.manual_seed(0)
    x, weight, bias, dy = (torch.randn(*shape, dtype=torch.float32) for shape in ((32, 64), (64,), (64,), (32, 64)))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    factor = weight + zero_centered
    y = nn.functional.layer_norm(x, (64,), factor, bias) if kind == "layer" else nn.functional.rms_norm(x, (64,), factor, 1e-5) + bias
    expected = torch.autograd.grad(y, leaves, dy)
    *_, mean, inverse, _ = torch.ops.te_dynamo.te_norm(
        x.detach(), weight.detach(), bias.detach() if kind == "layer" else None, torch.ones(()), E4M3, kind, 1e-5, zero_centered
    )
    for ours, wanted in zip(te_norm.backward(dy, x, weight, mean, inverse, kind, zero_centered), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gradient_cast_transposed_and_summed(dtype):
    torch.manual_seed(0)
    grad, scale = torch.randn(32, 48, dtype=dtype), torch.tensor(100.0)
    g8, g8t, db, peak = torch.ops.te_dynamo.te_bgrad_quantize(grad, scale, E5M2)
    assert torch.equal(bits(g8), bits(quantize(grad, scale, E5M2))) and torch.equal(bits(g8t), bits(g8.t().contiguous()))
    torch.testing.assert_close(db, grad.double().sum(0).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert peak.item() == amax(grad).item()


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    ops, x, one = torch.ops.te_dynamo, torch.randn(32, 64), torch.ones(())
    return {
        "layer": (ops.te_norm, (x, torch.randn(64), torch.randn(64), one, E4M3, "layer", 1e-5, False)),
        "rms": (ops.te_norm, (x.bfloat16(), torch.randn(64).bfloat16(), None, one, E4M3, "rms", 1e-5, True)),
        "bgrad": (ops.te_bgrad_quantize, (x, one, E5M2)),
    }


@pytest.mark.parametrize("name", ["layer", "rms", "bgrad"])
def test_opcheck(name, monkeypatch):
    allclose = torch.allclose  # cannot compare FP8
    monkeypatch.setattr(torch, "allclose", lambda a, b, **k: allclose(*(bits(t) if t.itemsize == 1 else t for t in (a, b)), **k))
    op, args = samples()[name]
    torch.library.opcheck(op.default, args)


# --- where they are chosen


def norms_of(model: nn.Module, x: Tensor, **options: Any) -> list[str | None]:
    """What the report says about the norms before linears."""
    torch._dynamo.reset()
    seen: list[Any] = []
    run = torch.compile(model, backend=te_fp8, fullgraph=True, options={"provider": "te", **options})
    with observing(lambda gm, sites, _: seen.extend(s for s in sites.taken() if "norm" in s.detail)):
        for _ in range(2):
            run(x).sum().backward()
    return [s.detail["norm"] for s in seen]


class Residual(nn.Module):
    """A norm of the input, and one of a sum."""

    def __init__(self, norm: Any = nn.LayerNorm, h_too: bool = False) -> None:
        super().__init__()
        self.first, self.second = norm(32), norm(32)
        self.up, self.down, self.last = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 16)
        self.h_too = h_too

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = x + self.down(torch.relu(self.up(h)))
        return self.last(self.second(y)) + (h.sum() if self.h_too else 0)


OF_A_SUM = "Inductor fuses it with what makes its input"


@pytest.mark.parametrize(
    ("model", "tokens", "options", "first"),
    [
        (Residual(), 32, {}, "TE's kernel"),
        (Residual(nn.RMSNorm), 32, {}, "TE's kernel"),
        (Residual(h_too=True), 32, {}, "its result is wanted in high precision too"),
        (Residual(), 20, {}, "20 tokens are not a multiple of 16"),
        (Residual(), 32, {"recipe": "current"}, "a norm writes FP8 by itself only where the scale is known before: in delayed scaling"),
        (Residual(lambda n: nn.LayerNorm(n, elementwise_affine=False)), 32, {}, "TE's norms have a weight"),
        (Residual(lambda n: nn.LayerNorm(n, bias=False)), 32, {}, "TE's LayerNorm has a bias"),
        (Residual(), 32, {"memory": "saving"}, "memory='saving': what Inductor generates can be made again in backward"),
    ],
)
def test_which_norms_are_te_s(model, tokens, options, first):
    second = first if "memory" in options else OF_A_SUM
    assert norms_of(model, torch.randn(tokens, 32), **options) == [first, second]


def test_a_norm_of_another_dtype_than_its_weight_is_inductor_s():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (first, _) = norms_of(Residual(), torch.randn(32, 32).bfloat16())
    assert "take weights of the dtype" in first


# --- against TE's own module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("recipe", ["delayed", "current"])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_a_norm_and_a_linear_are_te_s_layer_norm_linear(te, kind, recipe, dtype):
    """30 steps. Delayed: scales and histories are bitwise equal. Outputs and gradients are equal up to a rounding between norm and linear:
    in current scaling TE rounds the norm to its dtype, and so does Inductor, which sums in another order."""
    from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling

    torch._dynamo.reset()
    torch.manual_seed(0)
    tokens, k, n = 32, 64, 48
    theirs_recipe = DelayedScaling(amax_history_len=12) if recipe == "delayed" else Float8CurrentScaling()
    norm = nn.LayerNorm(k, dtype=dtype) if kind == "LayerNorm" else nn.RMSNorm(k, eps=1e-5, dtype=dtype)
    ours = nn.Sequential(norm, nn.Linear(k, n, dtype=dtype))
    with te_on_cpu.cuda_is_cpu():
        theirs = te.LayerNormLinear(k, n, eps=1e-5, normalization=kind, params_dtype=dtype, device="cpu")
    with torch.no_grad():
        ours[1].bias.copy_(ours[1].bias.bfloat16())  # TE gives an FP8 GEMM its bias in bf16
        for p in norm.parameters():
            p.uniform_(0.5, 1.5)
        pairs = {
            "layer_norm_weight": norm.weight,
            "layer_norm_bias": getattr(norm, "bias", None),
            "weight": ours[1].weight,
            "bias": ours[1].bias,
        }
        pairs = {name: p for name, p in pairs.items() if p is not None}
        for name, p in pairs.items():
            getattr(theirs, name).copy_(p)
    with STATE.set_aside():
        arena = STATE.arena(CPU)
        run = torch.compile(ours, backend=te_fp8, fullgraph=True, options={"like_te": True, "recipe": theirs_recipe, "provider": "te"})
        for step in range(30):
            generator = torch.Generator().manual_seed(step)
            x = (torch.randn(tokens, k, generator=generator) * 10.0 ** (step % 5 - 2)).to(dtype)
            dy = (torch.randn(tokens, n, generator=generator) * 10.0 ** (step % 7 - 3)).to(dtype)
            mine, other = (x.clone().requires_grad_() for _ in range(2))
            y = run(mine)
            y.backward(dy)
            with te_on_cpu.cuda_is_cpu():
                with te.autocast(enabled=True, recipe=theirs_recipe):
                    z = theirs(other)
                z.backward(dy)
            if recipe == "delayed":
                STATE.roll()
                roles = (
                    (FORWARD, "input", "scaling_fwd", 0),
                    (FORWARD, "weight", "scaling_fwd", 1),
                    (GRADIENT, "grad_output", "scaling_bwd", 0),
                )
                for direction, role, which, i in roles:
                    at, state = (direction, index_of(ours[1].weight, role)), theirs.fp8_meta[which]
                    assert torch.equal(arena.scale[at], state.scale[i]), (step, role)
                    assert torch.equal(history_of(arena, *at), state.amax_history[:, i]), (step, role)
            tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6} if recipe == "delayed" else {"rtol": 0.125, "atol": 0.0675}
            results = {"y": (y, z), "dx": (mine.grad, other.grad)} | {
                name: (p.grad, getattr(theirs, name).grad) for name, p in pairs.items()
            }
            for name, (a, b) in results.items():
                size = b.abs().max().item() or 1.0
                torch.testing.assert_close(a / size, b / size, **tolerance, msg=lambda m, name=name, step=step: f"{step} {name}: {m}")
            ours.zero_grad()
            theirs.zero_grad()
