"""The `native` provider's operators on a CPU: one opaque operator a site and direction.

Opaque because Inductor's C++ for every quantization, each reading its scale at another offset, would make compile time
grow with the number of sites; a CPU gains little from fusing them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from te_dynamo.lowering import linears
from te_dynamo.lowering.fp8 import casting_of
from te_dynamo.lowering.linears import NATIVE_CPU, Layout, Needs, Scale


def _scales(packed: Tensor | None, start: int, count: int) -> list[Scale] | None:
    """The scales of a site out of its graph's."""
    if packed is None:
        return None
    own = packed[start : start + count]
    return [Scale(*pair) for pair in zip(own.unbind(), own.reciprocal().unbind(), strict=True)]


def _amax(rows: Sequence[Tensor]) -> Tensor:
    """One amax for each tensor, out of its amaxes by row."""
    return torch.stack([r.amax() if r.numel() else r.sum() for r in rows])


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1]).contiguous()


def _layout(weights: Sequence[Tensor], merged: bool, interleave: int) -> Layout:
    return Layout(tuple(w.shape[0] for w in weights), merged, interleave)


@torch.library.custom_op("te_dynamo::linears_fwd", mutates_args=())
def linears_fwd(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    scale: Tensor | None,
    f: int,
    merged: bool,
    interleave: int,
    out_dtype: torch.dtype,
    recipe: str,
    peers: str,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """x [..., K] -> (outputs [..., N] of each GEMM, x8 [T, K], scales used [1 + GEMMs], amax [2n])."""
    layout = _layout(weights, merged, interleave)
    scales = _scales(scale, f, 2 * len(weights))
    casting = casting_of(recipe, peers)
    ys, x8, used, amaxes, _ = linears.forward(NATIVE_CPU, _rows(x), weights, biases, scales, layout, out_dtype, casting, first=True)
    assert x8 is not None
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys], x8, torch.stack([s.value for s in used]), _amax(amaxes)


@linears_fwd.register_fake
def _(x, weights, biases, scale, f, merged, interleave, out_dtype, recipe, peers):
    layout = _layout(weights, merged, interleave)
    f32 = {"dtype": torch.float32}
    ys = [x.new_empty(*x.shape[:-1], sum(layout.sizes[i] for i in block), dtype=out_dtype) for block in layout.blocks()]
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    x8 = x.new_empty(rows, x.shape[-1], dtype=casting_of(recipe).forward)
    return ys, x8, x.new_empty(1 + len(ys), **f32), x.new_empty(2 * len(weights), **f32)


@torch.library.custom_op("te_dynamo::linears_bwd", mutates_args=())
def linears_bwd(
    grads: list[Tensor],
    x8: Tensor | None,
    weights: list[Tensor],
    used: Tensor,
    grad_scale: Tensor | None,
    g: int,
    merged: bool,
    interleave: int,
    need_x: bool,
    need_weights: list[bool],
    need_biases: list[bool],
    x_dtype: torch.dtype,
    recipe: str,
    peers: str,
) -> tuple[list[Tensor], Tensor]:
    """grads [..., N] of each GEMM -> (the wanted ones of dx [..., K], each dw, each db f32, in this order; amax [n])."""
    layout = _layout(weights, merged, interleave)
    needs = Needs(need_x, tuple(need_weights), tuple(need_biases))
    rows, scales = [_rows(t) for t in grads], _scales(grad_scale, g, len(weights))
    forward_scales, casting = _scales(used, 0, used.shape[0]), casting_of(recipe, peers)
    dx, dws, dbs, amaxes = linears.backward(
        NATIVE_CPU, rows, x8, weights, forward_scales, [], scales, layout, needs, x_dtype, casting, first=True
    )
    if dx is not None:
        dx = dx.reshape(*grads[0].shape[:-1], dx.shape[-1])
    return [t for t in (dx, *dws, *dbs) if t is not None], _amax(amaxes)


@linears_bwd.register_fake
def _(grads, x8, weights, used, grad_scale, g, merged, interleave, need_x, need_weights, need_biases, x_dtype, recipe, peers):
    new = grads[0].new_empty
    out = [new(*grads[0].shape[:-1], weights[0].shape[1], dtype=x_dtype)] if need_x else []
    out += [new(w.shape, dtype=w.dtype) for w, needed in zip(weights, need_weights, strict=True) if needed]
    out += [new(w.shape[0], dtype=torch.float32) for w, needed in zip(weights, need_biases, strict=True) if needed]
    return out, new(len(weights), dtype=torch.float32)


@torch.library.custom_op("te_dynamo::linears_inference", mutates_args=())
def linears_inference(
    x: Tensor,
    w8s: list[Tensor],
    w_invs: list[Tensor],
    biases: list[Tensor | None],
    scale: Tensor | None,
    f: int,
    sizes: list[int],
    merged: bool,
    interleave: int,
    out_dtype: torch.dtype,
    recipe: str,
) -> list[Tensor]:
    """x [..., K], the FP8 weight [N, K] and scale_inv of each GEMM -> the output [..., N] of each GEMM."""
    layout = Layout(tuple(sizes), merged, interleave)
    scales = _scales(scale, f, 1)
    ys = linears.inference(NATIVE_CPU, _rows(x), w8s, w_invs, biases, scales, layout, out_dtype, casting_of(recipe), first=True)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]


@linears_inference.register_fake
def _(x, w8s, w_invs, biases, scale, f, sizes, merged, interleave, out_dtype, recipe):
    return [x.new_empty(*x.shape[:-1], w8.shape[0], dtype=out_dtype) for w8 in w8s]


def spread(present: Sequence[Tensor], mask: Sequence[bool]) -> list[Tensor | None]:
    """Puts the tensors that there are back where the mask says (a list that an operator returns cannot hold None)."""
    source = iter(present)
    return [next(source) if there else None for there in mask]


def _size(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


@register_flop_formula(torch.ops.te_dynamo.linears_fwd)
def _(x_shape, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    return sum(2 * _size(x_shape) * w[0] for w in weight_shapes)


@register_flop_formula(torch.ops.te_dynamo.linears_inference)
def _(x_shape, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    return sum(2 * _size(x_shape) * w[0] for w in weight_shapes)


@register_flop_formula(torch.ops.te_dynamo.linears_bwd)
def _(grad_shapes, x8, weight_shapes, used, scale, g, merged, interleave, need_x, need_weights, *args, out_shape=None, **kwargs) -> int:
    tokens = _size(grad_shapes[0][:-1])
    return sum(2 * tokens * _size(w) * (need_x + needed) for w, needed in zip(weight_shapes, need_weights, strict=True))
