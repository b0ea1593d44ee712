"""Linears for the recipes that scale more finely than per tensor and have no state: forward, dgrad and wgrad.

Forward sums over K, dgrad over N, wgrad over the tokens. Each operand is quantized from high precision along the dimension that its GEMM
sums over, as the recipe's `Operands` say. Only the input, as wgrad reads it, is saved for backward; the weights are quantized again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from te_dynamo.ir.linear import GemmRows
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.fp8 import E4M3, FP8_MAX
from te_dynamo.lowering.granularity import MX, NVFP4, Blocks, Granularity
from te_dynamo.lowering.limits import ALIGNMENT_ON_GPU, unaligned, unsupported_dtype
from te_dynamo.lowering.per_tensor import backward_flops, forward_flops, matrix, scaled_mm
from te_dynamo.lowering.quantized import Kept, Quantized, Scales
from te_dynamo.lowering.registry import Backward, Case, Forward, Implementation, Needs
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
    """Raises KeyError for a per-tensor recipe: those are in `per_tensor`."""
    return OPERANDS[type(recipe)](recipe)


@dataclass(frozen=True)
class Factor:
    """An operand [R, columns] of a GEMM that sums over `columns`: quantized, or in high precision (how: None) as `quantized.data`."""

    how: Granularity | None
    quantized: Quantized
    columns: int

    @classmethod
    def of(cls, t: Tensor, how: Granularity | None) -> Factor:
        return cls(how, Quantized(t) if how is None else how.quantize(t), t.shape[1])

    @property
    def data(self) -> Tensor:
        assert self.quantized.data is not None
        return self.quantized.data

    def values(self) -> Tensor:
        """float32 [R, columns]"""
        return self.data.float() if self.how is None else self.how.dequantize(self.quantized, self.columns)


# multiply(a, b, out_dtype, bias, fast): a [M, C] @ b [N, C].T + bias, [M, N] in out_dtype; fast as in `per_tensor.GemmFunction`.
Multiply = Callable[[Factor, Factor, torch.dtype, "Tensor | None", bool], Tensor]


def defined(a: Factor, b: Factor, out_dtype: torch.dtype, bias: Tensor | None, fast: bool) -> Tensor:
    """The definition: dequantize, multiply in float32, add the bias, round once."""
    y = a.values() @ b.values().t()
    return (y if bias is None else y + bias.float()).to(out_dtype)


def native(a: Factor, b: Factor, out_dtype: torch.dtype, bias: Tensor | None, fast: bool) -> Tensor:
    """torch's GEMM for operands with a scale for each row or for the tensor, and for those in high precision."""
    if a.how is None and b.how is None:
        dtype = torch.promote_types(a.data.dtype, b.data.dtype)
        y = a.data.to(dtype) @ b.data.to(dtype).t()
        return (y if bias is None else y + bias).to(out_dtype)
    a8, b8 = a.data, b.data
    if a8.numel() == 0 or b8.numel() == 0:
        return defined(a, b, out_dtype, bias, fast)  # no kernel takes an empty operand
    absent = -a.columns % ALIGNMENT_ON_GPU
    if absent and a8.device.type == "cuda":
        a8, b8 = (pad(t.view(torch.uint8), (0, absent)).view(t.dtype) for t in (a8, b8))
    # Scales are row-wise on both sides or on neither: a per-tensor scale is repeated for each row.
    a_rows, b_rows = (f.quantized.scale_inv.expand(f.data.shape[0], 1).contiguous() for f in (a, b))
    return scaled_mm(a8, b8, a_rows, b_rows.t().contiguous(), out_dtype, bias, fast)


