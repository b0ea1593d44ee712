"""The providers: who computes a semantic operation in FP8, where each is available, and which one a site gets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from te_dynamo.lowering import cpu_ops, linears
from te_dynamo.lowering.fp8 import casting_of
from te_dynamo.lowering.limits import ALIGNMENT_ON_GPU, unaligned, unsupported_dtype
from te_dynamo.lowering.linears import Gemm, Layout, Needs, Scale
from te_dynamo.lowering.scalars import largest_of
from te_dynamo.lowering.stateless_provider import Stateless
from te_dynamo.lowering.te import library
from te_dynamo.lowering.te import norm as te_norm
from te_dynamo.lowering.te.blocks_provider import BLOCKWISE, NO_TE, Blockwise
from te_dynamo.lowering.te.hardware import unavailable_recipe
from te_dynamo.lowering.te.linear import FusedGemm
from te_dynamo.lowering.te.linear import cast as te_cast
from te_dynamo.lowering.te.linear import gemm as te_gemm
from te_dynamo.recipe import DelayedScaling, Float8CurrentScaling, Recipe, from_key

# The scales of a site: None is current scaling. A provider that is `opaque` takes the packed scales [F] of its graph and
# the index of its first, the others the site's own and their reciprocals, each a 0-d tensor: a kernel that Inductor
# generates reads a pointer, so repeated layers have the same kernels. All float32.
Scales = tuple[Tensor, int] | tuple[list[Tensor], list[Tensor]] | None


class Provider(Protocol):
    """What a provider is: a name, where it is available, what it supports, and its kernels.

    `unavailable` and `unsupported` answer None, or the reason as a clause for a report. opaque: its kernels decide on
    unset scales by themselves, so that one graph serves the first step and all others. keeps_weights: it can be given weights
    that were quantized before, for training (`ready`).
    """

    name: str
    opaque: bool
    keeps_weights: bool

    def unavailable(self, device: torch.device) -> str | None: ...

    def unsupported_linear(self, device: torch.device, k: Any, n: Any, dtype: torch.dtype) -> str | None: ...

    def linears_forward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        scales: Scales,
        layout: Layout,
        out_dtype: torch.dtype,
        recipe: str,
        peers: str,
        first: bool,
        ready: Sequence[Ready] = (),
    ) -> tuple[list[Tensor], Tensor, Sequence[Tensor], Tensor]: ...

    def linears_backward(
        self,
        grads: Sequence[Tensor],
        x8: Tensor | None,
        weights: Sequence[Tensor],
        used: Sequence[Tensor],
        scales: Scales,
        layout: Layout,
        needs: Needs,
        x_dtype: torch.dtype,
        recipe: str,
        peers: str,
        first: bool,
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor]: ...

    def quantize_weights(self, weights: Sequence[Tensor], layout: Layout, recipe: str) -> list[tuple[Tensor, Tensor]]: ...

    def linears_inference(
        self,
        x: Tensor,
        w8s: Sequence[Tensor],
        w_invs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        scales: Scales,
        layout: Layout,
        out_dtype: torch.dtype,
        recipe: str,
        peers: str,
        first: bool,
    ) -> list[Tensor]: ...


# A weight that was quantized before: FP8 [N, K], FP8 [K, N], the scale, its reciprocal and the amax (f32, 0-d).
Ready = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class PerTensor:
    """What providers with one scale a tensor have in common."""

    def quantize_weights(self, weights: Sequence[Tensor], layout: Layout, recipe: str) -> list[tuple[Tensor, Tensor]]:
        return linears.quantize_weights(weights, layout, casting_of(recipe))


class Generated(PerTensor):
    """Quantization as plain torch, left to Inductor to fuse with its neighbors, around a provider's GEMM."""

    opaque = False
    keeps_weights = True

    def __init__(self, name: str, gemm: Gemm) -> None:
        self.name, self.gemm = name, gemm

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def unsupported_linear(self, device: torch.device, k: Any, n: Any, dtype: torch.dtype) -> str | None:
        return unsupported_dtype(dtype)

    def prepare_weights(self, weights, layout, recipe) -> list[Ready]:
        """Each GEMM's weight, as `linears_forward` takes it."""
        made = linears.prepare_weights(self.gemm, weights, layout, casting_of(recipe))
        return [(w.data, w.transposed, *w.scale, w.amax) for w in made]  # type: ignore[misc]  # both copies are there

    def linears_forward(self, x, weights, biases, scales, layout, out_dtype, recipe, peers, first, ready=()):
        rows, casting = x.reshape(-1, x.shape[-1]), casting_of(recipe, peers)
        ys, x8, used, amaxes, kept = linears.forward(
            self.gemm, rows, weights, biases, _pairs(scales), layout, out_dtype, casting, first, _quantized(ready)
        )
        ys = [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]
        return ys, x8, [*(t for pair in used for t in pair), *kept], largest_of(amaxes)

    def linears_backward(self, grads, x8, weights, used, scales, layout, needs, x_dtype, recipe, peers, first):
        lead, casting = grads[0].shape[:-1], casting_of(recipe, peers)
        rows = [t.reshape(-1, t.shape[-1]) for t in grads]
        pairs = 2 * (1 + len(grads))
        forward_scales, kept = [Scale(*pair) for pair in zip(used[:pairs:2], used[1:pairs:2], strict=True)], used[pairs:]
        dx, dws, dbs, amaxes = linears.backward(
            self.gemm, rows, x8, weights, forward_scales, kept, _pairs(scales), layout, needs, x_dtype, casting, first
        )
        return (None if dx is None else dx.reshape(*lead, dx.shape[-1])), dws, dbs, largest_of(amaxes)

    def linears_inference(self, x, w8s, w_invs, biases, scales, layout, out_dtype, recipe, peers, first):
        rows = x.reshape(-1, x.shape[-1])
        ys = linears.inference(self.gemm, rows, w8s, w_invs, biases, _pairs(scales), layout, out_dtype, casting_of(recipe), first)
        return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]


