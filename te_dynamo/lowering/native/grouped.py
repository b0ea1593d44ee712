"""Experts by torch's grouped GEMMs on a GPU, all three of a training step in FP8; the host reads no offsets.

`_scaled_grouped_mm` takes only E4M3, with a scale for each row of both operands, both with the summed dimension innermost, and returns
bfloat16. As a consequence:

- Gradients are E4M3 whatever the recipe's format. Each row has its own scale, a power of two, which makes up for E5M2's extra exponent bit
  (docs/experts.md has the measurements).
- The weights are cast once, with their transposed copies (`cast_matrices`). Dgrad sums over what were the weights' rows, so the scale of a
  row is multiplied into the gradient's column before the cast.
- Wgrad sums over an expert's tokens. Its operands are transposed copies (`transpose_rows`): of the input as forward has it, and of a
  gradient that the input's scales were multiplied into before the cast; the gradient's own scales, powers of two, are multiplied in when it
  is copied.
- In wgrad a group begins at a multiple of 16, as TMA requires, and is not empty, as CUTLASS requires: the copies have zeros in between.
- Rows after the last group are not written: their contents are undefined, as with `torch._grouped_mm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import te_dynamo.lowering.kernels.cast_matrices
import te_dynamo.lowering.kernels.transpose_rows
import te_dynamo.lowering.quantize_rows  # noqa: F401  (register their operators)
from te_dynamo.lowering import cost
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.compute import scales_of
from te_dynamo.lowering.devices import dotted
from te_dynamo.lowering.fp8 import E4M3, FP8_MAX, row_amax
from te_dynamo.lowering.granularity import Blocks
from te_dynamo.lowering.group_rows import Groups
from te_dynamo.lowering.limits import unaligned
from te_dynamo.lowering.partition import kept_or_remade, recomputed_in_backward
from te_dynamo.lowering.per_tensor import kept_by_one_scale, stored
from te_dynamo.lowering.quantized import Kept, Quantized, ScaleOf, Scales
from te_dynamo.lowering.registry import PER_TENSOR, Backward, Case, Forward, Implementation, Needs, implements
from te_dynamo.recipe import Float8RowwiseScaling


def multiply(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, offsets: Tensor, fast: bool = False) -> Tensor:
    """In bfloat16: a [T, C], b [E, R, C] -> [T, R], the rows of each group times its own matrix; or a [M, P], b [N, P] -> [E, M, N], one
    product for each group of columns. rows [T] or [E * M], columns [E, R] or [E * N]: float32, the operands' scale_inv."""
    return torch._scaled_grouped_mm(
        a, b.transpose(-2, -1), rows.contiguous(), columns.contiguous(), offs=offsets, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


@implements("grouped_linear", provider="native", recipes=(*PER_TENSOR, Float8RowwiseScaling), devices=("cuda",))
class NativeGroups(Implementation):
    cached = frozenset({"training", "inference"})

    def suits(self, device: torch.device) -> bool:
        return torch.cuda.get_device_capability(device)[0] == 9

    def unsupported(self, case: Case) -> str | None:
        dtypes = {case.attributes["out_dtype"], case.inputs["x"].dtype, case.inputs["weight"].dtype}
        if dtypes != {torch.bfloat16}:
            return "torch's grouped FP8 GEMM is for bfloat16"
        if not self.suits(case.device):
            found = torch.cuda.get_device_capability(case.device)
            return f"torch's grouped FP8 GEMM is for Hopper (compute capability 9.0), this device has {dotted(found)}"
        return unaligned(case)

    def not_worth_it(self, case: Case, x: Tensor, weight: Tensor) -> str | None:
        products = 2 if getattr(case.recipe, "high_precision_wgrad", False) else 3
        return cost.not_worth_it(x, weight, training=case.trains, products=products)

    def backward_reads(self, call: Call, needs: Needs) -> tuple[str, ...]:
        weight = ["weight"] if needs[0] and call.remakes_weights else []
        return (*(["x"] if needs[1] and _wgrad_in_bf16(call) else []), *weight, "offsets")

    def quantize_weights(self, call: Call, weights: Sequence[Tensor]) -> list[Quantized]:
        trains = call.cached == "training"
        w8 = _weight(call, weights[0].detach(), scales_of(call, None).at("weight"), both_ways=trains)
        if not trains:
            return [w8.for_backward("data", "scale_inv")]
        return [w8._replace(scale=None, amax=None if w8.amax is None else w8.amax.amax())]

    def kept_as(self, call: Call) -> Kept | None:
        """All matrices as one, stacked by rows; not for training, which has a transposed copy of each."""
        if call.cached != "inference":
            return None
        if not isinstance(call.scaling, Float8RowwiseScaling):
            return kept_by_one_scale(call, ((0,),))
        rows = _rows(call.scaling)
        return Kept(((0,),), 0, FP8_MAX[E4M3], rows.epsilon, rows.power_of_2, by_row=True)

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        x, weight, offsets, *kept = inputs
        groups = Groups(offsets, x.shape[0])
        x8 = _input(call, x, groups, scales.at("input"))
        if call.cached:
            (w8,) = kept[0] if kept else weight
        else:
            w8 = _weight(call, weight, scales.at("weight"), both_ways=needs[0] and not call.remakes_weights)
        assert w8.data is not None and w8.scale_inv is not None
        y = multiply(x8.data, w8.data, _of_rows(x8, groups.tokens), w8.scale_inv.expand(w8.data.shape[:2]), offsets, fast=True)
        amaxes = [t.amax for t in (x8, w8) if t.amax is not None]
        kept_of_x = x8.for_backward("data", "scale_inv") if needs[1] else Quantized()
        kept_of_w = w8.for_backward("transposed", "scale", "scale_inv") if needs[0] else Quantized()
        return Forward([y], [kept_of_x, kept_of_w], amaxes)

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        (x, weight, offsets), (x8, w8), grad = inputs, saved, grads[0]
        groups = Groups(offsets, grad.shape[0])
        by_tensor = isinstance(call.scaling, PER_TENSOR)
        one = grad.new_ones((), dtype=torch.float32)
        for_both = _gradient(grad) if by_tensor else None  # else each GEMM's has the scales of the other operand in it
        dx = dw = None
        if needs[0]:
            if call.remakes_weights:
                with recomputed_in_backward():
                    w8 = w8._replace(transposed=_cast(call, weight, w8.scale, data=False, transposed=True)[1])
            assert w8.transposed is not None and w8.scale_inv is not None
            g8 = for_both or _gradient(grad.float() * w8.scale_inv[groups.of_row])
            columns = (w8.scale_inv if by_tensor else one).expand(w8.transposed.shape[:2])
            dx = multiply(g8.data, w8.transposed, _of_rows(g8, groups.tokens), columns, offsets)
        if needs[1] and _wgrad_in_bf16(call):
            dw = torch._grouped_mm(grad.t(), x, offs=offsets)
        elif needs[1]:
            assert x8.scale_inv is not None
            g8 = for_both or _gradient(grad.float() * x8.scale_inv.unsqueeze(1))
            dw = _wgrad(g8, x8, groups, x8.scale_inv if by_tensor else one, like_inputs=call["inputs_first"])
        return Backward([dx, dw, None], [] if for_both is None else [groups.only(for_both.amax)])


def _gradient(grad: Tensor) -> Quantized:
    """Each row has its scale."""
    data, inverse, amax = torch.ops.te_dynamo.quantize_rows([grad], E4M3)
    return Quantized(stored(data), inverse, amax=amax)


def _wgrad_in_bf16(call: Call) -> bool:
    return getattr(call.scaling, "high_precision_wgrad", False)


def _wgrad(g8: Quantized, x8: Quantized, groups: Groups, x_inv: Tensor, like_inputs: bool) -> Tensor:
    """[E, N, K], stored as [E, K, N] if `like_inputs`. x_inv: f32, 0-d, what all of x8 is still to be multiplied by."""
    ends, rows, group = groups.spread
    inverse = _of_rows(g8, groups.tokens)
    largest = groups.largest(inverse)
    factor = inverse[rows.clamp(min=0)] / largest[group]
    g = torch.ops.te_dynamo.transpose_rows(g8.data, rows, factor)
    x = torch.ops.te_dynamo.transpose_rows(x8.data, rows, None)
    of_g = largest.unsqueeze(1).expand(groups.count, g.shape[0]).reshape(-1)
    of_x = x_inv.expand(groups.count * x.shape[0])
    return multiply(x, g, of_x, of_g, ends).transpose(1, 2) if like_inputs else multiply(g, x, of_g, of_x, ends)


def _of_rows(t: Quantized, rows: Any) -> Tensor:
    """The scale_inv of each row, [rows], from one for the tensor or one for each row."""
    assert t.scale_inv is not None
    return t.scale_inv.expand(rows) if t.scale_inv.dim() == 0 else t.scale_inv.reshape(rows)


def _rows(recipe: Float8RowwiseScaling) -> Blocks:
    return Blocks(E4M3, 1, None, recipe.power_2_scale)


def _input(call: Call, x: Tensor, groups: Groups, scale_of: ScaleOf) -> Quantized:
    """x [T, K]; the scale_inv of rows is [T]."""
    recipe = call.scaling
    if isinstance(recipe, Float8RowwiseScaling):
        with kept_or_remade(call):
            made = _rows(recipe).quantize(x)
            data = stored(made.data)
        return Quantized(data, _of_rows(made, groups.tokens))
    amax = row_amax(groups.only(x))
    scale = scale_of.of(amax)
    with recomputed_in_backward() if "input" in call.remakes else nullcontext():
        scaled = scale_of.casting.saturated(x, scale.value, E4M3)
    with kept_or_remade(call):
        data = stored(scaled.to(E4M3))
    return Quantized(data, scale.inverse, amax=amax)


def _weight(call: Call, weight: Tensor, scale_of: ScaleOf, both_ways: bool) -> Quantized:
    """weight [E, N, K]; both_ways: with its transposed copies, [E, K, N]. The scale_inv of rows is [E, N]."""
    if isinstance(call.scaling, Float8RowwiseScaling):
        data, across, inverse, _ = _cast(call, weight, None, True, both_ways)
        return Quantized(data, inverse, across if both_ways else None)
    scale = scale_of.known or scale_of.of(row_amax(weight))
    data, across, _, amax = _cast(call, weight, scale.value, True, both_ways)
    return Quantized(data, scale.inverse, across if both_ways else None, scale=scale.value, amax=amax)


def _cast(call: Call, weight: Tensor, scale: Tensor | None, data: bool, transposed: bool) -> Sequence[Tensor]:
    """scale: None for one per row."""
    power_of_2 = getattr(call.scaling, "power_2_scale", False) and scale is None
    return torch.ops.te_dynamo.cast_matrices(weight, scale, E4M3, power_of_2, data, transposed)
