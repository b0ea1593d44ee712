"""Rows in another order: as a mixture of experts sorts its tokens by expert, and puts the results back.

torch's gradient of an index adds each row into zeros, atomically: it does not know that no row is met twice. Where the index is known to
be a permutation, it is a reading in the inverse order, and a sum over the experts of each token.
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
            rows = rows.unflatten(0, (-1, ctx.copies)).sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)
        return rows, None, None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor | None = None, *, copies: int = 1) -> Tensor:
    """`x[order // copies]`, of which the gradient is deterministic, and summed over the copies of a row in float32.

    x: [T, ...]; order: int64 [T * copies], a permutation of its places; inverse: its inverse, if it is at hand.
    """
    return _Permute.apply(x, order, inverse, copies)
