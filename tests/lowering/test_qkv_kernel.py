"""The kernel that normalizes and turns q and k and writes the layout, by Triton's interpreter and against the definition."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import te_dynamo.lowering.kernels.qkv  # noqa: F401
from te_dynamo import ops
from te_dynamo.ir.layout import ORDER, as_bhsd, in_memory
from te_dynamo.ir.qkv import views
from te_dynamo.lowering.call import Call, spec_of

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
    if not packing:  # v stays where it is: laid beside them as attention would read it
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


def test_the_kernel():
    """In a process of its own: what Triton reads from the environment holds for a process."""
    pytest.importorskip("triton", reason="Triton is not installed")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KERNEL)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
