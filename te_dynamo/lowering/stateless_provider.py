"""The providers of the stateless recipes: the definition, and torch's own GEMM where it has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import te_dynamo.lowering.stateless_ops  # noqa: F401  (registers its operators)
from te_dynamo.lowering import stateless
from te_dynamo.lowering.cpu_ops import spread
from te_dynamo.lowering.granularity import Quantized
from te_dynamo.lowering.limits import unaligned, unsupported_dtype
from te_dynamo.lowering.linears import Layout
from te_dynamo.lowering.stateless import operands_of
from te_dynamo.recipe import Float8BlockScaling, MXFP8BlockScaling, NVFP4BlockScaling, Recipe

# Why torch._scaled_mm does not compute a recipe, as a clause.
NO_NATIVE: Mapping[type[Recipe], str] = {
    Float8BlockScaling: "torch._scaled_mm has blocks of 128 on CUDA alone, with compute capability 9.0 and CUDA 12.9 or newer, "
    "and it is not lowered to that here",
    MXFP8BlockScaling: "torch._scaled_mm has MX blocks on CUDA alone, with compute capability 10.0 (Blackwell) or newer, "
    "and it is not lowered to that here",
    NVFP4BlockScaling: "torch._scaled_mm has NVFP4 on CUDA alone, with compute capability 10.0 (Blackwell) or newer, "
    "and it is not lowered to that here",
}


class Stateless:
    """One opaque operator a site and direction (see `stateless_ops`). A site has neither scales nor amaxes: those that are
    given are not read, those that are returned are empty."""

    opaque = True
    keeps_weights = False

    def __init__(self, name: str, recipe: Recipe) -> None:
        """name: "reference" or "native"; recipe: one that `stateless.operands_of` knows."""
        self.name, self.recipe = name, recipe
        self.operands = operands_of(recipe)
        self.kernel = (recipe.key, name == "native")

    def unavailable(self, device: torch.device) -> str | None:
        if self.name == "reference":
            return None
        if type(self.recipe) in NO_NATIVE:
            return NO_NATIVE[type(self.recipe)]
        if device.type not in ("cpu", "cuda"):
            return f"torch._scaled_mm takes row-wise scales on a CPU and on CUDA, not on {device.type}"
        if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (9, 0):
            return f"row-wise FP8 GEMMs need compute capability 9.0 (Hopper, Blackwell), this device has {capability[0]}.{capability[1]}"
        return None

    def unsupported_linear(self, device: torch.device, k: Any, n: Any, dtype: torch.dtype) -> str | None:
        on_gpu = self.name == "native" and device.type == "cuda"
        return (unaligned(k, n) if on_gpu else None) or unsupported_dtype(dtype)

    def linears_forward(self, x, weights, biases, scales, layout, out_dtype, recipe, peers, first):
        keep = any(w.requires_grad for w in weights)
        ys, kept = torch.ops.te_dynamo.stateless_fwd(
            x, list(weights), list(biases), *self.kernel, layout.merged, layout.interleave, out_dtype, keep
        )
        x8, *used = kept or ([x] if keep else [None])
        return ys, x8, used, x.new_empty(0, dtype=torch.float32)

    def linears_backward(self, grads, x8, weights, used, scales, layout, needs, x_dtype, recipe, peers, first):
        wanted = (needs.x, list(needs.weights), list(needs.biases))
        saved = [] if x8 is None else [x8, *used]
        present = torch.ops.te_dynamo.stateless_bwd(
            list(grads), saved, list(weights), *self.kernel, layout.merged, layout.interleave, *wanted, x_dtype
        )
        dx, *rest = spread(present, [needs.x, *needs.weights, *needs.biases])
        return dx, rest[: len(weights)], rest[len(weights) :], grads[0].new_empty(0, dtype=torch.float32)

    def linears_inference(self, x, w8s, w_invs, biases, scales, layout, out_dtype, recipe, peers, first):
        sizes, rows = list(layout.sizes), (layout.merged, layout.interleave)
        return torch.ops.te_dynamo.stateless_inference(x, list(w8s), list(w_invs), list(biases), *self.kernel, sizes, *rows, out_dtype)

    def quantize_weights(self, weights: Sequence[Tensor], layout: Layout, recipe: str) -> list[Quantized]:
        """(data [N, ...], scale_inv) of the weight of each GEMM."""
        return stateless.quantize_weights(self.operands, weights, layout)
