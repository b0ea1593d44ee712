"""The cast of q or k for FP8 attention: the keys' mean is subtracted from k, the result rotated and cast, in one read (see
`lowering.rotation`)."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from te_dynamo.lowering.fp8 import FP8_MAX, Casting, amax
from te_dynamo.lowering.rotation import mixed_channels, rotated

BLOCK = 64  # rows in a program
WIDEST = 128  # channels: a matrix of 256 x 256 does not fit next to the rows


@torch.library.custom_op("te_dynamo::cast_rotated", mutates_args=())
def cast_rotated(x: Tensor, center: Tensor | None, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x: 16 bits, [.., .., H, D] of any strides; center: as x, with size 1 in dimensions that share it; scale: f32, 0-d -> (FP8 as x,
    contiguous; amaxes f32 [programs], the largest is that of the values before the cast)."""
    made = _empty(x, dtype)
    if x.device.type == "cuda" and x.shape[-1] <= WIDEST:
        launch(x, center, scale, *made)
    else:
        _reference(x, center, scale, *made)
    return made


@cast_rotated.register_fake
def _(x, center, scale, dtype):
    return _empty(x, dtype)


def _empty(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] * x.shape[1] * x.shape[2]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((rows + BLOCK - 1) // BLOCK, dtype=torch.float32)


def _reference(x: Tensor, center: Tensor | None, scale: Tensor, data: Tensor, amaxes: Tensor) -> None:
    """The definition, for devices without Triton. Only the last amax is set, so that tests catch code that reads only the first."""
    values = rotated((x.float() if center is None else x.float() - center.float()).bfloat16().float())
    data.copy_(Casting().saturated(values, scale, data.dtype).to(data.dtype))
    amaxes.zero_()
    amaxes[-1:] = amax(values)


def launch(x: Tensor, center: Tensor | None, scale: Tensor, data: Tensor, amaxes: Tensor) -> None:
    """Runs the kernel, which fills the last two."""
    width = x.shape[3]
    apart = (0, 0, 0, 0) if center is None else [0 if size == 1 else step for size, step in zip(center.shape, center.stride(), strict=True)]
    if x.numel():
        _kernel()[(amaxes.shape[0],)](
            x,
            x if center is None else center,
            scale,
            data,
            amaxes,
            x.shape[0] * x.shape[1] * x.shape[2],
            x.shape[1],
            x.shape[2],
            width,
            *x.stride(),
            *apart,
            TOP=FP8_MAX[data.dtype],
            MIXED=mixed_channels(width),
            NORM=mixed_channels(width) ** -0.5,
            CENTER=center is not None,
            BLOCK=BLOCK,
            WIDE=max(16, 1 << (width - 1).bit_length()),
            INTERPRETED=os.environ.get("TRITON_INTERPRET") == "1",
            num_warps=8,
        )


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def cast_rotated_kernel(
        x, center, scale, data, amaxes, rows, second, heads, width,
        step_0, step_1, step_2, step_3, center_0, center_1, center_2, center_3,
        TOP: tl.constexpr, MIXED: tl.constexpr, NORM: tl.constexpr, CENTER: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
        INTERPRETED: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        row = program * BLOCK + tl.arange(0, BLOCK)
        column = tl.arange(0, WIDE)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        head, token = row % heads, row // heads
        i, j = (token // second).to(tl.int64), (token % second).to(tl.int64)
        at = x + (i * step_0 + j * step_1 + head * step_2)[:, None] + column[None, :] * step_3
        values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if CENTER:
            shared = center + (i * center_0 + j * center_1 + head * center_2)[:, None] + column[None, :] * center_3
            values = values - tl.load(shared, mask=inside, other=0.0).to(tl.float32)

        # See `rotation.hadamard`: the signs of a row, times those of Rudin and Shapiro.
        here, there = column[:, None], column[None, :]
        ones = (here & there & (MIXED - 1)) ^ (here & (here >> 1) & (MIXED - 1) & ((MIXED >> 1) - 1))
        ones = ones ^ (ones >> 4)
        ones = ones ^ (ones >> 2)
        ones = ones ^ (ones >> 1)
        matrix = tl.where((here // MIXED) == (there // MIXED), 1.0 - 2.0 * (ones & 1).to(tl.float32), 0.0)
        values = values.to(tl.bfloat16)
        if INTERPRETED:  # it has no products of bfloat16
            values = tl.dot(values.to(tl.float32), matrix)
        else:
            values = tl.dot(values, matrix.to(tl.bfloat16))
        values *= NORM

        # No min, max or clamp of values: see `cast_transpose.py`.
        magnitude = tl.where(values == values, tl.abs(values), 0.0)  # a NaN does not count
        tl.store(amaxes + program, tl.max(magnitude))
        scaled = values * tl.load(scale)
        scaled = tl.where(scaled > TOP, TOP, scaled)
        scaled = tl.where(scaled < -TOP, -TOP, scaled)
        scaled = tl.where(magnitude == float("inf"), float("nan"), scaled)
        target = data + row[:, None].to(tl.int64) * width + column[None, :]
        tl.store(target, scaled.to(data.dtype.element_ty), mask=inside)

    return cast_rotated_kernel