def _quantized(ready: Sequence[Ready]) -> list[linears.Quantized]:
    return [linears.Quantized(data, across, Scale(*scale), amax) for data, across, *scale, amax in ready]


def _pairs(scales: Scales) -> list[Scale] | None:
    return None if scales is None else [Scale(*pair) for pair in zip(*scales, strict=True)]


class NativeOnGPU(Generated):
    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"this form of it is for CUDA devices, not {device.type}"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            return f"FP8 GEMMs need compute capability 8.9 (Ada, Hopper, Blackwell), this device has {capability[0]}.{capability[1]}"
        return None

    def unsupported_linear(self, device: torch.device, k: Any, n: Any, dtype: torch.dtype) -> str | None:
        return unaligned(k, n) or unsupported_dtype(dtype)


class NativeOnCPU(PerTensor):
    """One opaque operator a site and direction (see `cpu_ops`)."""

    name = "native"
    opaque = True
    keeps_weights = False

    def unavailable(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"this form of it is for the CPU, not {device.type}"

    def unsupported_linear(self, device: torch.device, k: Any, n: Any, dtype: torch.dtype) -> str | None:
        return unsupported_dtype(dtype)

    def linears_forward(self, x, weights, biases, scales, layout, out_dtype, recipe, peers, first):
        scale, f = scales or (None, 0)
        ys, x8, used, amax = torch.ops.te_dynamo.linears_fwd(
            x, list(weights), list(biases), scale, f, layout.merged, layout.interleave, out_dtype, recipe, peers
        )
        return ys, x8, [used], amax

    def linears_backward(self, grads, x8, weights, used, scales, layout, needs, x_dtype, recipe, peers, first):
        grad_scale, g = scales or (None, 0)
        wanted = (needs.x, list(needs.weights), list(needs.biases))
        present, amax = torch.ops.te_dynamo.linears_bwd(
            list(grads), x8, list(weights), used[0], grad_scale, g, layout.merged, layout.interleave, *wanted, x_dtype, recipe, peers
        )
        dx, *rest = cpu_ops.spread(present, [needs.x, *needs.weights, *needs.biases])
        return dx, rest[: len(weights)], rest[len(weights) :], amax

    def linears_inference(self, x, w8s, w_invs, biases, scales, layout, out_dtype, recipe, peers, first):
        scale, f = scales or (None, 0)
        return torch.ops.te_dynamo.linears_inference(
            x, list(w8s), list(w_invs), list(biases), scale, f, list(layout.sizes), layout.merged, layout.interleave, out_dtype, recipe
        )


class TransformerEngine(Generated):
    """TE's GEMM and its fused cast and transpose of weights. Activations are quantized by the kernels that make them, which
    Inductor generates, since a kernel of their own would read and write them once more; but for a norm of what lies in memory
    already, and gradients that a bias wants summed: those kernels are TE's."""

    def unavailable(self, device: torch.device) -> str | None:
        return library.unavailable(device) or unavailable_recipe(DelayedScaling(), device)  # what current scaling needs too

    def unsupported_linear(self, device: torch.device, k: Any, n: Any, dtype: torch.dtype) -> str | None:
        return unaligned(k, n) or unsupported_dtype(dtype)

    def unsupported_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, recipe: Recipe) -> str | None:
        """Why its own kernel does not compute a norm that linears read."""
        if not isinstance(recipe, DelayedScaling):
            return "a norm writes FP8 by itself only where the scale is known before: in delayed scaling"
        return te_norm.unsupported(x, weight, bias, kind, self.gemm.multiple)

    def norm_linears_forward(self, x, norm, weights, biases, scales, layout, out_dtype, recipe, ready=()):
        """norm: (weight, bias, kind, eps, zero_centered) -> (outputs, the norm's output in FP8, its (mean, one over the deviation),
        what backward is given as `used`, amaxes)."""
        weight, bias, *attributes = norm
        rows, casting, pairs = x.reshape(-1, x.shape[-1]), casting_of(recipe), _pairs(scales)
        h8, *statistics, amax = torch.ops.te_dynamo.te_norm(rows, weight, bias, pairs[0].value, casting.forward, *attributes)
        h = linears.Quantized(h8, None, pairs[0], amax)
        ys, used, amaxes, kept = linears.multiply(
            self.gemm, h, rows.shape[0], weights, biases, pairs, layout, out_dtype, casting, False, _quantized(ready)
        )
        ys = [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]
        return ys, h8, statistics, [*(t for pair in used for t in pair), *kept], largest_of(amaxes)


