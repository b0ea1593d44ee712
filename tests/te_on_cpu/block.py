"""`Float8BlockwiseQTensor`: a float32 scale for each 1 x 128 or each 128 x 128 values.

Scales are stored as the GEMM reads them (P/csrc/quantizer.cpp, Float8BlockQuantizer::get_scale_shape): for 1 x 128 transposed,
[K/128, rows padded to 4], for 128 x 128 [rows/128, K/128 padded to 4]. Padding is zero here, but must not be relied on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.te_on_cpu.rounding import FP8, amax_of, cast, largest, scale_of, write

BLOCK = 128


def fill(output: Any, values: Tensor, quantizer: Any, dtype: torch.dtype) -> None:
    """Quantizes float32 `values` [..., K], made from `dtype`, to the row-wise copy [..., K] and the column-wise [K, ...], with scales."""
    rows = values.reshape(-1, values.shape[-1] if values.dim() else 1)
    copies = (
        (rows, output._rowwise_data, output._rowwise_scale_inv),
        (rows.t(), output._columnwise_data, output._columnwise_scale_inv),
    )
    for matrix, data, scale_inv in copies:
        if data is not None and data.numel():
            height = BLOCK if output._is_2D_scaled else 1
            tiles = _tiles(matrix, height)
            fp8 = FP8[int(quantizer.dtype)]
            scale = scale_of(amax_of(tiles, (1, 3)), fp8, quantizer.amax_epsilon, quantizer.force_pow_2_scales, largest(dtype))
            scaled = _matrix(tiles * scale[:, None, :, None], matrix.shape)
            write(data, cast(scaled, fp8).reshape(data.shape))
            stored = (1 / scale) if output._is_2D_scaled else (1 / scale).t()
            write(scale_inv, pad(stored, (0, scale_inv.shape[1] - stored.shape[1])))


def dequantize(t: Any) -> Tensor:
    """[..., K] in float32."""
    copy = t._rowwise_data
    if copy is not None:
        return _values(t, copy.reshape(-1, copy.shape[-1] if copy.dim() else 1), t._rowwise_scale_inv).reshape(copy.shape)
    copy = t._columnwise_data
    return _values(t, copy.reshape(copy.shape[0], -1), t._columnwise_scale_inv).reshape(copy.shape).movedim(0, -1)


def copy_for_gemm(t: Any, transposed: bool) -> Tensor | None:
    """[rows, K] or, transposed, [K, rows] in float32, from the copy that is stored so; None if there is none."""
    copy = t._columnwise_data if transposed else t._rowwise_data
    if copy is None:
        return None
    rows = copy.flatten(1) if transposed else copy.flatten(0, -2)
    return _values(t, rows, t._columnwise_scale_inv if transposed else t._rowwise_scale_inv)


def _values(t: Any, data: Tensor, scale_inv: Tensor) -> Tensor:
    """data [R, C] bytes."""
    height = BLOCK if t._is_2D_scaled else 1
    tiles = _tiles(data.view(FP8[int(t._fp8_dtype)]).float(), height)
    scales = scale_inv if t._is_2D_scaled else scale_inv.t()
    return _matrix(tiles * scales[: tiles.shape[0], : tiles.shape[2]][:, None, :, None], data.shape)


def _tiles(matrix: Tensor, height: int) -> Tensor:
    """[R, C] to [R/height, height, C/128, 128], padded with zeros."""
    rows, columns = matrix.shape
    down, across = math.ceil(rows / height), math.ceil(columns / BLOCK)
    return pad(matrix, (0, across * BLOCK - columns, 0, down * height - rows)).reshape(down, height, across, BLOCK)


def _matrix(tiles: Tensor, shape: torch.Size) -> Tensor:
    down, height, across, width = tiles.shape
    return tiles.reshape(down * height, across * width)[: shape[0], : shape[1]]
