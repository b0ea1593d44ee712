"""The kernel that normalizes and rotates q and k and writes the layout, in Triton's interpreter and against the definition."""

from __future__ import annotations

import pytest
import torch

import te_dynamo.lowering.kernels.qkv
import te_dynamo.lowering.kernels.qkv_gradient  # noqa: F401
from te_dynamo import ops
from te_dynamo.ir.layout import ORDER, as_bhsd, in_memory
from te_dynamo.ir.qkv import views
from te_dynamo.lowering.call import Call, spec_of
from te_dynamo.lowering.fp8 import E5M2
from te_dynamo.lowering.kernels.qkv_gradient import defined

LAYOUTS = [("bshd", "3hd"), ("sbhd", "3hd"), ("bshd", "h3d"), ("sbhd", "h3d"), ("bshd", "2hd"), ("bshd", "h2d"), ("sbhd", ""), ("bshd", "")]
PLAIN = {
    "rotary": "",
    "width": 0,
    "normalized": "",
    "eps": 0.0,
    "zero_centered": False,
    "round_before_weight": None,
    "norm_last": False,
}


def call_of(inputs, **attributes):
    return Call("qkv", "native", inputs[0].device.type, spec_of(tuple(inputs)), attributes=PLAIN | attributes)


def tensors(heads_kv: int = 2, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    whole = torch.randn(3, 10, (4 + 2 * heads_kv) * 16, dtype=dtype).unflatten(-1, (-1, 16)).transpose(1, 2)
    return list(whole.split([4, heads_kv, heads_kv], 1))


@pytest.mark.parametrize(("form", "packing"), LAYOUTS)
def test_the_results_lie_as_the_layout_says(form, packing):
    q, k, v = tensors(4 if "3" in packing else 2)
    angles = torch.randn(1, 1, 10, 16)
    given = [q, k, v if packing else None, angles.cos(), angles.sin()]
    made = ops.qkv(*given, form=form, packing=packing, out_dtype=q.dtype, rotary="halves", width=16)
    buffers = torch.ops.te_dynamo.qkv(call_of(given, form=form, packing=packing, out_dtype=q.dtype, rotary="halves", width=16).key, given)
    if not packing:  # v stays where it is: here in the layout that attention reads
        v = as_bhsd(v.permute(ORDER[form]).contiguous(), form)
    for found in (made, views(buffers, form, packing)):
        layout = in_memory(*found, *([] if packing else [v]))
        assert layout is not None and (layout.form, layout.packing) == (form, packing)
        assert all(torch.equal(a, b) for a, b in zip(found, made, strict=True))
        assert not packing or torch.equal(found[2], v)


def test_opcheck():
    q, k, v = tensors()
    angles = torch.randn(1, 1, 10, 16)
    given = [q, k, v, angles.cos(), angles.sin()]
    call = call_of(given, form="bshd", packing="2hd", out_dtype=q.dtype, rotary="interleaved", width=16)
    torch.library.opcheck(torch.ops.te_dynamo.qkv.default, (call.key, given))


KERNEL = """
    import itertools, torch
    from te_dynamo import ops
    from te_dynamo.ir.qkv import shapes, views
    from te_dynamo.lowering.kernels.qkv import launch
    from tests.lowering.test_qkv_kernel import LAYOUTS, call_of

    torch.manual_seed(0)
    rms, layer = {"normalized": "rms", "eps": 1e-6}, {"normalized": "layer", "eps": 1e-5}
    norms = [{}, rms, layer, rms | {"norm_last": True}]
    cases = itertools.product(LAYOUTS, ("", "halves", "interleaved"), norms, (torch.float32, torch.bfloat16), (16, 24), (True, False))
    for n, ((form, packing), rotary, norm, dtype, head, whole) in enumerate(itertools.islice(cases, None, None, 41)):
        width = 0 if not rotary else head if whole else 8
        kv = 9 if "3" in packing else 3
        q, k, v = torch.randn(2, 5, (9 + 2 * kv) * head, dtype=dtype).unflatten(-1, (-1, head)).transpose(1, 2).split([9, kv, kv], 1)
        angles = torch.randn(1 + n % 2, 1, 5, width if n % 3 else width // 2)
        weights = [torch.randn(head, dtype=dtype) for _ in range(4)] if norm and n % 5 else [None] * 4
        if norm.get("normalized") == "rms":
            weights[2:] = None, None
        tables = [angles.cos().to(dtype), angles.sin()] if rotary else [None, None]
        given = [q, k, v if packing else None, *tables, *weights]
        centered = bool(norm) and n % 7 == 0
        attributes = dict(form=form, packing=packing, out_dtype=dtype, rotary=rotary, width=width, zero_centered=centered, **norm)
        if norm and dtype == torch.bfloat16 and n % 2:
            attributes["round_before_weight"] = dtype
        expected = ops.qkv(*given, **attributes)
        call = call_of(given, **attributes)
        targets = views([q.new_empty(s) for s in shapes([t for t in given[:3] if t is not None], form, packing)], form, packing)
        launch(call, given, targets)
        for found, wanted in zip(targets, expected, strict=True):
            error = (found - wanted).float().norm() / wanted.float().norm()
            assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6), (error, attributes)  # the interpreter truncates to bfloat16
"""


def test_the_kernel(interpreter):
    interpreter(KERNEL)


@pytest.mark.parametrize("rotary", ["", "halves", "interleaved"])
@pytest.mark.parametrize("pairs", [False, True])
def test_the_gradient_side_by_side_is_the_definition_s(rotary, pairs):
    whole = torch.randn(3, 10, 8 * 16, dtype=torch.float64, requires_grad=True)
    q, k, v = whole.unflatten(-1, (-1, 16)).transpose(1, 2).split([4, 2, 2], 1)
    angles = torch.randn(1, 1, 10, 4 if pairs else 8) if pairs else torch.randn(1, 1, 10, 4).repeat(1, 1, 1, 2)
    if rotary == "interleaved" and not pairs:
        angles = angles[..., :4].repeat_interleave(2, -1)
    tables = [angles.cos().double(), angles.sin().double()] if rotary else [None, None]
    attributes = {"form": "bshd", "packing": "2hd", "out_dtype": torch.float64, "rotary": rotary, "width": 8 if rotary else 0}
    made = ops.qkv(q, k, v, *tables, **attributes)
    grads = [torch.randn_like(t) for t in made]
    (expected,) = torch.autograd.grad(made, whole, grads)
    (found,) = defined(call_of([q, k, v, *tables], **attributes), grads, [None] * 3 + tables + [None] * 4, [0, 64, 96])
    assert torch.allclose(expected.flatten(0, 1), found.double(), 1e-4, 1e-5)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("rotary", ["", "interleaved"])
def test_the_gradient_through_a_norm_is_the_definition_s(rotary, norm, centered):
    whole = torch.randn(3, 10, 8 * 16, dtype=torch.float64, requires_grad=True)
    q, k, v = whole.unflatten(-1, (-1, 16)).transpose(1, 2).split([4, 2, 2], 1)
    angles = torch.randn(1, 1, 10, 8)
    tables = [angles.cos().double(), angles.sin().double()] if rotary else [None, None]
    vectors = [torch.randn(16, dtype=torch.float64, requires_grad=True) for _ in range(4 if norm == "layer" else 2)]
    given = [q, k, v, *tables, *vectors, *[None] * (4 - len(vectors))]
    attributes = {"form": "bshd", "packing": "2hd", "out_dtype": torch.float64, "rotary": rotary, "width": 16 if rotary else 0}
    attributes |= {"normalized": norm, "eps": 1e-3, "zero_centered": centered}
    made = ops.qkv(*given, **attributes)
    grads = [torch.randn_like(t) for t in made]
    expected, *of_vectors = torch.autograd.grad(made, [whole, *vectors], grads)
    found, *summed = defined(call_of(given, **attributes), grads, given, [0, 64, 96])
    assert torch.allclose(expected.flatten(0, 1), found.double(), 1e-4, 1e-5)
    parts = [t.double().sum(0) for total in summed for t in (total[:4], total[4:])]
    assert all(torch.allclose(e, f, 1e-4, 1e-4) for e, f in zip(of_vectors, parts, strict=True))


def test_opcheck_of_the_gradient(monkeypatch):
    allclose = torch.allclose  # which cannot compare FP8
    monkeypatch.setattr(torch, "allclose", lambda *ts, **k: allclose(*(t.view(torch.uint8) if t.dtype == E5M2 else t for t in ts), **k))
    q, k, v = tensors()
    angles = torch.randn(1, 1, 10, 16)
    inputs = [q, k, None, angles.cos(), angles.sin(), torch.ones(16), torch.ones(16), None, None]
    for norm in ({}, {"normalized": "rms", "eps": 1e-6}):
        call = call_of([q, k, v, angles, angles], form="bshd", packing="2hd", out_dtype=q.dtype, rotary="halves", width=16, **norm)
        read = inputs if norm else [None, None, *inputs[2:5], *[None] * 4]
        given = (call.key, [q, k, v], read, torch.tensor(2.0), E5M2, False, 16, [0, 64, 96], True, True, True)
        torch.library.opcheck(torch.ops.te_dynamo.qkv_gradient.default, given)


GRADIENT = """
    import itertools, torch
    from te_dynamo.lowering.fp8 import FP8_MAX, Casting
    from te_dynamo.lowering.kernels.qkv_gradient import _empty, defined, launch
    from te_dynamo.lowering.kernels.tiles import fill_both
    from tests.lowering.test_qkv_kernel import call_of

    torch.manual_seed(0)
    E5M2 = torch.float8_e5m2
    FP8_MAX[torch.float32] = FP8_MAX[E5M2]  # memory of float32: the interpreter rounds to FP8 otherwise than hardware
    rms, layer = {"normalized": "rms", "eps": 1e-6}, {"normalized": "layer", "eps": 1e-5}
    turned, dtypes = ("", "halves", "interleaved"), (torch.float32, torch.bfloat16)
    cases = [*itertools.product(turned, dtypes, (16, 40, 64), (True, False), ({},))]
    cases += itertools.product(turned, dtypes, (64, 128), (True,), (rms, layer))
    cases.append(("halves", torch.float32, 256, False, rms))
    for n, (rotary, dtype, head, whole, norm) in enumerate(cases):
        width = 0 if not rotary else head if whole else 8
        b, s, h, kv = 2, (5, 40)[n % 2], 5, 2
        buffer = torch.randn(b, s, h + 2 * kv, head, dtype=dtype).transpose(1, 2)
        grads = list(buffer.split([h, kv, kv], 1))
        angles = torch.randn(1 + n % 2, 1, s, width if n % 3 else width // 2)
        tables = [angles.cos().to(dtype), angles.sin()] if rotary else [None, None]
        read = [None] * 3 + tables + [None] * 4
        if norm:
            read[:2] = (3 * torch.randn(b, s, h + kv, head, dtype=dtype) + 1).transpose(1, 2).split([h, kv], 1)
            of_norm = (0, 2, 4 if norm is layer else 2)[n % 3]
            read[5 : 5 + of_norm] = [torch.randn(head, dtype=dtype) for _ in range(of_norm)]
        how = {"form": "bshd", "packing": "2hd", "out_dtype": dtype, "rotary": rotary, "width": width, "zero_centered": n % 5 == 0}
        call = call_of([*grads, *tables], **how, **norm)
        starts = [0, h * head, (h + kv) * head] if n % 2 else [2 * kv * head, kv * head, 0]
        scale, wanted = torch.tensor(1e4), [(True, True, True), (False, True, True), (True, True, False)][n % 3]
        (found, of_norms), (expected, _) = (_empty(grads, read, torch.float32, 16, *wanted) for _ in range(2))
        launch(call, grads, read, scale, found, of_norms, False, starts)
        values, *summed = defined(call, grads, read, starts)
        assert len(of_norms) == len(summed) and all(torch.allclose(f.sum(0), e, 1e-3, 1e-3) for f, e in zip(of_norms, summed))
        fill_both(expected, values, Casting().saturated(values, scale, E5M2))
        for name in ("data", "transposed"):
            a, e = (getattr(both, name) for both in (found, expected))
            assert a.shape == e.shape and torch.allclose(a, e, 1e-4, 1e-2), (name, rotary, dtype, head, whole)
        assert torch.allclose(found.amaxes.max(), expected.amaxes.max(), 1e-5)
        assert torch.allclose(found.sums.sum(0), expected.sums.sum(0), 1e-3, 1e-3)
"""


def test_the_kernel_of_the_gradient(interpreter):
    interpreter(GRADIENT)
