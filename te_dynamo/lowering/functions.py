"""What stands in a lowered graph: plain Python functions over tensors that AOTAutograd traces through.

They hold the autograd of each operation once, whatever the provider, and carry the gradients' amaxes: a site takes a
piece of `sink`, a tensor that requires grad and is used for nothing, and the piece's "gradient" is what backward
measured. `collect` gathers them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from te_dynamo.lowering.linears import Layout, Needs
from te_dynamo.lowering.providers import Ready, Scales, provider_for
from te_dynamo.lowering.te import norm as te_norm
from te_dynamo.ops import NormKind


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sink: Tensor, grad_amax: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.grad_amax = grad_amax
        return torch.split(sink, sizes)

    @staticmethod
    def backward(ctx, *amaxes: Tensor):
        ctx.grad_amax.copy_(torch.maximum(ctx.grad_amax, torch.cat(amaxes)))
        return None, None, None


def collect(sink: Tensor, grad_amax: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Splits `sink` [G] into a piece for each site; in backward the pieces' amaxes are max-written into `grad_amax` [G].

    One packed write, in the backward graph itself: it happens under `backward()`, `autograd.grad` and
    `backward(inputs=...)` alike.
    """
    return _Collect.apply(sink, grad_amax, sizes)


def record(amaxes: Sequence[Tensor]) -> Tensor:
    """The forward amaxes of a graph as one tensor [F], outside of autograd."""
    return torch.cat([torch.detach(a) for a in amaxes])