class FineGrainedLinears(Implementation):
    """`linears` for these recipes, with operands quantized by definition. A site has neither scales nor amaxes."""

    opaque = True
    cached = frozenset({"inference"})

    def __init__(self, multiply: Multiply) -> None:
        self.multiply = multiply

    def backward_reads(self, call: Call, needs: Needs) -> tuple[str, ...]:
        high_precision_wgrad = operands_of(call.scaling).wgrad.b is None and any(needs[1])
        return ("x", "weights") if high_precision_wgrad else ("weights",)

    def unsupported(self, case: Case) -> str | None:
        on_gpu = self.multiply is native and case.device.type == "cuda"
        return (unaligned(case) if on_gpu else None) or unsupported_dtype(case.attributes["out_dtype"])

    def quantize_weights(self, call: Call, weights: Sequence[Tensor]) -> list[Quantized]:
        """The weight [N, K] of each GEMM, as forward reads it."""
        how, rows = operands_of(call.scaling).forward.b, GemmRows.of(call.attributes)
        assert how is not None
        return [how.quantize(rows.join([weights[i].detach() for i in gemm])) for gemm in rows.gemms()]

    def kept_as(self, call: Call) -> Kept | None:
        how, rows = operands_of(call.scaling).forward.b, GemmRows.of(call.attributes)
        if not isinstance(how, Blocks) or (how.dtype, how.rows, how.columns) != (E4M3, 1, None):
            return None
        return Kept(tuple(rows.gemms()), rows.interleave, FP8_MAX[E4M3], how.epsilon, how.power_of_2, by_row=True)

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        operands, rows, dtype = operands_of(call.scaling), GemmRows.of(call.attributes), call["out_dtype"]
        x, weights, biases = inputs
        flat = matrix(x)
        a = Factor.of(flat, operands.forward.a)
        outputs = []
        for number, gemm in enumerate(rows.gemms()):
            if call.cached:
                w = Factor(operands.forward.b, weights[number], flat.shape[1])
            else:
                w = Factor.of(rows.join([weights[i] for i in gemm]), operands.forward.b)
            y = self.multiply(a, w, dtype, rows.join_biases(biases, gemm, dtype, x), True)
            outputs.append(y.reshape(*x.shape[:-1], y.shape[-1]))
        wgrad = operands.wgrad.b if any(needs[1]) else None
        return Forward(outputs, [Quantized() if wgrad is None else wgrad.quantize(flat.t())], [])

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        operands, rows = operands_of(call.scaling), GemmRows.of(call.attributes)
        (x, weights, _), (needs_x, needs_w, needs_b) = inputs, needs
        dws: list[Tensor | None] = [None] * len(weights)
        dbs: list[Tensor | None] = [None] * len(weights)
        parts: list[Tensor] = []
        part_dtype = call.inputs[0] if len(grads) == 1 else torch.float32  # several are summed before rounding
        flat_grads = [matrix(g) for g in grads]
        x_t = self._saved_input(operands, x, saved[0], flat_grads[0].shape[0]) if any(needs_w) else None
        for gemm, grad in zip(rows.gemms(), flat_grads, strict=True):
            if needs_x:
                w_t = Factor.of(rows.join([weights[i] for i in gemm]).t(), operands.dgrad.b)
                parts.append(self.multiply(Factor.of(grad, operands.dgrad.a), w_t, part_dtype, None, False))
            wanted = [i for i in gemm if needs_w[i]]
            if wanted:
                assert x_t is not None
                dtypes = {call.inputs[1][i] for i in wanted}
                dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
                whole = self.multiply(Factor.of(grad.t(), operands.wgrad.a), x_t, dtype, None, False)
                for i in wanted:
                    part = rows.rows(whole, gemm.index(i), len(gemm))
                    dws[i] = part.to(call.inputs[1][i], memory_format=torch.contiguous_format)
            for member, i in enumerate(gemm):
                if needs_b[i]:
                    dbs[i] = rows.rows(grad.t(), member, len(gemm)).sum(-1, dtype=torch.float32).to(call.inputs[2][i])
        dx = reduce(torch.add, parts).to(call.inputs[0]) if parts else None
        return Backward([None if dx is None else dx.reshape(*grads[0].shape[:-1], dx.shape[-1]), dws, dbs], [])

    @staticmethod
    def _saved_input(operands: Operands, x: Tensor, saved: Quantized, tokens: int) -> Factor:
        """x.T [K, T]"""
        if operands.wgrad.b is None:
            return Factor(None, Quantized(matrix(x).t()), tokens)
        return Factor(operands.wgrad.b, saved, tokens)

    def flops(self, call: Call, inputs: Sequence[Any]) -> int:
        return forward_flops(call, inputs)

    def backward_flops(self, call: Call, inputs: Sequence[Any], saved: Sequence[Any], grads: Sequence[Any], needs: Needs) -> int:
        needs_x, needs_w, needs_b = needs
        computed = [any(needs_w)] * len(needs_w) if call["merged"] else needs_w
        return backward_flops(inputs, grads, [needs_x, computed, needs_b])
