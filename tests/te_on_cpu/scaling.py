"""Delayed scaling's update: moves amaxes into the histories, and computes new scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu.rounding import FLOAT32_MAX, FP8, write


def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: Tensor,
    amax_histories: Sequence[Tensor],
    scales: Sequence[Tensor],
    amax_compute_algo: str,
    fp8_dtype: Any,
    margin: float,
) -> None:
    """Updates in place. amax_reduction_buffer: [sum n]; amax_histories: [length, n] each, entry 0 is being written; scales: [n] each."""
    top, start = torch.finfo(FP8[int(fp8_dtype)]).max, 0
    for history, scale in zip(amax_histories, scales, strict=True):
        reduced = amax_reduction_buffer[start : start + scale.numel()]
        start += scale.numel()
        last = torch.where(reduced != 0, reduced, history[0])
        moved = last != 0
        rolled = torch.roll(history, -1, 0)
        rolled[-1] = last
        amax = rolled.amax(0) if amax_compute_algo == "max" else last  # the oldest entry counts one last time, then is dropped
        rolled[0] = 0
        write(history, torch.where(moved, rolled, history))
        # Divides two tensors, like the kernel: torch computes a scalar over a tensor as a reciprocal and a product.
        fresh = (torch.full_like(amax, top * 2.0**-margin) / amax).clamp(max=FLOAT32_MAX)
        write(scale, torch.where(moved & torch.isfinite(amax) & (amax > 0), fresh, scale))