def unpack(packed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The scales [F] of a graph as F 0-d tensors, and their reciprocals."""
    return torch.ops.te_dynamo.unpack(packed)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scales, grad_scales, sink, ready, provider, recipe, peers, layout, out_dtype, first, *weights_and_biases):
        n = len(layout.sizes)
        weights, biases = weights_and_biases[:n], weights_and_biases[n:]
        kernels = provider_for(provider, recipe)
        given = {"ready": ready} if ready else {}
        ys, x8, used, amax = kernels.linears_forward(x, weights, biases, scales, layout, out_dtype, recipe, peers, first, **given)
        wanted = ctx.needs_input_grad[-2 * n :]
        ctx.needs = Needs(ctx.needs_input_grad[0], tuple(wanted[:n]), tuple(wanted[n:]))
        ctx.save_for_backward(x8 if any(ctx.needs.weights) else None, *weights, *used)
        ctx.attributes = (provider, recipe, peers, grad_scales, layout, first, x.dtype, [None if b is None else b.dtype for b in biases])
        ctx.mark_non_differentiable(amax)
        return (*ys, amax)

    @staticmethod
    def backward(ctx, *grads):
        provider, recipe, peers, grad_scales, layout, first, x_dtype, bias_dtypes = ctx.attributes
        n = len(layout.sizes)
        x8, *rest = ctx.saved_tensors
        dx, dws, dbs, amax = provider_for(provider, recipe).linears_backward(
            grads[:-1], x8, rest[:n], rest[n:], grad_scales, layout, ctx.needs, x_dtype, recipe, peers, first
        )
        dbs = [None if db is None else db.to(dtype) for db, dtype in zip(dbs, bias_dtypes, strict=True)]
        return (dx, None, None, amax if ctx.needs_input_grad[3] else None, *[None] * 7, *dws, *dbs)


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Scales,
    grad_scales: Scales,
    sink: Tensor | None,
    ready: Sequence[Ready] = (),
    *,
    provider: str,
    recipe: str,
    peers: str,
    merged: bool,
    interleave: int,
    out_dtype: torch.dtype,
    first: bool,
) -> list[Tensor]:
    """FP8 training linears of one input: `[*outputs, amax]`.

    x: [..., K]; weights: [N_i, K]; biases: [N_i] or None; scales: 2n of them, an input's and a weight's in turn;
    grad_scales: n; sink: f32 [n], the piece of the sink, or None; ready: the weight of each GEMM as `prepare_weights` gave it, or
    nothing. The outputs are [..., N_i], or [..., heads,
    interleave]; amax is f32 [2n]. recipe: its key; peers: the process
    group whose ranks share first scales, or ""; first: a slot whose scale is 0 takes it from its own tensor.
    """
    layout = Layout(tuple(w.shape[0] for w in weights), merged, interleave)
    *ys, amax = _Linears.apply(x, scales, grad_scales, sink, ready, provider, recipe, peers, layout, out_dtype, first, *weights, *biases)
    return [*(layout.split(ys[0]) if merged else ys), amax]


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        norm_weight,
        norm_bias,
        scales,
        grad_scales,
        sink,
        ready,
        provider,
        recipe,
        layout,
        out_dtype,
        kind,
        eps,
        zero_centered,
        *rest,
    ):
        n = len(layout.sizes)
        weights, biases = rest[:n], rest[n:]
        norm = (norm_weight, norm_bias, kind, eps, zero_centered)
        ys, h8, statistics, used, amax = provider_for(provider, recipe).norm_linears_forward(
            x, norm, weights, biases, scales, layout, out_dtype, recipe, ready
        )
        wanted = ctx.needs_input_grad[-2 * n :]
        ctx.needs = Needs(any(ctx.needs_input_grad[:3]), tuple(wanted[:n]), tuple(wanted[n:]))
        ctx.save_for_backward(x, norm_weight, *statistics, h8 if any(ctx.needs.weights) else None, *weights, *used)
        dtypes = [None if b is None else b.dtype for b in (norm_bias, *biases)]
        ctx.attributes = (provider, recipe, grad_scales, layout, out_dtype, kind, zero_centered, dtypes)
        ctx.mark_non_differentiable(amax)
        return (*ys, amax)

    @staticmethod
    def backward(ctx, *grads):
        provider, recipe, grad_scales, layout, out_dtype, kind, zero_centered, (norm_bias_dtype, *bias_dtypes) = ctx.attributes
        n = len(layout.sizes)
        x, norm_weight, mean, inverse, h8, *rest = ctx.saved_tensors
        dh, dws, dbs, amax = provider_for(provider, recipe).linears_backward(
            grads[:-1], h8, rest[:n], rest[n:], grad_scales, layout, ctx.needs, out_dtype, recipe, "", False
        )
        dbs = [None if db is None else db.to(dtype) for db, dtype in zip(dbs, bias_dtypes, strict=True)]
        dx = dw = db = None
        if dh is not None:
            dx, dw, db = te_norm.backward(dh, x, norm_weight, mean, inverse, kind, zero_centered)
            dw = dw.to(norm_weight.dtype)
            db = None if norm_bias_dtype is None else db.to(norm_bias_dtype)
        return (dx, dw, db, None, None, amax if ctx.needs_input_grad[5] else None, *[None] * 8, *dws, *dbs)


def norm_linears(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Scales,
    grad_scales: Scales,
    sink: Tensor | None,
    ready: Sequence[Ready] = (),
    *,
    provider: str,
    recipe: str,
    merged: bool,
    interleave: int,
    out_dtype: torch.dtype,
    kind: NormKind,
    eps: float,
    zero_centered: bool,
) -> list[Tensor]:
    """`linears` of a norm of x over its last dimension, by a provider whose kernel writes the norm in FP8 only: `[*outputs, amax]`.

    x: [..., K]; norm_weight, norm_bias: [K]; all scales are set (there is no first use here); the rest as in `linears` and
    `te_dynamo.ops.norm`.
    """
    layout = Layout(tuple(w.shape[0] for w in weights), merged, interleave)
    norm = (kind, eps, zero_centered)
    *ys, amax = _NormLinears.apply(
        x, norm_weight, norm_bias, scales, grad_scales, sink, ready, provider, recipe, layout, out_dtype, *norm, *weights, *biases
    )
    return [*(layout.split(ys[0]) if merged else ys), amax]


def linears_inference(
    x: Tensor,
    w8s: Sequence[Tensor],
    w_invs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Scales,
    *,
    provider: str,
    recipe: str,
    peers: str,
    sizes: Sequence[int],
    merged: bool,
    interleave: int,
    out_dtype: torch.dtype,
    first: bool,
) -> list[Tensor]:
    """FP8 linears of one input with weights that are quantized already, without gradients.

    x: [..., K]; w8s, w_invs: the FP8 weight [N, K] and its f32 scale_inv for each GEMM; the rest as in `linears`.
    """
    layout = Layout(tuple(sizes), merged, interleave)
    ys = provider_for(provider, recipe).linears_inference(x, w8s, w_invs, biases, scales, layout, out_dtype, recipe, peers, first)
    return list(layout.split(ys[0])) if merged else list(ys)


def prepare_weights(weights: Sequence[Tensor], merged: bool, interleave: int, provider: str, recipe: str) -> list[Ready]:
    """The weights [N_i, K] of linears as `linears` takes them `ready`, one for each GEMM, scaled by its own amax."""
    layout = Layout(tuple(w.shape[0] for w in weights), merged, interleave)
    return provider_for(provider, recipe).prepare_weights(weights, layout, recipe)


def quantize_weights(weights: Sequence[Tensor], merged: bool, interleave: int, provider: str, recipe: str) -> list[tuple[Tensor, Tensor]]:
    """(FP8 weight [N, K], f32 scale_inv) for each GEMM of linears with these weights [N_i, K]."""
    layout = Layout(tuple(w.shape[0] for w in weights), merged, interleave)
    return provider_for(provider, recipe).quantize_weights(weights, layout, recipe)
