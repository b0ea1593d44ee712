"""Permutes rows: a mixture of experts sorts its tokens by expert, and puts the results back in order.

torch's gradient of an index adds each row to zeros, atomically: it does not know that no row occurs twice. If the index is known to be a
permutation, the gradient is an index by the inverse permutation, then a sum over the experts of each token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor | None, copies: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.copies = copies
        return x[order // copies if copies > 1 else order]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        order, inverse = ctx.saved_tensors
        if inverse is None:
            inverse = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
        rows = grads[0][inverse]
        if ctx.copies > 1:
            rows = rows.unflatten(0, (-1, ctx.copies)).sum(1)  # torch adds in float32; a cast of its own would leave the sum in float32
        return rows, None, None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor | None = None, *, copies: int = 1) -> Tensor:
    """`x[order // copies]` with a deterministic gradient, summed over the copies of a row in float32.

    x: [T, ...]; order: int64 [T * copies], a permutation of range(T * copies); inverse: its inverse, if known.
    """
    return _Permute.apply(x, order, inverse, copies)
