"""What counts as masked. Models express "never attends" as -inf, as their dtype's lowest number, or as some large negative number."""

from __future__ import annotations

import torch

# A score that is *set* to this or less is masked: BERT-era code fills with -1e4, and exp(-1e4) is 0 in every dtype.
FILL = -1e4

# The lowest score that FP8 attention's definition computes with. Added to -3e38, the logarithm of a row's sum would be lost, and
# backward could not recompute a fully masked row.
LEAST_SCORE = -(2.0**14)


def lowest(dtype: torch.dtype) -> float:
    """The highest number that masks a score when *added* to it: bfloat16's lowest number absorbs any score in wider dtypes too."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
