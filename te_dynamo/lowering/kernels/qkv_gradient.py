"""One kernel that takes the gradients of q, k and v back through RoPE and writes the FP8 gradient of the GEMM that made them, both as it is
and transposed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from te_dynamo.ir.qkv import rotate_gradient
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.kernels.qkv import ROTARY
from te_dynamo.lowering.kernels.tiles import Both, cast, empty_both, fill_both


@torch.library.custom_op("te_dynamo::qkv_gradient", mutates_args=())
def qkv_gradient(
    call: str,
    grads: list[Tensor],
    tables: list[Tensor | None],
    scale: Tensor,
    dtype: torch.dtype,
    saturate: bool,
    multiple: int,
    starts: list[int],
    data: bool,
    transposed: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """call: an `ops.qkv` without a norm; grads: of its results, q [B, H, S, D], k and v [B, H_kv, S, D]; tables: cos and sin ->
    `tiles.Both` of the gradients of q, k and v side by side, [B S, ...].

    starts: the column at which each begins. data, transposed, sums: which results are wanted.
    """
    both = _empty(grads, dtype, multiple, data, transposed, sums)
    parsed = Call.parse(call)
    if grads[0].device.type == "cuda":
        launch(parsed, grads, tables, scale, both, saturate, starts)
    else:
        whole = defined(parsed, grads, tables, starts)
        fill_both(both, whole, cast(whole, scale, dtype, saturate))
    return both.data, both.transposed, both.amaxes, both.sums


@qkv_gradient.register_fake
def _(call, grads, tables, scale, dtype, saturate, multiple, starts, data, transposed, sums):
    return tuple(_empty(grads, dtype, multiple, data, transposed, sums))


def _empty(grads: Sequence[Tensor], dtype: torch.dtype, multiple: int, data: bool, transposed: bool, sums: bool) -> Both:
    b, _, s, d = grads[0].shape
    return empty_both(grads[0], b * s, [int(g.shape[1] * d) for g in grads], dtype, multiple, data, transposed, sums)


def defined(call: Call, grads: Sequence[Tensor], tables: Sequence[Tensor | None], starts: Sequence[int]) -> Tensor:
    """The gradients side by side, in float32."""
    cos, sin = tables
    parts = []
    for i, grad in enumerate(grads):
        g = grad.float()
        if cos is not None and sin is not None and i < 2:
            g = rotate_gradient(g, cos, sin, call["rotary"], call["width"])
        parts.append((starts[i], g.transpose(1, 2).flatten(2).flatten(0, 1)))
    return torch.cat([p for _, p in sorted(parts, key=lambda p: p[0])], 1)


def launch(
    call: Call, grads: Sequence[Tensor], tables: Sequence[Tensor | None], scale: Tensor, both: Both, saturate: bool, starts: Sequence[int]
) -> None:
    """Runs the kernel, which fills `both`."""
    from te_dynamo.lowering.kernels.qkv_gradient_triton import qkv_gradient_kernel

    grads = [g if g.stride(-1) == 1 else g.contiguous() for g in grads]
    tables = [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tables]
    b, _, s, d = grads[0].shape
    rows, heads = b * s, [g.shape[1] for g in grads]
    total = both.data.shape[0] or both.transposed.shape[1]
    cos, sin = (None if t is None else t.expand(b, 1, s, t.shape[-1]) for t in tables)
    strides = [g.stride(i) for g in grads for i in (0, 1, 2)]
    strides += [0 if t is None else t.stride(i) for t in (cos, sin) for i in (0, 2)]
    if both.amaxes.numel():
        qkv_gradient_kernel[(both.amaxes.numel(),)](
            *grads,
            grads[0] if cos is None else cos,
            grads[0] if sin is None else sin,
            scale,
            *both,
            rows,
            total,
            sum(heads) * d,
            s,
            *(h * d for h in heads),
            *starts,
            call["width"],
            *strides,
            D=d,
            ROTARY=ROTARY[call["rotary"]],
            COS_PAIRS=cos is not None and cos.shape[-1] != call["width"],
            SIN_PAIRS=sin is not None and sin.shape[-1] != call["width"],
            ACROSS=bool(both.transposed.numel()),
            SUMS=bool(both.sums.numel()),
            **both.constants(saturate),
        )
