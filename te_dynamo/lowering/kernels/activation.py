"""An activation whose result is an FP8 operand, and the gradient of an activation as one. In each direction one kernel reads the inputs
once and writes FP8 both ways: the matrix and its transposed copy.

Hopper's FP8 GEMM takes both operands with the summed dimension innermost, so wgrad needs the transposed copy of a forward operand, and a
gradient is needed both ways. Inductor fuses an activation with its cast, but leaves the transposed copy to a kernel that reads the
result again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from te_dynamo.ir.activation import SPELLINGS
from te_dynamo.lowering.activation import gradients, value
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.kernels.tiles import (
    Both,
    KeptInputs,
    cast,
    empty_both,
    empty_kept,
    fill_both,
    fill_kept,
)


@torch.library.custom_op("te_dynamo::activation", mutates_args=())
def activation(
    call: str,
    inputs: list[Tensor | None],
    kept: list[Tensor],
    scale: Tensor,
    dtype: torch.dtype,
    saturate: bool,
    multiple: int,
    data: bool,
    transposed: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """call: an `ops.activation`; inputs: x and up, [T, N], of any row stride, or none if `kept` holds the fields of `tiles.KeptInputs` for
    them; scale: f32, 0-d -> (FP8 [T', N], FP8 [N, T'], amaxes f32, the fields of `tiles.KeptInputs` for x and up).

    T': T rounded up to `multiple`. saturate: infinities become the largest number, not NaN. data, transposed, keep: which results are
    wanted.
    """
    both, keeping = _empty(inputs, kept, dtype, multiple, data, transposed, keep)
    if scale.device.type == "cuda":
        launch(Call.parse(call), inputs, kept, scale, both, keeping, saturate)
    else:
        x, up = inputs_of(inputs, kept)
        made = value(Call.parse(call), x, up)
        fill_both(both, made, cast(made, scale, dtype, saturate))
        fill_kept(keeping, [t for t in (x, up) if t is not None] if keep else [])
    return both.data, both.transposed, both.amaxes, *keeping


@activation.register_fake
def _(call, inputs, kept, scale, dtype, saturate, multiple, data, transposed, keep):
    both, keeping = _empty(inputs, kept, dtype, multiple, data, transposed, keep)
    return (*both[:3], *keeping)


def _empty(
    inputs: Sequence[Tensor | None], kept: Sequence[Tensor], dtype: torch.dtype, multiple: int, data: bool, transposed: bool, keep: bool
) -> tuple[Both, KeptInputs]:
    given = list(kept[0]) if kept else [t for t in inputs if t is not None]
    rows, width = given[0].shape
    both = empty_both(given[0], rows, [width], dtype, multiple, data, transposed, sums=False)
    return both, empty_kept(given[0], len(given) if keep else 0, rows, width)


@torch.library.custom_op("te_dynamo::activation_gradient", mutates_args=())
def activation_gradient(
    call: str,
    grad: Tensor,
    inputs: list[Tensor | None],
    kept: list[Tensor],
    scale: Tensor,
    dtype: torch.dtype,
    saturate: bool,
    multiple: int,
    starts: list[int],
    data: bool,
    transposed: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad: [T, N], of an activation's result; inputs: x and up, or none if `kept` holds them (`tiles.KeptInputs`); the rest as above ->
    `tiles.Both` of the gradients of x and up side by side.

    starts: the column at which each begins. data, transposed, sums: which results are wanted.
    """
    both = _empty_gradient(grad, len(starts), dtype, multiple, data, transposed, sums)
    if grad.device.type == "cuda":
        launch_gradient(Call.parse(call), grad, inputs, kept, scale, both, saturate, starts)
    else:
        x, up = inputs_of(inputs, kept)
        parts = sorted(zip(starts, gradients(Call.parse(call), grad, x, up), strict=False), key=lambda p: p[0])
        whole = torch.cat([p for _, p in parts if p is not None], 1)
        fill_both(both, whole, cast(whole, scale, dtype, saturate))
    return both.data, both.transposed, both.amaxes, both.sums


@activation_gradient.register_fake
def _(call, grad, inputs, kept, scale, dtype, saturate, multiple, starts, data, transposed, sums):
    return tuple(_empty_gradient(grad, len(starts), dtype, multiple, data, transposed, sums))


def _empty_gradient(grad: Tensor, parts: int, dtype: torch.dtype, multiple: int, data: bool, transposed: bool, sums: bool) -> Both:
    return empty_both(grad, grad.shape[0], [grad.shape[1]] * parts, dtype, multiple, data, transposed, sums)


def inputs_of(inputs: Sequence[Tensor | None], kept: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """x and up: as given, or dequantized to f32 if they were kept."""
    if kept:
        made = KeptInputs(*kept)
        return made.part(0), made.part(1) if made.data.shape[0] > 1 else None
    x, up = inputs
    assert x is not None
    return x, up


def _told(call: Call) -> tuple[tuple[float, float], dict[str, Any]]:
    """The arguments that describe an activation to a kernel: numbers, and constants."""
    function = SPELLINGS[call["spelling"]].function
    limited = function == "clamped_swiglu"
    alpha = call["alpha"] if limited else 1.702 if function == "quick_gelu" else 1.0
    return (alpha, call["limit"]), {"FUNCTION": "silu" if limited else function, "LIMITED": limited}


def _read(inputs: Sequence[Tensor | None], kept: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a kernel reads, with a column stride of 1."""
    return list(kept[0]) if kept else [t if t.stride(1) == 1 else t.contiguous() for t in inputs if t is not None]


def launch(
    call: Call, inputs: Sequence[Tensor | None], kept: Sequence[Tensor], scale: Tensor, both: Both, keeping: KeptInputs, saturate: bool
) -> None:
    """Runs the kernel, which fills `both` and `keeping`."""
    from te_dynamo.lowering.kernels.activation_triton import activation_kernel

    read = _read(inputs, kept)
    (rows, width), total = read[0].shape, both.data.shape[0] or both.transposed.shape[1]
    numbers, constants = _told(call)
    if both.amaxes.numel():
        activation_kernel[(both.amaxes.numel(),)](
            read[0],
            read[-1],
            kept[1] if kept else scale,
            scale,
            both.data,
            both.transposed,
            both.amaxes,
            *keeping,
            rows,
            total,
            width,
            read[0].stride(0),
            read[-1].stride(0),
            *numbers,
            **constants,
            GATED=len(read) > 1,
            KEPT=bool(kept),
            KEEPS=bool(keeping.data.shape[0]),
            ACROSS=bool(both.transposed.numel()),
            **both.constants(saturate),
        )


def launch_gradient(
    call: Call,
    grad: Tensor,
    inputs: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    scale: Tensor,
    both: Both,
    saturate: bool,
    starts: Sequence[int],
) -> None:
    """Runs the kernel, which fills `both`."""
    from te_dynamo.lowering.kernels.activation_triton import activation_gradient_kernel

    read = _read(inputs, kept)
    (rows, width), parts = grad.shape, len(starts)
    total = both.data.shape[0] or both.transposed.shape[1] or rows
    numbers, constants = _told(call)
    if both.amaxes.numel():
        activation_gradient_kernel[(both.amaxes.numel() // parts,)](
            grad.contiguous(),
            read[0],
            read[-1],
            kept[1] if kept else scale,
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
            read[0].stride(0),
            read[-1].stride(0),
            *numbers,
            **constants,
            GATED=parts > 1,
            KEPT=bool(kept),
            ACROSS=bool(both.transposed.numel()),
            SUMS=bool(both.sums.numel()),
            **both.constants(saturate),
        )
