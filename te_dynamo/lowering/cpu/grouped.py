"""Experts with one scale per tensor on a CPU: the C++ for linears runs on the rows of each expert, with scales that all experts share."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64
from functools import cache
from typing import Any

import torch
from torch import Tensor

from te_dynamo.lowering.call import Call
from te_dynamo.lowering.cpu.library import DTYPES, library
from te_dynamo.lowering.cpu.linears import Plan, addresses, plan_of
from te_dynamo.lowering.fp8 import E4M3, row_amax
from te_dynamo.lowering.grouped import PerTensorGroups, groups
from te_dynamo.lowering.per_tensor import scaled_mm
from te_dynamo.lowering.quantized import Quantized, Scale, ScaleOf, Scales
from te_dynamo.lowering.registry import Backward, Forward, Needs


@cache
def _plan(call: Call, n: int) -> Plan:
    """The plan of one expert's linear, with weights [n, K]. The scales are given, so no ranks need to agree."""
    attributes = {**call.attributes, "sizes": (n,), "merged": False, "interleave": 0}
    return plan_of(call.but(op="linears", inputs=(call.inputs[0], (call.inputs[1],), (None,)), attributes=attributes, amax_group=""))


class CPUGroups(PerTensorGroups):
    def __init__(self) -> None:
        super().__init__(scaled_mm)

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        kernels, (x, weight, offsets) = library(), inputs
        if kernels is None or x.dtype not in DTYPES:
            return super().forward(call, inputs, scales, needs)
        x, kept = x.contiguous(), weight[0] if call.cached else None
        of_x, peak = _measured(x[: int(offsets[-1])], scales.at("input"))
        amaxes, matrices, of_w = [peak], weight, of_x  # a kept weight's scale is not read
        if kept is None:
            of_w, peak = _measured(weight, scales.at("weight"))
            amaxes.append(peak)
        else:
            matrices = kept.data
        matrices, slots = matrices.contiguous(), torch.stack([of_x.value, of_w.value])
        y = x.new_zeros((x.shape[0], matrices.shape[1]), dtype=call["out_dtype"])
        x8, plan = x.new_zeros(x.shape, dtype=E4M3), _plan(call, matrices.shape[1])
        for e, rows in enumerate(groups(offsets)):
            if rows.stop > rows.start:
                kernels.te_forward(
                    plan.address,
                    rows.stop - rows.start,
                    x[rows].data_ptr(),
                    x.stride(0),
                    addresses([matrices[e]]),
                    addresses([None]),
                    slots.data_ptr(),
                    None if kept is None else addresses([kept.scale_inv]),
                    addresses([y[rows]]),
                    x8[rows].data_ptr(),
                    None,
                    None,
                )
        return Forward([y], [Quantized(x8, of_x.inverse), Quantized(scale=of_w.value, scale_inv=of_w.inverse)], amaxes)

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        kernels, (_, weight, offsets), (x8, w8), grad = library(), inputs, saved, grads[0]
        if kernels is None or grad.dtype != call["out_dtype"]:
            return super().backward(call, inputs, saved, grads, scales, needs)
        grad, matrices = grad.contiguous(), weight.contiguous()
        of_g, peak = _measured(grad[: int(offsets[-1])], scales.at("grad_output"))
        slots = torch.stack([of_g.value])
        assert x8.scale_inv is not None and x8.data is not None
        kept = torch.stack([x8.scale_inv, *w8.scales])
        dx = grad.new_zeros((grad.shape[0], weight.shape[2]), dtype=call.inputs[0]) if needs[0] else None
        dw = grad.new_zeros(weight.shape, dtype=call.inputs[1]) if needs[1] else None
        plan = _plan(call, weight.shape[1])
        for e, rows in enumerate(groups(offsets)):
            if rows.stop > rows.start:
                kernels.te_backward(
                    plan.address,
                    rows.stop - rows.start,
                    addresses([grad[rows]]),
                    (c_int64 * 1)(grad.stride(0)),
                    addresses([matrices[e]]),
                    x8.data[rows].data_ptr(),
                    kept.data_ptr(),
                    slots.data_ptr(),
                    None if dx is None else dx[rows].data_ptr(),
                    addresses([None if dw is None else dw[e]]),
                    addresses([None]),
                    None,
                )
        return Backward([dx, dw, None], [peak])


def _measured(t: Tensor, scale_of: ScaleOf) -> tuple[Scale, Tensor]:
    """The scale of a tensor (its slot's, if that is set) and its amaxes."""
    amaxes = row_amax(t)
    return scale_of.of(amaxes), amaxes
