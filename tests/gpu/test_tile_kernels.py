"""The kernels that compute something and write FP8 plain and transposed, run on the device, against their definitions on the CPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import te_dynamo.lowering.kernels.activation
import te_dynamo.lowering.kernels.cast_both
import te_dynamo.lowering.kernels.cast_rotated
import te_dynamo.lowering.kernels.qkv
import te_dynamo.lowering.kernels.qkv_gradient  # noqa: F401
from te_dynamo import ops
from te_dynamo.ir.qkv import views
from te_dynamo.lowering.fp8 import E4M3, E5M2
from te_dynamo.lowering.kernels import roll
from te_dynamo.recipe import DelayedScaling
from te_dynamo.state.arena import Arena
from tests.gpu.device import DEVICE
from tests.lowering.test_activation_kernels import call_of as activation_call
from tests.lowering.test_activation_kernels import cases, tensors
from tests.lowering.test_qkv_kernel import LAYOUTS
from tests.lowering.test_qkv_kernel import call_of as qkv_call
from tests.numerics import sqnr

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_both(op: Any, *arguments: Any) -> tuple[Any, Any]:
    """The device's result, moved to the CPU, and the CPU's result, which is the definition."""
    there = op(*tree_map_only(Tensor, lambda t: t.to(DEVICE), arguments))
    return tree_map_only(Tensor, Tensor.cpu, there), op(*arguments)


def check_fp8(found: Tensor, expected: Tensor) -> None:
    """Equal, except for values that a last bit in float32 moves across a rounding boundary of FP8."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if found.numel():
        a, b = found.float(), expected.float()
        assert (a == b).float().mean() > 0.99 and sqnr(b, a) > 30


def check_both(found: Any, expected: Any) -> None:
    data, transposed, amaxes, sums = found
    for a, b in zip((data, transposed), expected[:2], strict=True):
        check_fp8(a, b)
    if data.numel() and transposed.numel():
        assert torch.equal(data.view(torch.uint8).t(), transposed.view(torch.uint8))
    torch.testing.assert_close(amaxes.max(), expected[2].max(), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.sum(0), expected[3].sum(0), rtol=1e-3, atol=1e-3 * float(sums.abs().max()) if sums.numel() else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "multiple"), [(130, 260, 16), (64, 128, 1), (1, 5, 16), (1000, 1024, 16)])
def test_cast_both(rows, columns, multiple, dtype):
    (x,) = tensors(1, rows, columns, dtype)
    check_both(*on_both(torch.ops.te_dynamo.cast_both, x, torch.tensor(20.0), E5M2, True, multiple, True, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("size", [24, 64, 96, 128, 192])
def test_cast_rotated(size, centered, dtype):
    (x,) = tensors(1, 2 * 70 * 3, 2 * size, dtype)
    x = x.view(2, 70, 3, 2 * size)[..., size:]
    center = x.float().mean(1, keepdim=True).to(dtype) if centered else None
    (data, peaks), (expected, wanted) = on_both(torch.ops.te_dynamo.cast_rotated, x, center, torch.tensor(20.0), E4M3)
    check_fp8(data, expected)
    torch.testing.assert_close(peaks.max(), wanted.max(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("saturate", [False, True])
def test_what_is_not_finite(saturate):
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1e6, 1.0]])
    found, _ = on_both(torch.ops.te_dynamo.cast_both, x, torch.tensor(1.0), E5M2, saturate, 16, True, False)
    nan, *infinite, large, one = found[0].float()[0].tolist()
    top = torch.finfo(E5M2).max
    assert nan != nan and (large, one) == (top, 1.0)
    assert infinite == [top, -top] if saturate else all(v != v for v in infinite)
    assert found[2].max() == torch.inf


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("spelling", "gated"), cases())
def test_activations(spelling, gated, keep):
    for (rows, columns), dtype in zip([(130, 260), (1, 5), (1000, 512)], DTYPES, strict=True):
        call, scale = activation_call(spelling, gated, dtype), torch.tensor(20.0)
        x, *up = tensors(1 + gated, rows, columns, dtype)
        inputs = [x, up[0] if up else None]
        forward, expected = on_both(torch.ops.te_dynamo.activation, call.key, inputs, [], scale, E4M3, False, 16, True, True, keep)
        check_both((*forward[:3], torch.empty(0, 0)), (*expected[:3], torch.empty(0, 0)))
        check_fp8(forward[3], expected[3])
        torch.testing.assert_close(forward[4], expected[4], rtol=1e-6, atol=0)
        read = ([], list(expected[3:])) if keep else (inputs, [])
        grad, starts = torch.randn(rows, columns).to(dtype), [columns, 0] if gated else [0]
        given = (call.key, grad, *read, scale, E5M2, False, 16, starts, True, True, True)
        check_both(*on_both(torch.ops.te_dynamo.activation_gradient, *given))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("norm", ["", "rms", "layer"])
