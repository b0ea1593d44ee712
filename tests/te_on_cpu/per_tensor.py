"""`Float8Tensor`: one scale per tensor, given (delayed scaling) or from its own amax (current scaling)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu.rounding import FP8, amax_of, cast, scale_of, write


def fill(output: Any, values: Tensor, quantizer: Any, dtype: torch.dtype) -> None:
    """Quantizes float32 `values` [..., K] to `_data` [..., K], `_transpose` [K, ...] and `_scale_inv` [1].

    A delayed quantizer's amax becomes the maximum of itself and the tensor's (an atomic max; nothing here resets it).
    """
    fp8 = FP8[int(quantizer.dtype)]
    amax = amax_of(values)
    if hasattr(quantizer, "scale"):
        write(quantizer.amax, torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale
    else:
        scale = scale_of(amax, fp8, quantizer.amax_epsilon, quantizer.force_pow_2_scales)
    data = cast(values * scale.reshape(()), fp8)
    if output._data is not None:
        write(output._data, data)
    if output._transpose is not None:
        write(output._transpose, data.movedim(-1, 0) if data.dim() else data)
        output._transpose_invalid = False
    write(output._scale_inv, (1 / scale).reshape(output._scale_inv.shape))


def dequantize(t: Any) -> Tensor:
    """[..., K] in float32."""
    data = t._data
    if data is None:
        data = t._transpose.movedim(0, -1) if t._transpose.dim() else t._transpose
    return data.contiguous().view(FP8[int(t._fp8_dtype)]).float() * t._scale_inv.reshape(())


def copy_for_gemm(t: Any, transposed: bool) -> Tensor | None:
    """[rows, K] or, transposed, [K, rows] in float32, from the copy that is stored so; None if there is none."""
    copy = (None if t._transpose_invalid else t._transpose) if transposed else t._data
    if copy is None:
        return None
    if not copy.is_contiguous():
        raise RuntimeError(f"an operand of the GEMM has strides {copy.stride()}: the kernel reads memory, row by row")
    rows = copy.reshape(copy.shape[0], -1) if transposed else copy.reshape(-1, copy.shape[-1])
    return rows.view(FP8[int(t._fp8_dtype)]).float() * t._scale_inv.reshape(())
