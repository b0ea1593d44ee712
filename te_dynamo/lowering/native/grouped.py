"""Experts by torch's grouped GEMMs on a GPU: no offset is read by the host.

`_scaled_grouped_mm` takes E4M3 with a scale for each row, and gives bfloat16; a tensor's scale is that of each row. It sums over K, or N,
and not over tokens, whose groups would have to be padded: the weight's gradient is a grouped GEMM in bfloat16, and so is the input's
where the recipe has gradients in E5M2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from te_dynamo.lowering.call import Call
from te_dynamo.lowering.cost import not_worth_it
from te_dynamo.lowering.devices import HOPPER, too_old
from te_dynamo.lowering.fine_grained import operands_of
from te_dynamo.lowering.fp8 import E4M3, row_amax
from te_dynamo.lowering.granularity import Granularity
from te_dynamo.lowering.grouped import by_tensor
from te_dynamo.lowering.limits import unaligned
from te_dynamo.lowering.partition import recomputed_in_backward
from te_dynamo.lowering.quantized import Quantized, Scales
from te_dynamo.lowering.registry import PER_TENSOR, Backward, Case, Forward, Implementation, Needs, implements
from te_dynamo.recipe import Float8RowwiseScaling, Recipe


def _multiply(a: Quantized, b: Quantized, offsets: Tensor) -> Tensor:
    """a: [T, C], b: [E, R, C], quantized -> [T, R] in bfloat16."""
    assert a.data is not None and b.data is not None and a.scale_inv is not None and b.scale_inv is not None
    rows, columns = a.scale_inv.expand(a.data.shape[0]), b.scale_inv.expand(b.data.shape[:2])
    how: dict[str, Any] = {"offs": offsets, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return torch._scaled_grouped_mm(a.data, b.data.transpose(1, 2), rows.contiguous(), columns.contiguous(), **how)


def _in_groups(t: Tensor, offsets: Tensor) -> Tensor:
    """t [T, C] with zeros in the rows after the last group, which hold anything."""
    return torch.where(
        (torch.arange(t.shape[0], device=t.device) < offsets[-1]).unsqueeze(1), t, torch.zeros((), dtype=t.dtype, device=t.device)
    )


def _by_row(t: Tensor, how: Granularity) -> Quantized:
    """t: [..., C], each row of which has a scale."""
    made = how.quantize(t.reshape(-1, t.shape[-1]))
    assert made.data is not None and made.scale_inv is not None
    return Quantized(made.data.reshape(t.shape), made.scale_inv.reshape(t.shape[:-1]))


def _cost(recipe: Recipe | None) -> dict[str, int]:
    """What pays in training: forward alone, with a cast of the weight in one reading; or dgrad too, with a cast by rows both ways, which
    Inductor makes of more readings."""
    return {"products": 1, "weight_bytes": 3} if isinstance(recipe, PER_TENSOR) else {"products": 2, "weight_bytes": 8}


@implements("grouped_linear", provider="native", recipes=(*PER_TENSOR, Float8RowwiseScaling), devices=("cuda",))
class NativeGroups(Implementation):
    def unavailable(self, recipe: Recipe | None, device: torch.device) -> str | None:
        return too_old(device, HOPPER, "grouped FP8 GEMMs")

    def unsupported(self, case: Case) -> str | None:
        dtypes = {case.attributes["out_dtype"], case.inputs["x"].dtype, case.inputs["weight"].dtype}
        if dtypes != {torch.bfloat16}:
            return "torch's grouped FP8 GEMM is for bfloat16"
        return unaligned(case) or not_worth_it(case.inputs["x"], case.inputs["weight"], training=case.trains, **_cost(case.recipe))

    def backward_reads(self, call: Call, needs: Needs) -> tuple[str, ...]:
        return ("x", "weight", "offsets")

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        x, weight, offsets = inputs
        x = _in_groups(x, offsets)
        if isinstance(call.scaling, PER_TENSOR):
            x8, w8 = by_tensor(x, scales.at("input")), by_tensor(weight, scales.at("weight"))
        else:
            how = operands_of(call.scaling).forward
            assert how.a is not None and how.b is not None
            x8, w8 = _by_row(x, how.a), _by_row(weight, how.b)
        amaxes = [t.amax.flatten() for t in (x8, w8) if t.amax is not None]
        return Forward([_in_groups(_multiply(x8, w8, offsets), offsets)], [], amaxes)

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        x, weight, offsets = inputs
        grad = _in_groups(grads[0], offsets)
        amaxes = [row_amax(grad)] if isinstance(call.scaling, PER_TENSOR) else []
        dx = dw = None
        if needs[0]:
            across = None if amaxes else operands_of(call.scaling).dgrad
            if across is None or across.a is None or across.b is None or call.scaling.fp8_format.gradient != E4M3:
                dx = torch._grouped_mm(grad, weight, offs=offsets)
            else:
                with recomputed_in_backward():
                    w8 = _by_row(weight.transpose(1, 2).contiguous(), across.b)
                dx = _multiply(_by_row(grad, across.a), w8, offsets)
        if needs[1]:
            dw = torch._grouped_mm(grad.t(), _in_groups(x, offsets), offs=offsets)
        return Backward([dx, dw, None], amaxes)