@pytest.mark.parametrize("rotary", ["", "halves", "interleaved"])
def test_qkv(rotary, norm, dtype):
    for (form, packing), head in itertools.product(LAYOUTS, (64, 40)):
        kv, width = 9 if "3" in packing else 3, head if rotary else 0
        whole = torch.randn(2, 33, (9 + 2 * kv) * head, dtype=dtype).unflatten(-1, (-1, head)).transpose(1, 2)
        q, k, v = whole.split([9, kv, kv], 1)
        angles = torch.randn(2, 1, 33, width)
        weights = [torch.randn(head, dtype=dtype) for _ in range(4)] if norm else [None] * 4
        if norm == "rms":
            weights[2:] = None, None
        tables = [angles.cos().to(dtype), angles.sin().to(dtype)] if rotary else [None, None]
        given = [q, k, v if packing else None, *tables, *weights]
        attributes: dict[str, Any] = {"form": form, "packing": packing, "out_dtype": dtype, "rotary": rotary, "width": width}
        attributes |= {"normalized": norm, "eps": 1e-6 if norm else 0.0}
        buffers = torch.ops.te_dynamo.qkv(qkv_call(given, **attributes).key, tree_map_only(Tensor, lambda t: t.to(DEVICE), given))
        for found, expected in zip(views(buffers, form, packing), ops.qkv(*given, **attributes), strict=True):
            assert sqnr(expected, found.cpu()) > (45 if dtype == torch.bfloat16 else 120), (form, packing, head)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("head", [64, 40])
@pytest.mark.parametrize("norm", ["", "rms", "layer"])
@pytest.mark.parametrize("rotary", ["", "halves", "interleaved"])
def test_the_gradient_of_qkv(rotary, norm, head, dtype):
    if norm:
        head = 128 if head == 40 else head
    b, s, h, kv = 2, 40, 5, 2
    grads = list(torch.randn(b, s, h + 2 * kv, head, dtype=dtype).transpose(1, 2).split([h, kv, kv], 1))
    angles = torch.randn(1, 1, s, head)
    tables = [angles.cos().to(dtype), angles.sin().to(dtype)] if rotary else [None, None]
    read: list[Tensor | None] = [None] * 3 + tables + [None] * 4
    if norm:
        read[:2] = torch.randn(b, s, h + kv, head, dtype=dtype).transpose(1, 2).split([h, kv], 1)
        read[5 : 9 if norm == "layer" else 7] = [torch.randn(head, dtype=dtype) for _ in range(4 if norm == "layer" else 2)]
    attributes: dict[str, Any] = {"form": "bshd", "packing": "2hd", "out_dtype": dtype, "rotary": rotary, "width": head if rotary else 0}
    call = qkv_call([*grads, *tables], **attributes, normalized=norm, eps=1e-6 if norm else 0.0)
    for starts in ([0, h * head, (h + kv) * head], [2 * kv * head, kv * head, 0]):
        given = (call.key, grads, read, torch.tensor(1e3), E5M2, False, 16, starts, True, True, True)
        (*found, of_norms), (*expected, summed) = on_both(torch.ops.te_dynamo.qkv_gradient, *given)
        check_both(found, expected)
        assert torch.allclose(of_norms.cpu().sum(1), summed.sum(1), 1e-3, 1e-3)


def test_the_update_of_the_scale_state():
    """Bitwise equal, for all settings of a recipe that affect it."""
    torch.manual_seed(0)
    recipes = [
        DelayedScaling(amax_history_len=5),
        DelayedScaling(amax_history_len=1, margin=1),
        DelayedScaling(amax_history_len=7, amax_compute_algo="most_recent"),
        DelayedScaling(amax_history_len=3, like_te=True),
    ]
    arena = Arena(torch.device("cpu"))
    for recipe, direction in itertools.product(recipes, (0, 1)):
        arena.configure(direction, arena.take(direction, 3), recipe)
    names, n = ("scale", "history", "cursor"), arena.used[0]
    fixed = [getattr(arena, name).to(DEVICE) for name in ("top", "limit", "length", "most_recent")]
    there = [getattr(arena, name).to(DEVICE) for name in names]
    for step in range(20):
        amax = torch.rand(2, n) * 10.0 ** torch.randint(-44, 39, (2, n)) * (torch.rand(2, n) > 0.3)
        amax[:, 0] = 0
        if step % 4 == 1:
            amax[:, torch.randint(1, n, (3,))] = torch.inf
        arena.amax[:, :n] = amax
        arena.roll()
        roll.launch(amax.to(DEVICE), *there, *fixed)
        for name, found in zip(names, there, strict=True):
            assert torch.equal(found.cpu()[:, :n], getattr(arena, name)[:, :n]), (step, name)
