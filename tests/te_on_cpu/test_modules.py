"""TE's own modules on the stand-in: they train, with FP8's expected noise, with each recipe that the device supports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import te_on_cpu
from tests.numerics import sqnr

TOKENS, K, N = 256, 256, 256
HOPPER, BLACKWELL = (9, 0), (10, 0)


def recipe(name: str) -> Any:
    from transformer_engine.common import recipe as recipes

    return {
        "delayed": lambda: recipes.DelayedScaling(amax_history_len=4),
        "current": recipes.Float8CurrentScaling,
        "block": recipes.Float8BlockScaling,
        "mxfp8": recipes.MXFP8BlockScaling,
    }[name]()


def module(te: Any, name: str) -> nn.Module:
    options = {"params_dtype": torch.bfloat16, "device": "cuda"}
    return {
        "linear": lambda: te.Linear(K, N, **options),
        "layernorm_linear": lambda: te.LayerNormLinear(K, N, **options),
        "rmsnorm_linear": lambda: te.LayerNormLinear(K, N, normalization="RMSNorm", zero_centered_gamma=True, bias=False, **options),
        "layernorm_mlp": lambda: te.LayerNormMLP(K, 2 * K, activation="swiglu", normalization="RMSNorm", bias=False, **options),
    }[name]()


def step(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(dy)
    return {"y": y.detach(), "dx": leaf.grad, **{name: p.grad.clone() for name, p in model.named_parameters()}}


def train(te: Any, model: nn.Module, recipe_name: str, steps: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The last step in high precision and in FP8; the earlier steps fill delayed scaling's history."""
    torch.manual_seed(0)
    scaling = recipe(recipe_name)
    for _ in range(steps):
        x, dy = torch.randn(TOKENS, K).bfloat16(), torch.randn(TOKENS, N).bfloat16()
        exact = step(model, x, dy)
        with te.autocast(enabled=True, recipe=scaling):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            y = model(leaf)
        y.backward(dy)
    return exact, {"y": y.detach(), "dx": leaf.grad, **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("scaling", ["delayed", "current", "block", "mxfp8"])
@pytest.mark.parametrize("name", ["linear", "layernorm_linear", "rmsnorm_linear", "layernorm_mlp"])
def test_a_module_trains(te, name, scaling):
    """A Gaussian product has 28.5 dB with two E4M3 operands, 24.6 with an E4M3 and an E5M2 one; small blocks give a little more."""
    with te_on_cpu.cuda_is_cpu(BLACKWELL if scaling == "mxfp8" else HOPPER):
        torch.manual_seed(0)
        exact, found = train(te, module(te, name), scaling)
    noise = {key: sqnr(exact[key], found[key]) for key in exact}
    deep = name == "layernorm_mlp"  # two products and an activation
    low, high = (22, 30) if deep else (27.5, 32)
    assert low < noise.pop("y") < high
    e4m3_gradients = scaling in ("block", "mxfp8")
    for key, value in noise.items():
        if key == "bias":  # summed in high precision, before quantization
            assert value > 40
        else:
            assert (18 if deep else 23.5) < value < (34 if e4m3_gradients else 30), (key, value)


@pytest.mark.parametrize("format", ["bshd", "sbhd"])
@pytest.mark.parametrize("scaling", [None, "delayed", "current"])
def test_attention_trains(te, scaling, format, monkeypatch):
    from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling

    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "0")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    torch.manual_seed(0)
    b, s, h, d = 2, 64, 2, 128
    shape = (b, s, h, d) if format == "bshd" else (s, b, h, d)

    def heads_first(t: Tensor) -> Tensor:
        return t.transpose(1, 2) if format == "bshd" else t.permute(1, 2, 0, 3)

    recipes = {"delayed": lambda: DelayedScaling(amax_history_len=4, fp8_dpa=True), "current": lambda: Float8CurrentScaling(fp8_dpa=True)}
    # With current scaling TE has FP8 attention from compute capability 10.0 on (P/attention/dot_product_attention/utils.py:757).
    with te_on_cpu.cuda_is_cpu(BLACKWELL if scaling == "current" else HOPPER):
        attention = te.DotProductAttention(h, d, qkv_format=format, attn_mask_type="causal")
        for _ in range(2):
            q, k, v = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(3))
            dy = torch.randn(shape).bfloat16()
            with te.autocast(enabled=scaling is not None, recipe=recipes[scaling]() if scaling else None):
                out = attention(q, k, v)
            out.backward(dy.reshape(out.shape))
    leaves = [heads_first(t.detach()).double().requires_grad_() for t in (q, k, v)]
    expected = nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
    expected.backward(heads_first(dy).double())
    noise = [sqnr(expected, heads_first(out.reshape(shape)))]
    noise += [sqnr(leaf.grad, heads_first(t.grad)) for leaf, t in zip(leaves, (q, k, v), strict=True)]
    if scaling is None:
        assert min(noise) > 40
    else:
        assert 22 < noise[0] < 34 and all(14 < n < 30 for n in noise[1:]), noise


def test_recipes_are_where_the_hardware_has_them(te):
    with te_on_cpu.cuda_is_cpu():
        assert te.is_fp8_available() and te.is_fp8_block_scaling_available() and not te.is_mxfp8_available()
        with te_on_cpu.cuda_is_cpu(BLACKWELL):
            assert te.is_mxfp8_available() and te.get_device_compute_capability() == BLACKWELL
        assert not te.is_mxfp8_available() and te.get_device_compute_capability() == HOPPER
        with pytest.raises(RuntimeError, match="capability 10.0 or higher"), te.autocast(enabled=True, recipe=recipe("mxfp8")):
            pass
    with te_on_cpu.cuda_is_cpu((8, 0)):
        assert not te.is_fp8_available()


def test_a_blackwell_keeps_no_transpose(te):
    """Its FP8 GEMMs accept any layout."""
    for capability, transposes in ((HOPPER, True), (BLACKWELL, False)):
        with te_on_cpu.cuda_is_cpu(capability):
            q = te.Float8CurrentScalingQuantizer(te.DType.kFloat8E4M3, "cuda")(torch.ones(32, 32))
            assert (q._transpose is not None) == transposes


def test_a_hopper_has_no_fp8_attention_with_current_scaling(te, monkeypatch):
    from transformer_engine.common.recipe import Float8CurrentScaling

    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "0")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    with te_on_cpu.cuda_is_cpu(), te.autocast(enabled=True, recipe=Float8CurrentScaling(fp8_dpa=True)):
        q = torch.randn(2, 64, 2, 128).bfloat16()
        with pytest.raises(ValueError, match="No dot product attention backend"):
            te.DotProductAttention(2, 128, qkv_format="bshd")(q, q.clone(), q.clone())
