"""q and k of attention, made easier to round: each score stays what it is, or all scores of a row change by one number.

A rotation of q and k leaves q k^T as it is and spreads over a head what a few channels hold: FP8 rounds each element by its own magnitude,
so a score's error is that of its largest terms (FlashAttention-3, arXiv 2407.08608, section 3.3). What is subtracted from all keys alike
is subtracted from all scores of a row alike, which a softmax does not notice; their mean is most of what k's largest channels hold
(SageAttention, arXiv 2410.02367, section 4.2). It is a mean of all tokens, so only a recipe whose scales are too has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_dynamo.lowering.call import Call
from te_dynamo.lowering.fp8 import amax

LEAST = 16  # channels that a rotation mixes


def prepared(call: Call, q: Tensor, k: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """q [..., D] and k [..., D] of attention by `call`, ready to be rounded; of a recipe that is like TE, as they are.

    keys: the dimension of k that counts the keys. float16 becomes bfloat16, whose range a rotation does not leave.
    """
    if like_te(call):
        return q, k
    return rotated(q), rotated(centered(call, k, keys))


def like_te(call: Call) -> bool:
    return bool(getattr(call.scaling, "like_te", False))


def center_of(call: Call, k: Tensor, keys: int) -> Tensor | None:
    """The mean of the keys, NaN and infinite elements apart, where the recipe's scales are of all tokens anyway; as k, of one key."""
    if like_te(call) or not call.scaling.mixes_tokens:
        return None
    return k.nan_to_num(0.0, 0.0, 0.0).mean(keys, keepdim=True, dtype=torch.float32).to(k.dtype)


def centered(call: Call, k: Tensor, keys: int) -> Tensor:
    center = center_of(call, k, keys)
    return k if center is None else k - center


def rotated_amax(x: Tensor, center: Tensor | None) -> Tensor:
    """A bound of the amax of `x - center`, rotated, NaN elements apart: f32, 0-d. It is the largest length of what is mixed, about twice
    that amax, and takes no rotation."""
    values = x.float() if center is None else x.float() - center.float()
    mixed = values.unflatten(-1, (-1, mixed_channels(x.shape[-1])))
    return amax(mixed.square().sum(-1).sqrt())


def rotated(x: Tensor) -> Tensor:
    """x [..., D] times an orthogonal matrix that mixes as many channels as the largest power of two that divides D."""
    x = x.bfloat16() if x.dtype == torch.float16 else x
    size = mixed_channels(x.shape[-1])
    return x if size == 1 else (x.unflatten(-1, (-1, size)) @ hadamard(size, x.device).to(x.dtype)).flatten(-2)


def mixed_channels(width: int) -> int:
    """How many channels a rotation mixes: a power of two that divides `width`; 1 where that would be too few."""
    size = width & -width
    return size if size >= LEAST else 1


def hadamard(size: int, device: torch.device) -> Tensor:
    """The Walsh-Hadamard matrix [size, size], float32, orthogonal, its rows times the signs of the Rudin-Shapiro sequence: channels that
    are alike do not meet in one, and no random number is drawn. It is computed rather than kept, by a few operations that fuse."""
    place = torch.arange(size, device=device)
    ones = (place[:, None] & place) ^ (place & place >> 1)[:, None]
    for shift in (8, 4, 2, 1):
        ones = ones ^ (ones >> shift)
    return (1 - 2 * (ones & 1)).float() * size**-0.5
