"""An activation whose result is an FP8 operand, and its gradient as one: each read once, written both ways by one kernel.

Hopper's FP8 GEMM takes both operands with the summed dimension innermost, so an operand of forward is wanted transposed by wgrad,
and a gradient both ways. Inductor fuses an activation with its cast, and leaves the transposed copy to a kernel that reads it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from te_dynamo.ir.activation import SPELLINGS
from te_dynamo.lowering.activation import gradients, value
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.fp8 import FP8_MAX
from te_dynamo.lowering.kernels.tiles import BLOCK_COLUMNS, BLOCK_ROWS, Both, blocks, cast, empty_both, fill_both


@torch.library.custom_op("te_dynamo::activation", mutates_args=())
def activation(
    call: str, x: Tensor, up: Tensor | None, scale: Tensor, dtype: torch.dtype, saturate: bool, multiple: int
) -> tuple[Tensor, Tensor, Tensor]:
    """call: of an `ops.activation`; x, up: [T, N], whose rows may lie apart; scale: f32, 0-d -> (FP8 [T', N], FP8 [N, T'], amaxes f32).

    T': T up to a multiple. saturate: infinities become the largest number, not NaN.
    """
    both = _empty(x, dtype, multiple)
    if x.device.type == "cuda":
        launch(Call.parse(call), x, up, scale, both, saturate)
    else:
        made = value(Call.parse(call), x, up)
        fill_both(both, made, cast(made, scale, dtype, saturate))
    return both.data, both.transposed, both.amaxes


@activation.register_fake
def _(call, x, up, scale, dtype, saturate, multiple):
    return tuple(_empty(x, dtype, multiple)[:3])


def _empty(x: Tensor, dtype: torch.dtype, multiple: int) -> Both:
    return empty_both(x, x.shape[0], [x.shape[1]], dtype, multiple, data=True, transposed=True, sums=False)


@torch.library.custom_op("te_dynamo::activation_gradient", mutates_args=())
def activation_gradient(
    call: str,
    grad: Tensor,
    x: Tensor,
    up: Tensor | None,
    scale: Tensor,
    dtype: torch.dtype,
    saturate: bool,
    multiple: int,
    starts: list[int],
    data: bool,
    transposed: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad: [T, N], of an activation's result; the rest as above -> `tiles.Both` of the gradients of x and up side by side.

    starts: the column at which each begins. data, transposed, sums: which are wanted.
    """
    both = _empty_gradient(x, up, dtype, multiple, data, transposed, sums)
    if x.device.type == "cuda":
        launch_gradient(Call.parse(call), grad, x, up, scale, both, saturate, starts)
    else:
        parts = sorted(zip(starts, gradients(Call.parse(call), grad, x, up), strict=False), key=lambda p: p[0])
        whole = torch.cat([p for _, p in parts if p is not None], 1)
        fill_both(both, whole, cast(whole, scale, dtype, saturate))
    return both.data, both.transposed, both.amaxes, both.sums


@activation_gradient.register_fake
def _(call, grad, x, up, scale, dtype, saturate, multiple, starts, data, transposed, sums):
    return tuple(_empty_gradient(x, up, dtype, multiple, data, transposed, sums))


def _empty_gradient(x: Tensor, up: Tensor | None, dtype: torch.dtype, multiple: int, data: bool, transposed: bool, sums: bool) -> Both:
    widths = [x.shape[1]] * (1 if up is None else 2)
    return empty_both(x, x.shape[0], widths, dtype, multiple, data, transposed, sums)


def _told(call: Call) -> tuple[tuple[float, float], dict[str, Any]]:
    """What a kernel is told of an activation: numbers, and constants."""
    function = SPELLINGS[call["spelling"]].function
    limited = function == "clamped_swiglu"
    alpha = call["alpha"] if limited else 1.702 if function == "quick_gelu" else 1.0
    return (alpha, call["limit"]), {"FUNCTION": "silu" if limited else function, "LIMITED": limited}


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def launch(call: Call, x: Tensor, up: Tensor | None, scale: Tensor, both: Both, saturate: bool) -> None:
    """Runs the kernel, which fills `both`."""
    from te_dynamo.lowering.kernels.activation_triton import activation_kernel

    x, other = _rows(x), None if up is None else _rows(up)
    (rows, width), total = x.shape, both.data.shape[0]
    numbers, constants = _told(call)
    if both.amaxes.numel():
        activation_kernel[(blocks(total, BLOCK_ROWS) * blocks(width, BLOCK_COLUMNS),)](
            x,
            x if other is None else other,
            scale,
            both.data,
            both.transposed,
            both.amaxes,
            rows,
            total,
            width,
            x.stride(0),
            0 if other is None else other.stride(0),
            *numbers,
            **constants,
            GATED=other is not None,
            TOP=FP8_MAX[both.data.dtype],
            ACROSS=True,
            SATURATE=saturate,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=8,
        )


def launch_gradient(
    call: Call, grad: Tensor, x: Tensor, up: Tensor | None, scale: Tensor, both: Both, saturate: bool, starts: Sequence[int]
) -> None:
    """Runs the kernel, which fills `both`."""
    from te_dynamo.lowering.kernels.activation_triton import activation_gradient_kernel

    x, other = _rows(x), None if up is None else _rows(up)
    (rows, width), parts = x.shape, 1 if other is None else 2
    total = both.data.shape[0] or both.transposed.shape[1] or rows
    numbers, constants = _told(call)
    if both.amaxes.numel():
        activation_gradient_kernel[(both.amaxes.numel() // parts,)](
            grad.contiguous(),
            x,
            x if other is None else other,
            scale,
            both.data,
            both.transposed,
            both.amaxes,
            both.sums,
            rows,
            total,
            width,
            parts * width,
            starts[0],
            starts[-1],
            x.stride(0),
            0 if other is None else other.stride(0),
            *numbers,
            **constants,
            GATED=other is not None,
            TOP=FP8_MAX[both.data.dtype],
            DATA=bool(both.data.numel()),
            ACROSS=bool(both.transposed.numel()),
            SUMS=bool(both.sums.numel()),
            SATURATE=saturate,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=8,
        )