REFERENCE = Generated("reference", linears.REFERENCE)
TE = TransformerEngine("te", FusedGemm(te_gemm, contiguous=True, multiple=ALIGNMENT_ON_GPU, cast=te_cast))
NATIVE: dict[str, NativeOnCPU | NativeOnGPU] = {"cpu": NativeOnCPU(), "cuda": NativeOnGPU("native", linears.NATIVE_CUDA)}


PER_TENSOR = (DelayedScaling, Float8CurrentScaling)


@cache
def provider_named(key: str) -> Any:
    """The provider of a key as stored in a graph: "reference", "te", "native:cpu", "native:cuda"."""
    name, _, device = key.partition(":")
    if name == "reference":
        return REFERENCE
    if name == "te":
        return TE
    if name == "native" and device in NATIVE:
        return NATIVE[device]
    raise KeyError(f"no provider is called {key!r}")


def provider_for(key: str, recipe: str) -> Any:
    """The provider of a key, in its form for a recipe (its key)."""
    return provider_named(key) if isinstance(from_key(recipe), PER_TENSOR) else _finer(key.partition(":")[0], recipe)


@cache
def _finer(name: str, recipe: str) -> Blockwise | Stateless:
    """The provider of a recipe that scales finer than a tensor."""
    return Blockwise(from_key(recipe)) if name == "te" else Stateless(name, from_key(recipe))


def choose(requested: str, device: torch.device) -> tuple[str | None, str | None]:
    """The key of the provider for a device, or None and the reason.

    Raises RuntimeError where a provider that was asked for by name is not available.
    """
    if requested == "te":
        reason = TE.unavailable(device)
        if reason is None:
            return "te", None
        raise RuntimeError(f"te_fp8: provider='te' is not available: {reason}. Remedy: that, or provider='auto'.")
    if requested == "reference":
        return "reference", None
    native = NATIVE.get(device.type)
    reason = f"no FP8 provider for device {device.type}" if native is None else native.unavailable(device)
    if reason is None:
        return f"native:{device.type}", None
    if requested == "native":
        raise RuntimeError(f"te_fp8: provider='native' is not available: {reason}. Remedy: provider='auto' or 'reference'.")
    return None, reason


def choose_for(recipe: Recipe, requested: str, chosen: str, device: torch.device) -> tuple[str, str | None]:
    """The key of the provider of a site with this recipe, where `chosen` is the graph's; and why it is another, if it is.

    Raises RuntimeError where the provider that was asked for by name does not have the recipe.
    """
    if isinstance(recipe, PER_TENSOR) or chosen == "reference":
        return chosen, None
    if chosen == "te" and not isinstance(recipe, BLOCKWISE):
        reason: str | None = NO_TE[type(recipe)]
    else:
        reason = _finer(chosen.partition(":")[0], recipe.key).unavailable(device)
    if reason is None:
        return chosen, None
    if requested != "auto":
        message = f"provider={requested!r} does not have the recipe {recipe.name!r}: {reason}"
        raise RuntimeError(f"te_fp8: {message}. Remedy: provider='auto' or 'reference'.")
    if device.type == "cuda" and isinstance(recipe, BLOCKWISE) and _finer("te", recipe.key).unavailable(device) is None:
        return "te", reason
    return "reference", reason
