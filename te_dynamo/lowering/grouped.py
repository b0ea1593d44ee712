"""Linears over groups of rows (`ops.grouped_linear`), one GEMM per group: for devices that share the host's memory, or by definition.

Only rows that are in a group are read: those after the last group enter no amax, and give zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from te_dynamo.ir.sizes import product
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.compute import scales_of
from te_dynamo.lowering.fine_grained import Factor, Multiply, operands_of
from te_dynamo.lowering.fp8 import quantize, row_amax
from te_dynamo.lowering.limits import unsupported_dtype
from te_dynamo.lowering.per_tensor import GemmFunction, kept_by_one_scale
from te_dynamo.lowering.quantized import Kept, Quantized, ScaleOf, Scales
from te_dynamo.lowering.registry import Backward, Case, Forward, Implementation, Needs


def groups(offsets: Tensor) -> Iterator[slice]:
    """The rows of each group."""
    start = 0
    for end in offsets.tolist():
        yield slice(start, end)
        start = end


def by_group(offsets: Tensor, like: Tensor, columns: int, dtype: torch.dtype, product_of: Callable[[int, slice], Tensor]) -> Tensor:
    """[T, columns]: `product_of` gives the rows of each group, the others are zero. like: [T, any]."""
    y = like.new_zeros((like.shape[0], columns), dtype=dtype)
    for e, rows in enumerate(groups(offsets)):
        if rows.stop > rows.start:
            y[rows] = product_of(e, rows)
    return y


class _Grouped(Implementation):
    opaque = True
    cached = frozenset({"inference"})

    def suits(self, device: torch.device) -> bool:
        """Devices on which reading the offsets is free. On a GPU, one FP8 GEMM after another is slower than a mixture of experts in high
        precision."""
        return device.type == "cpu"

    def unsupported(self, case: Case) -> str | None:
        return unsupported_dtype(case.attributes["out_dtype"])

    def fake_forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        x, weight, _ = inputs
        n = weight[0].data.shape[-2] if call.cached else weight.shape[1]
        out = x.new_empty((x.shape[0], n), dtype=call["out_dtype"])
        return Forward([out], self.fake_saved(call, x), [x.new_empty((), dtype=torch.float32) for _ in scales.roles.forward])

    def fake_saved(self, call: Call, x: Tensor) -> list[Quantized]:
        return [Quantized()]

    def fake_backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        (grad,), weight = grads, inputs[1]
        dx = grad.new_empty((grad.shape[0], weight.shape[2]), dtype=call.inputs[0]) if needs[0] else None
        dw = grad.new_empty(weight.shape, dtype=call.inputs[1]) if needs[1] else None
        return Backward([dx, dw, None], [grad.new_empty((), dtype=torch.float32) for _ in scales.roles.gradient])

    def flops(self, call: Call, inputs: Sequence[Any]) -> int:
        x, weight, _ = inputs
        return 2 * product(x) * product(weight[1:2])

    def backward_flops(self, call: Call, inputs: Sequence[Any], saved: Sequence[Any], grads: Sequence[Any], needs: Needs) -> int:
        return 2 * product(grads[0]) * product(inputs[1][2:]) * sum(needs[:2])


class PerTensorGroups(_Grouped):
    """One scale for each tensor: the weights of all experts share one."""

    def __init__(self, gemm: GemmFunction) -> None:
        self.gemm = gemm

    def backward_reads(self, call: Call, needs: Needs) -> tuple[str, ...]:
        return ("weight", "offsets")

    def quantize_weights(self, call: Call, weights: Sequence[Tensor]) -> list[Quantized]:
        (weight,) = weights
        return [by_tensor(weight.detach(), scales_of(call, None).at("weight")).for_backward("data", "scale_inv")]

    def kept_as(self, call: Call) -> Kept | None:
        return kept_by_one_scale(call, ((0,),))

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        x, weight, offsets = inputs
        x8 = by_tensor(_rows_in_groups(x, offsets), scales.at("input"))
        w8 = weight[0] if call.cached else by_tensor(weight, scales.at("weight"))

        def product_of(e: int, rows: slice) -> Tensor:
            return self._multiply(x8, x8.data[rows], w8, w8.data[e], call["out_dtype"])

        y = by_group(offsets, x, w8.data.shape[1], call["out_dtype"], product_of)
        amaxes = [q.amax for q in (x8, w8) if q.amax is not None]  # a kept weight has none, and is not recorded
        return Forward([y], [x8.for_backward("data", "scale_inv"), w8.for_backward("scale", "scale_inv")], amaxes)

    def _multiply(self, a: Quantized, a_data: Tensor, b: Quantized, b_data: Tensor, dtype: torch.dtype) -> Tensor:
        return self.gemm(a_data, b_data, a.scale_inv, b.scale_inv, dtype, None, False)

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        (_, weight, offsets), (x8, w8), (grad,) = inputs, saved, grads
        g8 = by_tensor(_rows_in_groups(grad, offsets), scales.at("grad_output"))
        dx = dw = None
        if needs[0]:
            across = quantize(weight, w8.scale, scales.casting.forward).transpose(1, 2).contiguous()

            def product_of(e: int, rows: slice) -> Tensor:
                return self._multiply(g8, g8.data[rows], w8, across[e], call.inputs[0])

            dx = by_group(offsets, grad, weight.shape[2], call.inputs[0], product_of)
        if needs[1]:
            dw = weight.new_zeros(weight.shape, dtype=call.inputs[1])
            for e, rows in enumerate(groups(offsets)):
                if rows.stop > rows.start:
                    dw[e] = self._multiply(g8, g8.data[rows].t().contiguous(), x8, x8.data[rows].t().contiguous(), call.inputs[1])
        assert g8.amax is not None
        return Backward([dx, dw, None], [g8.amax])

    def fake_saved(self, call: Call, x: Tensor) -> list[Quantized]:
        scalar = x.new_empty((), dtype=torch.float32)
        data = x.new_empty(x.shape, dtype=scales_of(call, None).casting.forward)
        return [Quantized(data, scalar), Quantized(scale=torch.empty_like(scalar), scale_inv=torch.empty_like(scalar))]


class FineGrainedGroups(_Grouped):
    """A scale for each row or block of each expert's operands. A site has neither scales nor amaxes."""

    def __init__(self, multiply: Multiply) -> None:
        self.multiply = multiply

    def backward_reads(self, call: Call, needs: Needs) -> tuple[str, ...]:
        return ("x", "weight", "offsets")

    def quantize_weights(self, call: Call, weights: Sequence[Tensor]) -> list[Quantized]:
        """One for each expert."""
        how = operands_of(call.scaling).forward.b
        assert how is not None
        return [how.quantize(w) for w in weights[0].detach()]

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        (x, weight, offsets), how, dtype = inputs, operands_of(call.scaling).forward, call["out_dtype"]
        k = x.shape[1]

        def product_of(e: int, rows: slice) -> Tensor:
            w = Factor(how.b, weight[e], k) if call.cached else Factor.of(weight[e], how.b)
            return self.multiply(Factor.of(x[rows], how.a), w, dtype, None, True)

        n = weight[0].data.shape[0] if call.cached else weight.shape[1]
        return Forward([by_group(offsets, x, n, dtype, product_of)], [Quantized()], [])

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        (x, weight, offsets), (grad,), how = inputs, grads, operands_of(call.scaling)
        dx = dw = None
        if needs[0]:

            def product_of(e: int, rows: slice) -> Tensor:
                across = Factor.of(weight[e].t(), how.dgrad.b)
                return self.multiply(Factor.of(grad[rows], how.dgrad.a), across, call.inputs[0], None, False)

            dx = by_group(offsets, grad, weight.shape[2], call.inputs[0], product_of)
        if needs[1]:
            dw = weight.new_zeros(weight.shape, dtype=call.inputs[1])
            for e, rows in enumerate(groups(offsets)):
                if rows.stop > rows.start:
                    g, t = Factor.of(grad[rows].t(), how.wgrad.a), Factor.of(x[rows].t(), how.wgrad.b)
                    dw[e] = self.multiply(g, t, call.inputs[1], None, False)
        return Backward([dx, dw, None], [])


def _rows_in_groups(x: Tensor, offsets: Tensor) -> Tensor:
    """x with zeros in the rows after the last group, whose contents are undefined."""
    used = int(offsets[-1])
    return x if used == x.shape[0] else torch.cat([x[:used], x.new_zeros(x.shape[0] - used, x.shape[1])])


def by_tensor(t: Tensor, scale_of: ScaleOf) -> Quantized:
    """Quantizes with one scale; the amaxes are those of the rows."""
    amax = row_amax(t)
    scale = scale_of.of(amax)
    data = scale_of.casting.saturated(t, scale.value, scale_of.dtype).to(scale_of.dtype)
    return Quantized(data, scale.inverse, scale=scale.value, amax=amax)
