"""The numerics of every quantizer: amax, scale, the cast to FP8; and the element types that a GEMM or a norm writes."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = {7: torch.float8_e4m3fn, 8: torch.float8_e5m2}  # tex.DType
HIGH_PRECISION = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16}  # tex.DType
FLOAT32_MAX = torch.finfo(torch.float32).max
_EXPONENT = 0x7F800000


def largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


def amax_of(values: Tensor, dims: int | tuple[int, ...] | None = None) -> Tensor:
    """max |values| over `dims` (all of them: [1]). A NaN does not count (the kernels' fmaxf, C/cast/fp8/quantize_fp8.cuh:175)."""
    if values.numel() == 0:
        return torch.zeros(1) if dims is None else values.sum(dims)
    magnitudes = values.abs().nan_to_num(nan=0.0, posinf=torch.inf)
    return magnitudes.amax().reshape(1) if dims is None else magnitudes.amax(dims)


def scale_of(amax: Tensor, fp8: torch.dtype, epsilon: float, power_of_2: bool, instead_of_inf: float = FLOAT32_MAX) -> Tensor:
    """The factor that maps `amax` to the largest FP8 number, elementwise; 1 if the amax is 0 or infinite.

    instead_of_inf: the scale for an amax so small that its scale would overflow float32. C/recipe/recipe_common.cuh:14.
    """
    amax = amax.clamp(min=epsilon)
    # Divides two tensors, like the kernel: torch computes a scalar over a tensor as a reciprocal and a product.
    scale = torch.full_like(amax, largest(fp8)) / amax
    scale = torch.where(scale.isinf(), torch.full_like(scale, instead_of_inf), scale)
    scale = torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))
    if power_of_2:  # the mantissa is truncated
        scale = (scale.view(torch.int32) & _EXPONENT).view(torch.float32)
    return scale


def write(target: Tensor, values: Tensor) -> None:
    """Writes in place like a kernel, which does not care whether `target` was made in inference mode."""
    with torch.inference_mode():
        target.copy_(values)


def cast(values: Tensor, fp8: torch.dtype) -> Tensor:
    """float32 to the bytes of FP8, to nearest even; too large values saturate, a NaN stays NaN."""
    top = largest(fp8)
    return values.clamp(-top, top).to(fp8).view(torch.uint8)
