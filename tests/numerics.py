"""Error measures for tests."""

from __future__ import annotations

import torch


def sqnr(reference: torch.Tensor, value: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB; infinite if the two are equal."""
    reference, value = reference.detach().double(), value.detach().double()
    noise = (reference - value).norm()
    return float("inf") if noise == 0 else float(20 * torch.log10(reference.norm() / noise))
