"""Linears with one scale per tensor on a CPU: a C++ function for forward and one for backward (`linears.cpp`).

Saved for backward: the input in FP8, and all scales in one tensor. If no compiler is found, or ranks must agree on a first scale, the
base class takes over, with torch's own kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, addressof, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from te_dynamo.ir.linear import GemmRows
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.compute import WIDTH
from te_dynamo.lowering.cpu.library import DTYPES, LinearsStruct, library
from te_dynamo.lowering.fp8 import E4M3, E5M2, FP8_MAX, casting_of
from te_dynamo.lowering.per_tensor import Kernels, PerTensorLinears, matrix, scaled_mm
from te_dynamo.lowering.quantized import Quantized, Scales
from te_dynamo.lowering.registry import Backward, Forward, Needs, Packed
from te_dynamo.recipe import margin_of


@dataclass(frozen=True)
class Plan:
    """What the C++ is told about a call. widths: the rows of each GEMM; address: of the struct; given: the struct and what it points to."""

    gemms: list[tuple[int, ...]]
    widths: list[int]
    address: int
    given: Sequence[Any]


@cache
def plan_of(call: Call) -> Plan:
    rows, casting = GemmRows.of(call.attributes), casting_of(call.recipe, call.amax_group)
    _, weights, biases = call.inputs
    count = len(rows.sizes)

    def top(role: str, dtype: torch.dtype) -> float:
        return FP8_MAX[dtype] * 2.0 ** -margin_of(casting.margin, role, gradient=role == "grad_output")

    sizes = _numbers(rows.sizes)
    dtypes = [_numbers([DTYPES.get(d, 0) for d in (given or [None] * count)]) for given in (weights, biases)]
    struct = LinearsStruct(
        count=count,
        in_features=call["in_features"],
        interleave=rows.interleave,
        merged=rows.merged,
        x_dtype=DTYPES[call.inputs[0]],
        out_dtype=DTYPES[call["out_dtype"]],
        gradient_is_e5m2=casting.gradient == E5M2,
        saturates_infinite=casting.saturates_infinite,
        power_of_2=casting.power_2_scale,
        agrees=bool(casting.amax_group),
        epsilon=casting.amax_epsilon,
        top_input=top("input", casting.forward),
        top_weight=top("weight", casting.forward),
        top_gradient=top("grad_output", casting.gradient),
        sizes=sizes,
        weight_dtypes=dtypes[0],
        bias_dtypes=dtypes[1],
    )
    gemms = rows.gemms()
    return Plan(gemms, [sum(rows.sizes[i] for i in gemm) for gemm in gemms], addressof(struct), (struct, sizes, *dtypes))


class CPULinears(PerTensorLinears):
    def __init__(self) -> None:
        super().__init__(Kernels(scaled_mm), opaque=True)

    def quantize_weights(self, call: Call, weights: Sequence[Tensor]) -> list[Quantized]:
        kernels = library() if all(type(w) is Tensor for w in weights) else None  # else they are fake, or parts of something larger
        if kernels is None:
            return [w8._replace(data=_by_rows(w8.data)) for w8 in super().quantize_weights(call, weights)]
        weights = [w.contiguous() for w in weights]
        plan, made = plan_of(call.but(inputs=(call.inputs[0], tuple(w.dtype for w in weights), None))), list[Quantized]()
        for number, width in enumerate(plan.widths):
            data, inverse = weights[0].new_empty((width, call["in_features"]), dtype=E4M3), weights[0].new_empty((), dtype=torch.float32)
            kernels.te_quantize(plan.address, number, addresses(weights), data.data_ptr(), inverse.data_ptr())
            made.append(Quantized(data, inverse))
        return made

    def packed_forward(self, call: Call, inputs: Sequence[Any], scales: Tensor | None, start: int, needs: Sequence[bool]) -> Packed | None:
        kernels = library()
        if kernels is None:
            return None
        plan, x = plan_of(call), inputs[0]
        count, flat = len(plan.given[1]), _rows(x)
        if call.cached:
            biases, fields = inputs[1 : 1 + count], inputs[1 + count :]
            weights, inverses = fields[::WIDTH], addresses(fields[1::WIDTH])
        else:
            weights, biases, inverses = inputs[1 : 1 + count], inputs[1 + count :], None
        weights, biases = [w.contiguous() for w in weights], [None if b is None else b.contiguous() for b in biases]
        saves, lead = call.records or any(needs), x.shape[:-1]
        outputs = [x.new_empty((*lead, width), dtype=call["out_dtype"]) for width in plan.widths]
        x8 = x.new_empty(flat.shape, dtype=E4M3) if any(needs[1 : 1 + count]) else None
        kept = x.new_empty(1 + 2 * len(plan.gemms), dtype=torch.float32) if saves else None
        amaxes = x.new_empty(2 * count if call.records else 0, dtype=torch.float32)
        undone = kernels.te_forward(
            plan.address,
            flat.shape[0],
            flat.data_ptr(),
            flat.stride(0),
            addresses(weights),
            addresses(biases),
            _slots(scales, start),
            inverses,
            addresses(outputs),
            _pointer(x8),
            _pointer(kept),
            amaxes.data_ptr() if call.records else None,
        )
        return None if undone else Packed(amaxes, outputs, [Quantized(x8, scale=kept)] if saves else [])

    def packed_backward(
        self,
        call: Call,
        inputs: Sequence[Any],
        saved: Sequence[Any],
        grads: Sequence[Tensor],
        scales: Tensor | None,
        start: int,
        needs: Sequence[bool],
    ) -> Packed | None:
        kernels = library()
        if kernels is None or any(g.dtype != call["out_dtype"] for g in grads):
            return None
        plan, (x8, *_) = plan_of(call), saved
        kept = saved[Quantized._fields.index("scale")]
        count, k = len(plan.given[1]), call["in_features"]
        sizes, bias_dtypes = plan.given[1], call.inputs[2]
        weights, needs_w, needs_b = [w.contiguous() for w in inputs[1 : 1 + count]], needs[1 : 1 + count], needs[1 + count :]
        flat = [_rows(g) for g in grads]
        dx = grads[0].new_empty((*grads[0].shape[:-1], k), dtype=call.inputs[0]) if needs[0] else None
        dws = [w.new_empty(w.shape) if needed else None for w, needed in zip(weights, needs_w, strict=True)]
        dbs = [kept.new_empty(sizes[i], dtype=bias_dtypes[i]) if needed else None for i, needed in enumerate(needs_b)]
        amaxes = kept.new_empty(count if call.records else 0)
        undone = kernels.te_backward(
            plan.address,
            flat[0].shape[0],
            addresses(flat),
            (c_int64 * len(flat))(*[g.stride(0) for g in flat]),
            addresses(weights),
            _pointer(x8),
            kept.data_ptr(),
            _slots(scales, start),
            _pointer(dx),
            addresses(dws),
            addresses(dbs),
            amaxes.data_ptr() if call.records else None,
        )
        return None if undone else Packed(amaxes, [t for t in (dx, *dws, *dbs) if t is not None])

    # -- the fallback, and shape inference: the base class's, with results laid out as above

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        done = super().forward(call, inputs, scales, needs)
        if call.cached:
            return done._replace(saved=[])
        x8, *w8s = done.saved
        scales_of_weights = [t for w8 in w8s for t in w8.scales]
        inverse = scales_of_weights[0] if x8.scale_inv is None else x8.scale_inv  # not read if the input is not
        kept = torch.stack([inverse, *scales_of_weights])
        return done._replace(saved=[Quantized(_by_rows(x8.data), scale=kept)])

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        x8, (inverse, *rest) = saved[0].data, saved[0].scale.unbind()
        w8s = [Quantized(scale=scale, scale_inv=inv) for scale, inv in zip(rest[::2], rest[1::2], strict=True)]
        return super().backward(call, inputs, [Quantized(x8, inverse), *w8s], grads, scales, needs)


def _rows(t: Tensor) -> Tensor:
    """[..., N] -> [tokens, N], with a column stride of 1."""
    flat = t if t.dim() == 2 else matrix(t)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _by_rows(t: Tensor | None) -> Tensor | None:
    """Contiguous, with the strides of a new tensor even where a size is 1."""
    return None if t is None else t.clone(memory_format=torch.contiguous_format)


def _slots(scales: Tensor | None, start: int) -> int | None:
    return None if scales is None else scales.data_ptr() + 4 * start


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def addresses(tensors: Sequence[Tensor | None]) -> Array[c_void_p]:
    """The addresses of tensors as a C array. The tensors must outlive the call."""
    return (c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


def _numbers(values: Sequence[int]) -> Array[c_int64]:
    return (c_int64 * len(values))(*values)
