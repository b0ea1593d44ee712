"""The operators of the stateless recipes: one opaque operator a site and direction, for any device (see `cpu_ops` for why)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from te_dynamo.lowering import stateless
from te_dynamo.lowering.linears import Layout, Needs
from te_dynamo.lowering.stateless import Multiply, Operands, operands_of
from te_dynamo.recipe import from_key


@lru_cache
def _kernels(recipe: str, native: bool) -> tuple[Multiply, Operands]:
    return stateless.native if native else stateless.defined, operands_of(from_key(recipe))


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _layout(weights: Sequence[Tensor], merged: bool, interleave: int) -> Layout:
    return Layout(tuple(w.shape[0] for w in weights), merged, interleave)


@torch.library.custom_op("te_dynamo::stateless_fwd", mutates_args=())
def stateless_fwd(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    recipe: str,
    native: bool,
    merged: bool,
    interleave: int,
    out_dtype: torch.dtype,
    keep: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """x [..., K] -> (the output [..., N] of each GEMM, the input quantized for wgrad: data and scale_inv).

    The latter is empty where backward reads the input itself, or (keep: False) not at all. recipe: its key.
    """
    layout = _layout(weights, merged, interleave)
    ys, kept = stateless.forward(*_kernels(recipe, native), _rows(x), weights, biases, layout, out_dtype, keep)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys], list(kept or ())


@stateless_fwd.register_fake
def _(x, weights, biases, recipe, native, merged, interleave, out_dtype, keep):
    layout = _layout(weights, merged, interleave)
    ys = [x.new_empty(*x.shape[:-1], sum(layout.sizes[i] for i in block), dtype=out_dtype) for block in layout.blocks()]
    how = operands_of(from_key(recipe)).wgrad.b if keep else None
    return ys, [] if how is None else list(how.empty(x, x.shape[-1], _size(x.shape[:-1])))


# Seeded: gradients may be rounded stochastically.
@torch.library.custom_op("te_dynamo::stateless_bwd", mutates_args=(), tags=torch.Tag.nondeterministic_seeded)
def stateless_bwd(
    grads: list[Tensor],
    saved: list[Tensor],
    weights: list[Tensor],
    recipe: str,
    native: bool,
    merged: bool,
    interleave: int,
    need_x: bool,
    need_weights: list[bool],
    need_biases: list[bool],
    x_dtype: torch.dtype,
) -> list[Tensor]:
    """grads [..., N] of each GEMM -> the wanted ones of dx [..., K], each dw, each db float32, in this order.

    saved: what forward gave; the input [..., K] where that was nothing and the recipe has wgrad in high precision.
    """
    layout = _layout(weights, merged, interleave)
    needs = Needs(need_x, tuple(need_weights), tuple(need_biases))
    multiply, operands = _kernels(recipe, native)
    if operands.saves_input:
        saved = [_rows(t) for t in saved]
    dx, dws, dbs = stateless.backward(multiply, operands, [_rows(t) for t in grads], saved, weights, layout, needs, x_dtype)
    if dx is not None:
        dx = dx.reshape(*grads[0].shape[:-1], dx.shape[-1])
    return [t for t in (dx, *dws, *dbs) if t is not None]


@stateless_bwd.register_fake
def _(grads, saved, weights, recipe, native, merged, interleave, need_x, need_weights, need_biases, x_dtype):
    new = grads[0].new_empty
    out = [new(*grads[0].shape[:-1], weights[0].shape[1], dtype=x_dtype)] if need_x else []
    out += [new(w.shape, dtype=w.dtype) for w, needed in zip(weights, need_weights, strict=True) if needed]
    out += [new(w.shape[0], dtype=torch.float32) for w, needed in zip(weights, need_biases, strict=True) if needed]
    return out


@torch.library.custom_op("te_dynamo::stateless_inference", mutates_args=())
def stateless_inference(
    x: Tensor,
    w8s: list[Tensor],
    w_invs: list[Tensor],
    biases: list[Tensor | None],
    recipe: str,
    native: bool,
    sizes: list[int],
    merged: bool,
    interleave: int,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """x [..., K] and the quantized weight of each GEMM -> the output [..., N] of each GEMM."""
    layout = Layout(tuple(sizes), merged, interleave)
    ys = stateless.inference(*_kernels(recipe, native), _rows(x), w8s, w_invs, biases, layout, out_dtype)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]


@stateless_inference.register_fake
def _(x, w8s, w_invs, biases, recipe, native, sizes, merged, interleave, out_dtype):
    return [x.new_empty(*x.shape[:-1], w8.shape[0], dtype=out_dtype) for w8 in w8s]


def _size(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


@register_flop_formula(torch.ops.te_dynamo.stateless_fwd)
def _(x_shape, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    return sum(2 * _size(x_shape) * w[0] for w in weight_shapes)


@register_flop_formula(torch.ops.te_dynamo.stateless_inference)
def _(x_shape, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    return sum(2 * _size(x_shape) * w[0] for w in weight_shapes)


@register_flop_formula(torch.ops.te_dynamo.stateless_bwd)
def _(grad_shapes, saved, weight_shapes, recipe, native, merged, interleave, need_x, need_weights, *args, out_shape=None, **kwargs) -> int:
    tokens = _size(grad_shapes[0][:-1])
    computed = [any(need_weights)] * len(need_weights) if merged else need_weights
    return sum(2 * tokens * _size(w) * (need_x + there) for w, there in zip(weight_shapes, computed, strict=True))
