"""The softmaxes of TE's unfused attention: float32 inside, one rounding at the end. C/fused_softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MASKED = -10000.0  # the score of a key that the mask hides


def scaled_softmax_forward(input: Tensor, scale: float) -> Tensor:
    """Over the last dimension of scores [b, h, sq, skv]."""
    return (input.float() * scale).softmax(-1).to(input.dtype)


def scaled_masked_softmax_forward(input: Tensor, mask: Tensor, scale: float) -> Tensor:
    """mask [1 or b, 1, sq, skv]: nonzero hides a key. A fully masked row is zero (C/fused_softmax/scaled_masked_softmax.cu)."""
    hidden = mask.bool()
    results = (input.float() * scale).masked_fill(hidden, MASKED).softmax(-1)
    return results.masked_fill(hidden.all(-1, keepdim=True), 0.0).to(input.dtype)


def scaled_upper_triang_masked_softmax_forward(input: Tensor, scale: float) -> Tensor:
    """Scores [b h, s, s]: a query attends to the keys up to its own."""
    return _causal(input, scale)


def scaled_aligned_causal_masked_softmax_forward(input: Tensor, scale: float) -> Tensor:
    """Scores [b, h, sq, skv]: the last query attends to all keys."""
    return _causal(input, scale)


def _causal(scores: Tensor, scale: float) -> Tensor:
    queries, keys = scores.shape[-2:]
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)
    return (scores.float() * scale).masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0).to(scores.dtype)


def _backward(name: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    def backward(output_grads: Tensor, softmax_results: Tensor, scale: float) -> Tensor:
        grads, results = output_grads.float(), softmax_results.float()
        return (scale * results * (grads - (grads * results).sum(-1, keepdim=True))).to(output_grads.dtype)

    backward.__name__ = f"{name}_backward"
    return backward


BACKWARD = [
    _backward(name)
    for name in ("scaled_softmax", "scaled_masked_softmax", "scaled_upper_triang_masked_softmax", "scaled_aligned_causal_masked_softmax")
]
