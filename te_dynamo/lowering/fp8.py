"""FP8 by definition: amax, scale, quantise, dequantise. Plain torch, so that Inductor may fuse it.

An FP8 tensor is `data` and `scale_inv`: value = data * scale_inv. `scale` is what the high-precision value is
multiplied by before the cast. Both are float32. As in Transformer Engine: scale = fp8_max / amax, a cast saturates,
and a NaN element does not count towards the amax (C's fmaxf).
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
FP8_MAX = {E4M3: 448.0, E5M2: 57344.0}
FLOAT32_MAX = torch.finfo(torch.float32).max


def amax(x: Tensor) -> Tensor:
    """The largest magnitude in `x`, of any shape, NaN elements apart; a 0-d float32, 0 for an empty tensor.

    Spelled row by row so that on a GPU it fuses into the kernel that makes `x`.
    """
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    magnitude = x.abs()
    magnitude = torch.where(magnitude.isnan(), torch.zeros_like(magnitude), magnitude)
    return (magnitude.amax(-1).amax() if x.dim() else magnitude).float()


def scale_of(amax: Tensor, dtype: torch.dtype, margin: int = 0) -> Tensor:
    """The scale for a largest magnitude: fp8_max / amax / 2**margin, in float32, elementwise.

    1 where the amax is 0, infinite or NaN; float32's maximum where the quotient overflows. Tensor by tensor, since
    Python's scalar / tensor is a reciprocal and a product, one ulp off.
    """
    scale = torch.full_like(amax, FP8_MAX[dtype] * 2.0**-margin) / amax
    usable = (amax > 0) & torch.isfinite(amax)
    return torch.where(usable, scale.clamp(max=FLOAT32_MAX), torch.ones_like(amax))


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x * scale` in FP8, saturating. x: any shape and float dtype; scale: 0-d float32."""
    top = FP8_MAX[dtype]
    return (x.float() * scale).clamp(-top, top).to(dtype)


def dequantize(data: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that an FP8 tensor stands for."""
    return (data.float() * scale_inv).to(dtype)
