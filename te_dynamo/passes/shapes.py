"""The fake values of semantic operations, without running their definitions: a definition is several operations, and a fake
one costs a tenth of a millisecond and more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from te_dynamo import ops


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


def _linears(x: Tensor, weights: Any, biases: Any, *, out_dtype: torch.dtype, merged: bool = False, interleave: int = 0) -> list[Tensor]:
    ys = [_linear(x, w, out_dtype=out_dtype) for w in weights]
    return [y.unflatten(-1, (-1, interleave)) for y in ys] if interleave else ys


def _norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, out_dtype: torch.dtype, **_: Any) -> Tensor:
    return torch.empty_like(x, dtype=out_dtype)


def _norm_linears(
    x: Tensor,
    norm_weight: Any,
    norm_bias: Any,
    weights: Any,
    biases: Any,
    *,
    norm_dtype: torch.dtype,
    out_dtype: torch.dtype,
    merged: bool = False,
    interleave: int = 0,
    **_: Any,
) -> list[Tensor]:
    h = _norm(x, out_dtype=norm_dtype)
    return [h, *_linears(h, weights, biases, out_dtype=out_dtype, merged=merged, interleave=interleave)]


SHAPES: dict[Callable[..., Any], Callable[..., Any]] = {
    ops.linear: _linear,
    ops.linears: _linears,
    ops.norm: _norm,
    ops.norm_linears: _norm_linears,
}
