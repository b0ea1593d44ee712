"""FP8 linears by the recipes without state that scale finer than a tensor: forward, dgrad and wgrad, over plain tensors.

Forward sums over K, dgrad over N, wgrad over the tokens. Each operand is quantized from high precision along the dimension
that its GEMM sums over, as a recipe's `Operands` say. Saved for backward: the input as wgrad reads it, and nothing else; the
weights are quantized again. As in `linears`, linears that are merged are one GEMM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from te_dynamo.lowering.granularity import MX, NVFP4, Blocks, Granularity, Quantized
from te_dynamo.lowering.limits import ALIGNMENT_ON_GPU
from te_dynamo.lowering.linears import Layout, Needs, join_biases, scaled_mm
from te_dynamo.recipe import Float8BlockScaling, Float8RowwiseScaling, MXFP8BlockScaling, NVFP4BlockScaling, Recipe


@dataclass(frozen=True)
class Product:
    """How the operands of a GEMM a [M, C] @ b [N, C].T are quantized along C; None: they stay in high precision."""

    a: Granularity | None
    b: Granularity | None


@dataclass(frozen=True)
class Operands:
    """The three GEMMs of a linear y [T, N] = x [T, K] @ w [N, K].T, with g [T, N] the gradient of y.

    forward: x and w; dgrad: g and w.T [K, N]; wgrad: g.T [N, T] and x.T [K, T].
    """

    forward: Product
    dgrad: Product
    wgrad: Product

    @property
    def saves_input(self) -> bool:
        """Whether backward reads the input itself, for wgrad in high precision."""
        return self.wgrad.b is None


def _rowwise(recipe: Float8RowwiseScaling) -> Operands:
    forward, gradient = recipe.fp8_format.forward, recipe.fp8_format.gradient
    rows = Blocks(forward, 1, None, recipe.power_2_scale)
    grad_rows = Blocks(gradient, 1, None, recipe.power_2_scale)
    if recipe.high_precision_wgrad:
        tensor = Blocks(forward, None, None, recipe.power_2_scale)
        return Operands(Product(rows, rows), Product(grad_rows, tensor), Product(None, None))
    return Operands(Product(rows, rows), Product(grad_rows, rows), Product(grad_rows, rows))


def _block(recipe: Float8BlockScaling) -> Operands:
    def blocks(dtype: torch.dtype, dimensions: int) -> Blocks:
        return Blocks(dtype, 128 if dimensions == 2 else 1, 128, recipe.power_2_scale, recipe.amax_epsilon)

    x = blocks(recipe.fp8_format.forward, recipe.x_block_scaling_dim)
    w = blocks(recipe.fp8_format.forward, recipe.w_block_scaling_dim)
    g = blocks(recipe.fp8_format.gradient, recipe.grad_block_scaling_dim)
    return Operands(Product(x, w), Product(g, w), Product(g, x))


def _mxfp8(recipe: MXFP8BlockScaling) -> Operands:
    x, g = MX(recipe.fp8_format.forward), MX(recipe.fp8_format.gradient)
    w = MX(recipe.fp8_format.forward, rows=32 if recipe.enable_2d_quantization else 1)
    return Operands(Product(x, w), Product(g, w), Product(g, x))


def _nvfp4(recipe: NVFP4BlockScaling) -> Operands:
    hadamard, stochastic = not recipe.disable_rht, not recipe.disable_stochastic_rounding
    w = NVFP4(rows=1 if recipe.disable_2d_quantization else 16)
    return Operands(
        Product(NVFP4(), w),
        Product(NVFP4(stochastic=stochastic), w),
        Product(NVFP4(hadamard=hadamard, stochastic=stochastic), NVFP4(hadamard=hadamard)),
    )


OPERANDS: Mapping[type[Recipe], Callable[[Any], Operands]] = {
    Float8RowwiseScaling: _rowwise,
    Float8BlockScaling: _block,
    MXFP8BlockScaling: _mxfp8,
    NVFP4BlockScaling: _nvfp4,
}


def operands_of(recipe: Recipe) -> Operands:
    """Raises KeyError for a recipe that scales a tensor at a time: `linears` has those."""
    return OPERANDS[type(recipe)](recipe)


@dataclass(frozen=True)
class Operand:
    """A matrix [R, columns] that a GEMM sums over `columns` of: quantized, or (how: None) itself."""

    how: Granularity | None
    tensors: tuple[Tensor, ...]
    columns: int

    @classmethod
    def of(cls, t: Tensor, how: Granularity | None) -> Operand:
        return cls(how, (t,) if how is None else tuple(how.quantize(t)), t.shape[1])

    def values(self) -> Tensor:
        """float32 [R, columns]"""
        return self.tensors[0].float() if self.how is None else self.how.dequantize(Quantized(*self.tensors), self.columns)


# multiply(a, b, out_dtype, bias, fast): a [M, C] @ b [N, C].T + bias, [M, N] in out_dtype; fast as in `linears.GemmFunction`.
Multiply = Callable[[Operand, Operand, torch.dtype, "Tensor | None", bool], Tensor]


def defined(a: Operand, b: Operand, out_dtype: torch.dtype, bias: Tensor | None, fast: bool) -> Tensor:
    """The definition: dequantize, multiply in float32, add the bias, round once."""
    y = a.values() @ b.values().t()
    return (y if bias is None else y + bias.float()).to(out_dtype)


def native(a: Operand, b: Operand, out_dtype: torch.dtype, bias: Tensor | None, fast: bool) -> Tensor:
    """torch's GEMM for operands with a scale for each row or for the tensor, and for those in high precision."""
    if a.how is None and b.how is None:
        dtype = torch.promote_types(a.tensors[0].dtype, b.tensors[0].dtype)
        y = a.tensors[0].to(dtype) @ b.tensors[0].to(dtype).t()
        return (y if bias is None else y + bias).to(out_dtype)
    (a8, a_inv), (b8, b_inv) = a.tensors, b.tensors
    if a8.numel() == 0 or b8.numel() == 0:
        return defined(a, b, out_dtype, bias, fast)  # no kernel takes an empty operand
    missing = -a.columns % ALIGNMENT_ON_GPU
    if missing and a8.device.type == "cuda":
        a8, b8 = (pad(t.view(torch.uint8), (0, missing)).view(t.dtype) for t in (a8, b8))
    # Row-wise on both sides or on none: a tensor's scale is that of each row.
    a_rows, b_rows = (inv.expand(t.shape[0], 1).contiguous() for t, inv in ((a8, a_inv), (b8, b_inv)))
    return scaled_mm(a8, b8, a_rows, b_rows.t().contiguous(), out_dtype, bias, fast)


