"""`MXFP8Tensor`: an E8M0 scale, a power of two in a byte, for each 32 values along a row or along a column.

Neither copy is transposed: the column-wise one is [..., K] as well, with blocks of 32 rows. Scales are padded: the row-wise ones,
[rows, K/32], to multiples of [128, 4], the column-wise ones, [rows/32, K], to multiples of [4, 128]. Padding is zero here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu.rounding import FP8, amax_of, cast, largest, write

BLOCK = 32
_TILE_ROWS, _TILE_COLUMNS = 128, 4  # of the scales' tiles, in the order that cuBLAS reads


def fill(output: Any, values: Tensor, quantizer: Any, dtype: torch.dtype) -> None:
    """Quantizes float32 `values` [..., K] to both copies, with scales. Raises RuntimeError if blocks do not divide the shape."""
    rows = values.reshape(-1, values.shape[-1])
    if rows.shape[0] % BLOCK or rows.shape[1] % BLOCK:
        raise RuntimeError(f"MXFP8 requires tensor dims that are divisible by {BLOCK} (got shape {list(values.shape)})")
    fp8 = FP8[int(quantizer.dtype)]
    tiles = rows.reshape(rows.shape[0] // BLOCK, BLOCK, rows.shape[1] // BLOCK, BLOCK)
    square = amax_of(tiles, (1, 3)) if quantizer.with_2d_quantization else None
    if output._rowwise_data is not None:
        amax = amax_of(tiles, 3).flatten(0, 1) if square is None else square.repeat_interleave(BLOCK, 0)
        exponents = e8m0(amax, fp8)  # [rows, K/32]
        data = rows * reciprocal(exponents).repeat_interleave(BLOCK, 1)
        write(output._rowwise_data, cast(data, fp8).reshape(output._rowwise_data.shape))
        _store(output, output._rowwise_scale_inv, exponents, rowwise=True)
    if output._columnwise_data is not None:
        amax = amax_of(tiles, 1).flatten(1, 2) if square is None else square.repeat_interleave(BLOCK, 1)
        exponents = e8m0(amax, fp8)  # [rows/32, K]
        data = rows * reciprocal(exponents).repeat_interleave(BLOCK, 0)
        write(output._columnwise_data, cast(data, fp8).reshape(output._columnwise_data.shape))
        _store(output, output._columnwise_scale_inv, exponents, rowwise=False)


def dequantize(t: Any) -> Tensor:
    """[..., K] in float32."""
    rowwise = t._rowwise_data is not None
    data = t._rowwise_data if rowwise else t._columnwise_data
    return _values(t, rowwise).reshape(data.shape)


def copy_for_gemm(t: Any, transposed: bool) -> Tensor | None:
    """[rows, K] or, transposed, [K, rows] in float32, with blocks along the second dimension; None if the copy is missing."""
    if (t._columnwise_data if transposed else t._rowwise_data) is None:
        return None
    return _values(t, rowwise=False).t() if transposed else _values(t, rowwise=True)


def e8m0(amax: Tensor, fp8: torch.dtype) -> Tensor:
    """uint8: the exponent of amax / largest, rounded up, with a bias of 127; 0 for 0, 254 for an infinity.

    C/util/ptx_arch_spec.cuh:72.
    """
    ratio = amax * torch.tensor(1 / largest(fp8), dtype=torch.float32)
    bits = ratio.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(ratio.isinf(), torch.full_like(exponent, 0xFE), exponent + up)
    return exponent.to(torch.uint8)


def reciprocal(exponents: Tensor) -> Tensor:
    """2^(127 - exponent) in float32."""
    return torch.ldexp(torch.ones(exponents.shape), 127 - exponents.int())


def swizzle(scales: Tensor) -> Tensor:
    """Row-major scales [128 i, 4 j] to cuBLAS's order, shape kept: tiles of 128 x 4, in each tile row r at 16 (r % 32) + 4 (r / 32).

    C/cast/mxfp8/swizzle.cuh:30.
    """
    down, across = scales.shape[0] // _TILE_ROWS, scales.shape[1] // _TILE_COLUMNS
    return scales.reshape(down, 4, 32, across, 4).permute(0, 3, 2, 1, 4).reshape(scales.shape)


def unswizzle(scales: Tensor) -> Tensor:
    down, across = scales.shape[0] // _TILE_ROWS, scales.shape[1] // _TILE_COLUMNS
    return scales.reshape(down, across, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(scales.shape)


def swizzle_scales_for_gemm_(arg0: Any) -> None:
    """Puts the scales of a tensor in cuBLAS's order, once. Other kinds of tensors are left alone."""
    if not hasattr(arg0, "_with_gemm_swizzled_scales") or arg0._with_gemm_swizzled_scales:
        return
    for scale_inv, rowwise in ((arg0._rowwise_scale_inv, True), (arg0._columnwise_scale_inv, False)):
        if scale_inv is not None:
            write(scale_inv, _swizzled(scale_inv.clone(), rowwise))
    arg0._with_gemm_swizzled_scales = True


def _swizzled(scale_inv: Tensor, rowwise: bool) -> Tensor:
    """A column-wise scale is swizzled as its transpose, and kept in its own shape."""
    return swizzle(scale_inv) if rowwise else swizzle(scale_inv.t().contiguous()).reshape(scale_inv.shape)


def _store(t: Any, scale_inv: Tensor, exponents: Tensor, rowwise: bool) -> None:
    padded = torch.zeros_like(scale_inv)
    padded[: exponents.shape[0], : exponents.shape[1]] = exponents
    write(scale_inv, _swizzled(padded, rowwise) if t._with_gemm_swizzled_scales else padded)


def _values(t: Any, rowwise: bool) -> Tensor:
    """[rows, K] in float32 from one of the copies."""
    data, scale_inv = (t._rowwise_data, t._rowwise_scale_inv) if rowwise else (t._columnwise_data, t._columnwise_scale_inv)
    if t._with_gemm_swizzled_scales:
        scale_inv = unswizzle(scale_inv) if rowwise else unswizzle(scale_inv.reshape(scale_inv.shape[::-1])).t()
    values = data.reshape(-1, data.shape[-1]).contiguous().view(FP8[int(t._fp8_dtype)]).float()
    scales = torch.ldexp(torch.ones(scale_inv.shape), scale_inv.int() - 127).repeat_interleave(BLOCK, 1 if rowwise else 0)
    return values * scales[: values.shape[0], : values.shape[1]]
