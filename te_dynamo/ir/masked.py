"""What counts as masked. Models say "never attends" by -inf, by their dtype's lowest number, or by some large negative one."""

from __future__ import annotations

import torch

# A score that is *set* to this or less is masked: BERT-era code fills with -1e4, and exp(-1e4) is 0 in every dtype.
FILL = -1e4

# The least score that FP8 attention's definition computes with. Beside 3e38 the logarithm of a row's sum would be lost, and
# the backward could not recompute a row in which nothing may be seen.
LEAST_SCORE = -(2.0**14)


def lowest(dtype: torch.dtype) -> float:
    """What must be *added* to a score, or less, to mask it: bfloat16's lowest number absorbs any score in wider dtypes too."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
