"""The cast of an activation or a gradient that is already in memory: one read gives FP8 both ways (the matrix and its transposed copy), the
amax and the column sums. If an Inductor kernel computes the values, Inductor does the cast."""

from __future__ import annotations

import torch
from torch import Tensor

from te_dynamo.lowering.kernels.tiles import Both, cast, empty_both, fill_both


@torch.library.custom_op("te_dynamo::cast_both", mutates_args=())
def cast_both(
    x: Tensor, scale: Tensor, dtype: torch.dtype, saturate: bool, multiple: int, data: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x: [T, N]; scale: f32, 0-d -> `tiles.Both`, with the transposed copy. saturate: infinities become the largest number, not NaN."""
    both = _empty(x, dtype, multiple, data, sums)
    if x.device.type == "cuda":
        launch(x, scale, both, saturate)
    else:
        fill_both(both, x.float(), cast(x, scale, dtype, saturate))
    return both.data, both.transposed, both.amaxes, both.sums


@cast_both.register_fake
def _(x, scale, dtype, saturate, multiple, data, sums):
    return tuple(_empty(x, dtype, multiple, data, sums))


def _empty(x: Tensor, dtype: torch.dtype, multiple: int, data: bool, sums: bool) -> Both:
    return empty_both(x, x.shape[0], [int(x.shape[1])], dtype, multiple, data, True, sums)


def launch(x: Tensor, scale: Tensor, both: Both, saturate: bool) -> None:
    """Runs the kernel, which fills `both`."""
    from te_dynamo.lowering.kernels.tiles_triton import cast_both_kernel

    x = x if x.stride(1) == 1 else x.contiguous()
    if both.amaxes.numel():
        cast_both_kernel[(both.amaxes.numel(),)](
            x,
            scale,
            *both,
            x.shape[0],
            both.transposed.shape[1],
            x.shape[1],
            x.stride(0),
            SUMS=bool(both.sums.numel()),
            **both.constants(saturate),
        )
