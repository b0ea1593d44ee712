"""Makes q and k of attention easier to round, without changing the softmax: each score stays as it is, or all scores of a row shift by one
number.

Rotating q and k leaves q k^T as it is and spreads what a few channels hold over the head: FP8 rounds each element by its own magnitude,
so a score's error is that of its largest terms (FlashAttention-3, arXiv 2407.08608, section 3.3). Subtracting a vector from all keys
shifts all scores of a row equally, which a softmax does not notice; the keys' mean is most of what k's largest channels hold
(SageAttention, arXiv 2410.02367, section 4.2). The mean is over all tokens, so only recipes whose scales are too use it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_dynamo.lowering.call import Call
from te_dynamo.lowering.fp8 import amax

LEAST = 16  # channels that a rotation mixes


def prepared(call: Call, q: Tensor, k: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """q [..., D] and k [..., D] of attention by `call`, ready to be rounded. keys: the dimension of k that indexes the keys."""
    return (rotated(q), rotated(centered(k, keys))) if prepares(call) else (q, k)


def prepares(call: Call) -> bool:
    """Whether q and k are centered and rotated: not like TE does, not in float16, whose range this could leave, and not rotated without
    being centered, since a channel that is large in all keys rounds alike in all and so harms no score, until a rotation spreads it."""
    recipe = call.scaling
    return recipe.mixes_tokens and not getattr(recipe, "like_te", False) and call.inputs[0] != torch.float16


def center_of(k: Tensor, keys: int) -> Tensor:
    """The mean of the keys, with NaN and infinities as 0; shaped as k with one key."""
    return k.nan_to_num(0.0, 0.0, 0.0).mean(keys, keepdim=True, dtype=torch.float32).to(k.dtype)


def centered(k: Tensor, keys: int) -> Tensor:
    return k - center_of(k, keys)


def rotated_amax(x: Tensor, center: Tensor | None) -> Tensor:
    """An upper bound of the amax of `x - center`, rotated, ignoring NaN: f32, 0-d. It is the largest norm of the channels that are mixed,
    about twice that amax, and needs no rotation."""
    values = x.float() if center is None else x.float() - center.float()
    mixed = values.unflatten(-1, (-1, mixed_channels(x.shape[-1])))
    return amax(mixed.square().sum(-1).sqrt())


def rotated(x: Tensor) -> Tensor:
    """x [..., D] times an orthogonal matrix that mixes as many channels as the largest power of two that divides D."""
    size = mixed_channels(x.shape[-1])
    return x if size == 1 else (x.unflatten(-1, (-1, size)) @ hadamard(size, x.device).to(x.dtype)).flatten(-2)


def mixed_channels(width: int) -> int:
    """How many channels a rotation mixes: a power of two that divides `width`; 1 where that would be too few."""
    size = width & -width
    return size if size >= LEAST else 1


def hadamard(size: int, device: torch.device) -> Tensor:
    """The Walsh-Hadamard matrix [size, size], float32, orthogonal, its rows times the signs of the Rudin-Shapiro sequence: channels with
    similar values do not add up in one, and no random number is drawn. It is computed rather than kept, by a few operations that fuse."""
    place = torch.arange(size, device=device)
    ones = (place[:, None] & place) ^ (place & place >> 1)[:, None]
    for shift in (8, 4, 2, 1):
        ones = ones ^ (ones >> shift)
    return (1 - 2 * (ones & 1)).float() * size**-0.5
