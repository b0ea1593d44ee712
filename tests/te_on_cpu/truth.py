"""FP8 by its definition, in float64 and without torch's casts: the reference for the stand-ins."""

from __future__ import annotations

import torch
from torch import Tensor

#           mantissa bits, smallest exponent, largest number
FORMATS = {7: (3, -6, 448.0), 8: (2, -14, 57344.0)}  # by tex.DType: E4M3, E5M2


def round_to_fp8(values: Tensor, dtype: int) -> Tensor:
    """The nearest FP8 number, ties to even, saturating. float64."""
    mantissa, smallest, top = FORMATS[dtype]
    x = values.double()
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-100))).clamp(min=smallest)
    step = torch.exp2(exponent - mantissa)
    return (torch.round(x / step) * step).clamp(-top, top)


def decode(data: Tensor, dtype: int) -> Tensor:
    """Decodes bytes: sign, exponent, mantissa. float64; no infinities or NaNs."""
    mantissa, smallest, _ = FORMATS[dtype]
    bits = data.int()
    sign = 1.0 - 2.0 * (bits >> 7)
    exponent, fraction = (bits & 0x7F) >> mantissa, (bits & (2**mantissa - 1)).double() / 2**mantissa
    normal = torch.exp2((exponent - 1 + smallest).double()) * (1 + fraction)
    return sign * torch.where(exponent == 0, 2.0**smallest * fraction, normal)
