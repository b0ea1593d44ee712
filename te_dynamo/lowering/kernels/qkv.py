"""One kernel that normalizes q and k head by head (QK-norm), applies RoPE to them, and writes them and v in the layout that attention
reads.

A program takes a few heads of one token. A feature's RoPE partner is in the same head, so loading it as well hits the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from te_dynamo.ir.qkv import qkv, shapes, views
from te_dynamo.lowering.call import Call

HEADS = 8  # of one program
ROTARY = {"": 0, "halves": 1, "interleaved": 2}
NORM = {"": 0, "rms": 1, "layer": 2}


@torch.library.custom_op("te_dynamo::qkv", mutates_args=())
def write_qkv(call: str, inputs: list[Tensor | None]) -> list[Tensor]:
    """call, inputs: of an `ops.qkv` -> the buffers that hold its results (see `te_dynamo.ir.qkv.views`)."""
    parsed = Call.parse(call)
    buffers = _empty(parsed, inputs)
    targets = views(buffers, parsed["form"], parsed["packing"])
    if inputs[0].device.type == "cuda":
        launch(parsed, inputs, targets)
    else:
        for target, made in zip(targets, qkv(*inputs, **parsed.attributes), strict=True):
            target.copy_(made)
    return buffers


@write_qkv.register_fake
def _(call, inputs):
    return _empty(Call.parse(call), inputs)


def _empty(call: Call, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    given = [t for t in inputs[:3] if t is not None]
    return [given[0].new_empty(shape, dtype=call["out_dtype"]) for shape in shapes(given, call["form"], call["packing"])]


def launch(call: Call, inputs: Sequence[Tensor | None], targets: Sequence[Tensor]) -> None:
    """Runs the kernel, which writes the results to `targets`, [B, H, S, D] each."""
    from te_dynamo.lowering.kernels.qkv_triton import qkv_kernel

    given = [*inputs, *[None] * (9 - len(inputs))]
    q, k, v, cos, sin, *vectors = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in given)
    b, heads, s, d = q.shape
    if not q.numel():
        return
    tables = [None if t is None else t.expand(b, 1, s, t.shape[-1]) for t in (cos, sin)]
    moved = [q, k, v, *targets, *[None] * (3 - len(targets))]
    strides = [0 if t is None else t.stride(i) for t in moved for i in (0, 1, 2)]
    strides += [0 if t is None else t.stride(i) for t in tables for i in (0, 2)]
    programs = sum(-(-t.shape[1] // HEADS) for t in targets)
    qkv_kernel[(b * s, programs)](
        *(q if t is None else t for t in (*moved, *tables, *vectors)),
        s,
        heads,
        k.shape[1],
        call["width"],
        call["eps"],
        *strides,
        D=d,
        ROTARY=ROTARY[call["rotary"]],
        NORM=NORM[call["normalized"]],
        NORM_LAST=call["norm_last"],
        ZERO_CENTERED=call["zero_centered"],
        ROUNDS=call["round_before_weight"] is not None,
        WEIGHT=vectors[0] is not None,
        BIAS=vectors[2] is not None,
        COS_PAIRS=cos is not None and cos.shape[-1] != call["width"],
        SIN_PAIRS=sin is not None and sin.shape[-1] != call["width"],
        HEADS=HEADS,
        BLOCK=1 << (d - 1).bit_length(),
        num_warps=4,
    )
