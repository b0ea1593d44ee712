"""What tests measure with."""

from __future__ import annotations

import torch


def sqnr(reference: torch.Tensor, value: torch.Tensor) -> float:
    """Signal to quantization noise, in dB; infinite where the two are equal."""
    reference, value = reference.detach().double(), value.detach().double()
    noise = (reference - value).norm()
    return float("inf") if noise == 0 else float(20 * torch.log10(reference.norm() / noise))