def forward(
    multiply: Multiply,
    operands: Operands,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    layout: Layout,
    out_dtype: torch.dtype,
    keep: bool,
) -> tuple[list[Tensor], Quantized | None]:
    """x [T, K] -> (the output [T, N] of each GEMM, the input as wgrad reads it).

    The latter is None where backward reads the input itself, or (keep: False) not at all.
    """
    how = operands.forward
    a = Operand.of(x, how.a)
    ys = []
    for block in layout.blocks():
        w = Operand.of(layout.join([weights[i] for i in block]), how.b)
        ys.append(multiply(a, w, out_dtype, _bias(block, biases, layout, out_dtype, x.device), True))
    wanted = operands.wgrad.b if keep else None
    return ys, None if wanted is None else wanted.quantize(x.t())


def backward(
    multiply: Multiply,
    operands: Operands,
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    weights: Sequence[Tensor],
    layout: Layout,
    needs: Needs,
    x_dtype: torch.dtype,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """grads [T, N] of each GEMM -> (dx [T, K] or None, each dw [N_i, K], each db [N_i] float32).

    saved: the fields of what `forward` gave; the input [T, K] alone where it is in high precision; nothing where no weight
    needs a gradient.
    """
    dws: list[Tensor | None] = [None] * len(weights)
    dbs: list[Tensor | None] = [None] * len(weights)
    parts: list[Tensor] = []
    part_dtype = x_dtype if len(grads) == 1 else torch.float32  # several are summed before the rounding
    x_t = _saved_input(operands, saved, grads[0].shape[0]) if any(needs.weights) else None
    for block, grad in zip(layout.blocks(), grads, strict=True):
        if needs.x:
            w_t = Operand.of(layout.join([weights[i] for i in block]).t(), operands.dgrad.b)
            parts.append(multiply(Operand.of(grad, operands.dgrad.a), w_t, part_dtype, None, False))
        wanted = [i for i in block if needs.weights[i]]
        if wanted:
            assert x_t is not None
            dtypes = {weights[i].dtype for i in wanted}
            whole = multiply(Operand.of(grad.t(), operands.wgrad.a), x_t, dtypes.pop() if len(dtypes) == 1 else torch.float32, None, False)
            for i in wanted:
                rows = layout.rows(whole, block.index(i), len(block))
                dws[i] = rows.to(weights[i].dtype, copy=len(block) > 1, memory_format=torch.contiguous_format)
        for member, i in enumerate(block):
            if needs.biases[i]:
                dbs[i] = layout.rows(grad.t(), member, len(block)).sum(-1, dtype=torch.float32)
    dx = reduce(torch.add, parts).to(x_dtype) if parts else None
    return dx, dws, dbs


def inference(
    multiply: Multiply,
    operands: Operands,
    x: Tensor,
    w8s: Sequence[Tensor],
    w_invs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    layout: Layout,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    """x [T, K] and what `quantize_weights` gave -> the output [T, N] of each GEMM."""
    how = operands.forward
    a = Operand.of(x, how.a)
    ys = []
    for block, w8, w_inv in zip(layout.blocks(), w8s, w_invs, strict=True):
        w = Operand(how.b, (w8, w_inv), x.shape[1])
        ys.append(multiply(a, w, out_dtype, _bias(block, biases, layout, out_dtype, x.device), True))
    return ys


def quantize_weights(operands: Operands, weights: Sequence[Tensor], layout: Layout) -> list[Quantized]:
    """The weight [N, K] of each GEMM, as forward reads it: (data, scale_inv)."""
    how = operands.forward.b
    assert how is not None
    return [how.quantize(layout.join([weights[i].detach() for i in block])) for block in layout.blocks()]


def _bias(block: Sequence[int], biases: Sequence[Tensor | None], layout: Layout, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    return join_biases([biases[i] for i in block], [layout.sizes[i] for i in block], layout, dtype, device)


def _saved_input(operands: Operands, saved: Sequence[Tensor], tokens: int) -> Operand:
    """x.T [K, T]"""
    if operands.saves_input:
        return Operand(None, (saved[0].t(),), tokens)
    return Operand(operands.wgrad.b, tuple(saved), tokens)
