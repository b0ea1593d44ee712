"""One kernel that takes the gradients of q, k and v back through RoPE and QK-norm and writes the FP8 gradient of the GEMM that made them,
both as it is and transposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from te_dynamo.ir.qkv import rotate, rotate_gradient
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.kernels.qkv import NORM, ROTARY
from te_dynamo.lowering.kernels.tiles import BLOCK_COLUMNS, BLOCK_ROWS, Both, blocks, cast, empty_both, fill_both, padded


@torch.library.custom_op("te_dynamo::qkv_gradient", mutates_args=())
def qkv_gradient(
    call: str,
    grads: list[Tensor],
    inputs: list[Tensor | None],
    scale: Tensor,
    dtype: torch.dtype,
    saturate: bool,
    multiple: int,
    starts: list[int],
    data: bool,
    transposed: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """call, inputs: of an `ops.qkv`, which may leave out q and k if nothing is normalized, and v; grads: of its results, q [B, H, S, D], k
    and v [B, H_kv, S, D] -> `tiles.Both` of the gradients of q, k and v side by side, [B S, ...]; and norm_sums.

    starts: the column at which each begins. data, transposed, sums: which results are wanted.
    norm_sums: f32 [n, blocks of rows, H + H_kv, D], whose sums over the blocks and the heads of q or k are the gradients of its norm's
    weight and, if n is 2, bias; empty without weights.
    """
    both, norm_sums = _empty(grads, inputs, dtype, multiple, data, transposed, sums)
    parsed = Call.parse(call)
    if grads[0].device.type == "cuda":
        launch(parsed, grads, inputs, scale, both, norm_sums, saturate, starts)
    else:
        whole, *summed = defined(parsed, grads, inputs, starts)
        fill_both(both, whole, cast(whole, scale, dtype, saturate))
        norm_sums.zero_()
        for target, made in zip(norm_sums, summed, strict=False):
            target[-1] = made  # only the last block's, as in `fill_both`
    return (*both, norm_sums)


@qkv_gradient.register_fake
def _(call, grads, inputs, scale, dtype, saturate, multiple, starts, data, transposed, sums):
    both, norm_sums = _empty(grads, inputs, dtype, multiple, data, transposed, sums)
    return (*both, norm_sums)


def _empty(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    multiple: int,
    data: bool,
    transposed: bool,
    sums: bool,
) -> tuple[Both, Tensor]:
    b, _, s, d = grads[0].shape
    both = empty_both(grads[0], b * s, [int(g.shape[1] * d) for g in grads], dtype, multiple, data, transposed, sums)
    vectors = sum(t is not None for t in inputs[5:]) // 2
    heads, down = grads[0].shape[1] + grads[1].shape[1], blocks(padded(b * s, multiple), BLOCK_ROWS)
    shape = (vectors, down, heads, d) if vectors else (0, 0, 0, 0)
    return both, grads[0].new_empty(shape, dtype=torch.float32)


def through(
    call: Call, x: Tensor | None, grad: Tensor, cos: Tensor | None, sin: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of x [B, H, S, D], which is read only for a norm; and what to add up over B and S for the gradients of the norm's weight
    and bias, [B, H, S, D]. All in float32 at least."""
    computed_in = torch.promote_types(grad.dtype, torch.float32)
    g = grad.to(computed_in)

    def unrotated(g: Tensor) -> Tensor:
        return g if cos is None or sin is None else rotate_gradient(g, cos, sin, call["rotary"], call["width"])

    if not call["normalized"] or x is None:
        return unrotated(g), None, None
    x = x.to(computed_in)
    if call["norm_last"]:
        x = x if cos is None or sin is None else rotate(x, cos, sin, call["rotary"], call["width"])
    else:
        g = unrotated(g)
    centered = x - x.mean(-1, keepdim=True) if call["normalized"] == "layer" else x
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + call["eps"])
    normalized = centered * rstd
    d_weight, d_bias = None if weight is None else g * normalized, None if bias is None else g
    if weight is not None:
        g = g * (1 + weight.to(computed_in) if call["zero_centered"] else weight.to(computed_in))
    dx = g - normalized * (g * normalized).mean(-1, keepdim=True)
    if call["normalized"] == "layer":
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * rstd
    return unrotated(dx) if call["norm_last"] else dx, d_weight, d_bias


def defined(call: Call, grads: Sequence[Tensor], inputs: Sequence[Tensor | None], starts: Sequence[int]) -> list[Tensor]:
    """The gradients side by side, in float32; then the sums of a norm's weight and bias, [H + H_kv, D], if it has these."""
    q, k, _, cos, sin, *vectors = inputs
    given: list[Any] = [(q, *vectors[0::2]), (k, *vectors[1::2])]
    made = [through(call, x, grad.float(), cos, sin, *two) for grad, (x, *two) in zip(grads, given, strict=False)]
    rows = [t.transpose(1, 2).flatten(2).flatten(0, 1) for t in (made[0][0], made[1][0], *(g.float() for g in grads[2:]))]
    whole = torch.cat([part for _, part in sorted(zip(starts, rows, strict=True), key=lambda p: p[0])], 1)
    return [whole, *(torch.cat([t.sum((0, 2)) for t in both]) for both in zip(*(m[1:] for m in made), strict=True) if both[0] is not None)]


def launch(
    call: Call,
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    scale: Tensor,
    both: Both,
    norm_sums: Tensor,
    saturate: bool,
    starts: Sequence[int],
) -> None:
    """Runs the kernel, which fills `both` and `norm_sums`."""
    from te_dynamo.lowering.kernels.qkv_gradient_triton import qkv_gradient_kernel

    grads = [g if g.stride(-1) == 1 else g.contiguous() for g in grads]
    q, k, _, cos, sin, q_weight, k_weight, *biases = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in inputs)
    b, _, s, d = grads[0].shape
    rows, heads, normalized = b * s, [g.shape[1] for g in grads], NORM[call["normalized"]]
    total = both.data.shape[0] or both.transposed.shape[1]
    cos, sin = (None if t is None else t.expand(b, 1, s, t.shape[-1]) for t in (cos, sin))
    strides = [0 if t is None else t.stride(i) for t in (*grads, q, k) for i in (0, 1, 2)]
    strides += [0 if t is None else t.stride(i) for t in (cos, sin) for i in (0, 2)]
    steps = d // BLOCK_COLUMNS if normalized else 1
    if both.amaxes.numel():
        qkv_gradient_kernel[(both.amaxes.numel() // steps,)](
            *grads,
            *(grads[0] if t is None else t for t in (q, k, q_weight, k_weight, cos, sin)),
            scale,
            *both,
            norm_sums,
            rows,
            total,
            sum(heads) * d,
            s,
            *(h * d for h in heads),
            *starts,
            call["width"],
            call["eps"],
            *strides,
            D=d,
            STEPS=steps,
            NORM=normalized,
            ZERO_CENTERED=call["zero_centered"],
            WEIGHT=q_weight is not None,
            BIAS=biases[0] is not None,
            ROTARY=ROTARY[call["rotary"]],
            COS_PAIRS=cos is not None and cos.shape[-1] != call["width"],
            SIN_PAIRS=sin is not None and sin.shape[-1] != call["width"],
            ACROSS=bool(both.transposed.numel()),
            SUMS=bool(both.sums.numel()),
            **both.constants(saturate),
        )
