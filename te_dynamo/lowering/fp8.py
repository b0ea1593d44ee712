"""The definition of FP8: amax, scale, quantize, dequantize. Plain torch, so that Inductor can fuse it.

An FP8 tensor is `data` and `scale_inv`: value = data * scale_inv. The high-precision value is multiplied by `scale` before
the cast. Both are float32. As in Transformer Engine: scale = fp8_max / amax, casts saturate, and a NaN element does not
count towards the amax (C's fmaxf).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from te_dynamo.recipe import from_key, margin_of

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
FP8_MAX = {E4M3: 448.0, E5M2: 57344.0}
EXPONENT = 0x7F800000  # the bits of a float32's exponent
LEAST_AMAX = 2.0**-100  # the smallest amax that scales a block: fp8_max / LEAST_AMAX still fits in float32
FLOAT32_MAX = torch.finfo(torch.float32).max


def row_amax(x: Tensor) -> Tensor:
    """The largest magnitude in each row of `x` [..., N], ignoring NaN: float32 [...], 0 for an empty row.

    On a GPU, a row reduction fuses into the kernel that computes and casts `x`.
    """
    if x.shape[-1] == 0:
        return torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
    magnitude = x.abs()
    return torch.where(magnitude.isnan(), torch.zeros_like(magnitude), magnitude).amax(-1).float()


def amax(x: Tensor) -> Tensor:
    """The largest magnitude in `x` of any shape, ignoring NaN: float32, 0-d, 0 for an empty tensor."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    return row_amax(x if x.dim() else x.unsqueeze(0)).amax()


@dataclass(frozen=True)
class Casting:
    """How a per-tensor recipe casts: the dtypes of forward tensors and of gradients, and how an amax becomes a scale.

    margin: powers of two left unused, None for each role's default; power_2_scale: scales are rounded down to a power of two;
    amax_epsilon: the least amax; amax_group: the name of the process group whose ranks share the first scale of a slot, "" for
    none; saturates_infinite: as TE's casts do.
    """

    forward: torch.dtype = E4M3
    gradient: torch.dtype = E5M2
    margin: float | None = 0
    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    amax_group: str = ""
    saturates_infinite: bool = False

    def saturated(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """`x * scale` in float32, ready for the cast. Finite values saturate; infinities become NaN, so that a GradScaler finds the
        overflow, unless the recipe is `like_te`: TE's casts saturate them too."""
        values = saturated(x, scale, dtype)
        return values if self.saturates_infinite else torch.where(torch.isinf(x), torch.nan, values)

    def scale_of(self, amax: Tensor, role: str, *, gradient: bool) -> Tensor:
        """The scale for an amax of a role under this recipe (see `scale_of`)."""
        if self.amax_epsilon:
            amax = amax.clamp(min=self.amax_epsilon)
        scale = scale_of(amax, self.gradient if gradient else self.forward, margin_of(self.margin, role, gradient=gradient))
        return power_of_2(scale) if self.power_2_scale else scale


@lru_cache
def casting_of(recipe: str, amax_group: str = "") -> Casting:
    """The Casting of a recipe's key. `amax_group` matters only to recipes with state: the others use their own rank's amax."""
    values = from_key(recipe)
    options = {name: getattr(values, name) for name in ("margin", "power_2_scale", "amax_epsilon") if hasattr(values, name)}
    options |= {"amax_group": amax_group if values.stateful else "", "saturates_infinite": getattr(values, "like_te", False)}
    return Casting(values.fp8_format.forward, values.fp8_format.gradient, **options)


def scale_of(amax: Tensor, dtype: torch.dtype, margin: float = 0) -> Tensor:
    """The scale for an amax: fp8_max / amax / 2**margin, in float32, elementwise.

    1 where the amax is 0, infinite or NaN; float32's maximum where the quotient overflows. A tensor is divided by a tensor,
    since Python's scalar / tensor is a reciprocal and a product, one ulp off.
    """
    scale = torch.full_like(amax, FP8_MAX[dtype] * 2.0**-margin) / amax
    usable = (amax > 0) & torch.isfinite(amax)
    return torch.where(usable, scale.clamp(max=FLOAT32_MAX), torch.ones_like(amax))


def power_of_2(scale: Tensor) -> Tensor:
    """A scale (f32, positive) rounded down to a power of two: its mantissa is cut off."""
    return (scale.view(torch.int32) & EXPONENT).view(torch.float32)


def saturated(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x * scale` in float32, within the range of `dtype`."""
    top = FP8_MAX[dtype]
    scaled = x.float() * scale
    if x.device.type == "cuda":
        # No min or max here: next to one, Triton has been seen to corrupt transposed FP8 stores (its issue 11111).
        return scaled.masked_fill(scaled > top, top).masked_fill(scaled < -top, -top)
    return scaled.clamp(-top, top)


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x * scale` in FP8, saturating. x: any shape and float dtype; scale: 0-d float32."""
    return saturated(x, scale, dtype).to(dtype)


def dequantize(data: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of an FP8 tensor."""
    return (data.float() * scale_inv).to(dtype)
