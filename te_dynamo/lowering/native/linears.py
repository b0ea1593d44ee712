"""Linears by `torch._scaled_mm`; on a CPU by C++ where there is one scale a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from te_dynamo.lowering import cost
from te_dynamo.lowering.cpu.grouped import CPUGroups
from te_dynamo.lowering.cpu.linears import CPULinears
from te_dynamo.lowering.devices import HOPPER, too_old
from te_dynamo.lowering.fine_grained import FineGrainedLinears, native
from te_dynamo.lowering.grouped import FineGrainedGroups
from te_dynamo.lowering.limits import ALIGNMENT_ON_GPU
from te_dynamo.lowering.per_tensor import OnePassKernels, PerTensorLinears, scaled_mm
from te_dynamo.lowering.registry import PER_TENSOR, Case, implements, missing
from te_dynamo.recipe import Float8BlockScaling, Float8RowwiseScaling, MXFP8BlockScaling, NVFP4BlockScaling, Recipe

CUDA = OnePassKernels(scaled_mm, contiguous=True, multiple=ALIGNMENT_ON_GPU, cast=torch.ops.te_dynamo.cast_transpose)

implements("linears", provider="native", recipes=PER_TENSOR, devices=("cpu",))(CPULinears)
implements("linears", provider="native", recipes=PER_TENSOR, devices=("cuda",), kernels=CUDA)(PerTensorLinears)
implements("grouped_linear", provider="native", recipes=PER_TENSOR, devices=("cpu",))(CPUGroups)
implements("grouped_linear", provider="native", recipes=(Float8RowwiseScaling,), devices=("cpu",), multiply=native)(FineGrainedGroups)


implements("linears", provider="native", recipes=(Float8RowwiseScaling,), devices=("cpu",), multiply=native)(FineGrainedLinears)


@implements("linears", provider="native", recipes=(Float8RowwiseScaling,), devices=("cuda",), multiply=native)
class RowwiseLinears(FineGrainedLinears):
    """Traced, not opaque: run operator by operator, each quantization would pass over its tensor twenty times."""

    opaque = False

    def not_worth_it(self, case: Case, x: Tensor, weight: Tensor) -> str | None:
        products, overhead = 2 if getattr(case.recipe, "high_precision_wgrad", False) else 3, cost.ROWWISE_TRAINING
        return cost.not_worth_it(x, weight, training=case.trains, shares_input=case.shares_input, products=products, overhead=overhead)

    def unavailable(self, recipe: Recipe | None, device: torch.device) -> str | None:
        return too_old(device, HOPPER, "row-wise FP8 GEMMs")


missing(
    "linears",
    "native",
    {
        recipe: f"torch._scaled_mm has {what} on CUDA alone, with compute capability {where} or newer, and te_dynamo does not use it yet"
        for recipe, what, where in (
            (Float8BlockScaling, "blocks of 128", "9.0 and CUDA 12.9"),
            (MXFP8BlockScaling, "MX blocks", "10.0 (Blackwell)"),
            (NVFP4BlockScaling, "NVFP4", "10.0 (Blackwell)"),
        )
    },
)
