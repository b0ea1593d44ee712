"""FP8 linears of one input: forward, dgrad and wgrad, over plain tensors, for any GEMM that multiplies FP8.

What a provider brings is a `Gemm`; the order of quantization, what is saved for backward and where amaxes go are the
same for all. Saved for backward: the input in FP8, once for all linears that share it. The weights' FP8 copies are made
again in backward from the weights themselves, with the scales of the forward.

Scales come packed: `scale` [F] holds the forward scales of a graph, linear i of a group has its input's at `f + 2 * i`
and its weight's at `f + 2 * i + 1`; `grad_scale` [G] holds the gradient's at `g + i`. An element that is 0 is unset:
that tensor takes its scale from its own amax (`first`). Without a `scale` all do: current scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from te_dynamo.lowering.fp8 import E4M3, E5M2, amax, dequantize, quantize, scale_of

# gemm(a, b, a_scale_inv, b_scale_inv, out_dtype, bias, fast): a [M, K], b [N, K], both FP8 -> a @ b.T + bias [M, N] in
# out_dtype; fast: the hardware may accumulate with fewer bits (as TE does in forward, and not in backward).
GemmFunction = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype, "Tensor | None", bool], Tensor]


@dataclass(frozen=True)
class Gemm:
    """How a provider multiplies.

    contiguous: operands must lie with K innermost (Hopper's FP8 GEMM is TN only), so that backward writes transposed
    copies; else views do. multiple: the token count is padded to it.
    """

    function: GemmFunction
    contiguous: bool
    multiple: int = 1

    def __call__(
        self, a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None, fast: bool = False
    ) -> Tensor:
        if self.contiguous:
            a, b = a.contiguous(), b.contiguous()
        return self.function(a, b, a_inv, b_inv, out_dtype, bias, fast)


@dataclass(frozen=True)
class Layout:
    """Which linears are one GEMM, and in which order its rows stand (see `te_dynamo.ops.linears`)."""

    sizes: tuple[int, ...]
    merged: bool
    interleave: int

    def blocks(self) -> list[tuple[int, ...]]:
        """The linears of each GEMM, by index."""
        everyone = tuple(range(len(self.sizes)))
        return [everyone] if self.merged else [(i,) for i in everyone]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """[N_i, ...] of the members of a block -> [sum N_i, ...] in the order of the GEMM's rows."""
        if len(parts) == 1:
            return parts[0]
        if self.interleave:
            heads = torch.stack([p.unflatten(0, (-1, self.interleave)) for p in parts], 1)
            return heads.flatten(0, 2)
        return torch.cat(list(parts))

    def rows(self, t: Tensor, member: int, count: int) -> Tensor:
        """The rows of one member of a block of `count`, out of [sum N_i, ...] in the GEMM's order."""
        if count == 1:
            return t
        if self.interleave:
            return t.unflatten(0, (-1, count, self.interleave))[:, member].flatten(0, 1)
        start = sum(self.sizes[:member])
        return t[start : start + self.sizes[member]]

    def split(self, y: Tensor) -> list[Tensor]:
        """The merged GEMM's output [..., sum N_i] -> one view for each linear; [..., heads, D] where interleaved."""
        if self.interleave:
            return list(y.unflatten(-1, (-1, len(self.sizes), self.interleave)).unbind(-2))
        return list(y.split(list(self.sizes), -1))


def pick(scale: Tensor | None, index: int, own_amax: Callable[[], Tensor], dtype: torch.dtype, first: bool) -> Tensor:
    """The scale of one tensor: the slot's, or the tensor's own where there is none."""
    if scale is None:
        return scale_of(own_amax(), dtype)
    slot = scale[index]
    return torch.where(slot > 0, slot, scale_of(own_amax(), dtype)) if first else slot


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """Zero rows at the end, up to a multiple (no guard on the number of rows)."""
    if multiple == 1:
        return x
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % multiple))


def forward(
    gemm: Gemm,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scale: Tensor | None,
    f: int,
    layout: Layout,
    out_dtype: torch.dtype,
    first: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """x [T, K] -> (outputs [T, N] of each GEMM, x8 [T padded, K], the scales used f32 [1 + GEMMs], amax f32 [2n])."""
    tokens = x.shape[0]
    x_amax = amax(x)
    x_scale = pick(scale, f, lambda: x_amax, E4M3, first)
    x8 = pad_rows(quantize(x, x_scale, E4M3), gemm.multiple)
    ys, used, amaxes = [], [x_scale], [x_amax] * (2 * len(weights))
    for block in layout.blocks():
        w = layout.join([weights[i] for i in block])
        w_amax = amax(w)
        w_scale = pick(scale, f + 2 * block[0] + 1, lambda w_amax=w_amax: w_amax, E4M3, first)  # type: ignore[misc]
        bias = join_biases([biases[i] for i in block], [layout.sizes[i] for i in block], layout, out_dtype, x.device)
        y = gemm(x8, quantize(w, w_scale, E4M3), x_scale.reciprocal(), w_scale.reciprocal(), out_dtype, bias, True)
        ys.append(y[:tokens] if gemm.multiple > 1 else y)
        used.append(w_scale)
        for i in block:
            amaxes[2 * i + 1] = w_amax
    return ys, x8, torch.stack(used), torch.stack(amaxes)


def join_biases(
    biases: Sequence[Tensor | None], sizes: Sequence[int], layout: Layout, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The bias of one GEMM, zero where a member has none; None where none has."""
    if all(b is None for b in biases):
        return None
    parts = [torch.zeros(n, dtype=dtype, device=device) if b is None else b.to(dtype) for b, n in zip(biases, sizes, strict=True)]
    return layout.join(parts)


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    x: bool
    weights: tuple[bool, ...]
    biases: tuple[bool, ...]


def backward(
    gemm: Gemm,
    grads: Sequence[Tensor],
    x8: Tensor | None,
    weights: Sequence[Tensor],
    used: Tensor,
    grad_scale: Tensor | None,
    g: int,
    layout: Layout,
    needs: Needs,
    x_dtype: torch.dtype,
    first: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor]:
    """grads [T, N] of each GEMM -> (dx [T, K] or None, each dw [N_i, K], each db [N_i] f32, amax f32 [n])."""
    inverse = used.reciprocal()
    dws: list[Tensor | None] = [None] * len(weights)
    dbs: list[Tensor | None] = [None] * len(weights)
    amaxes: list[Tensor] = [used[0]] * len(weights)
    blocks = layout.blocks()
    # With several GEMMs into one dx, the sum is kept in float32 until the end.
    sum_dtype = x_dtype if len(blocks) == 1 else torch.float32
    dx: Tensor | None = None
    for number, (block, grad) in enumerate(zip(blocks, grads, strict=True)):
        tokens = grad.shape[0]
        g_amax = amax(grad)
        g_scale = pick(grad_scale, g + block[0], lambda g_amax=g_amax: g_amax, E5M2, first)  # type: ignore[misc]
        g_inv = g_scale.reciprocal()
        g8 = pad_rows(quantize(grad, g_scale, E5M2), gemm.multiple)
        if needs.x:
            w8 = quantize(layout.join([weights[i] for i in block]), used[1 + number], E4M3)
            part = gemm(g8, w8.t(), g_inv, inverse[1 + number], sum_dtype)[:tokens]
            dx = part if dx is None else dx + part
        for member, i in enumerate(block):
            amaxes[i] = g_amax
            if needs.weights[i]:
                assert x8 is not None
                rows = layout.rows(g8.t(), member, len(block))
                dws[i] = gemm(rows, x8.t(), g_inv, inverse[0], weights[i].dtype)
            if needs.biases[i]:
                dbs[i] = layout.rows(grad.t(), member, len(block)).sum(-1, dtype=torch.float32)
    return (None if dx is None else dx.to(x_dtype)), dws, dbs, torch.stack(amaxes)


def inference(
    gemm: Gemm,
    x: Tensor,
    w8s: Sequence[Tensor],
    w_invs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scale: Tensor | None,
    f: int,
    layout: Layout,
    out_dtype: torch.dtype,
    first: bool,
) -> list[Tensor]:
    """x [T, K] and, for each GEMM, the FP8 weight [N, K] and its f32 scale_inv -> the output [T, N] of each GEMM."""
    tokens = x.shape[0]
    x_scale = pick(scale, f, lambda: amax(x), E4M3, first)
    x8 = pad_rows(quantize(x, x_scale, E4M3), gemm.multiple)
    ys = []
    for block, w8, w_inv in zip(layout.blocks(), w8s, w_invs, strict=True):
        bias = join_biases([biases[i] for i in block], [layout.sizes[i] for i in block], layout, out_dtype, x.device)
        ys.append(gemm(x8, w8, x_scale.reciprocal(), w_inv, out_dtype, bias, True)[:tokens])
    return ys


def quantize_weights(weights: Sequence[Tensor], layout: Layout) -> list[tuple[Tensor, Tensor]]:
    """(FP8 weight [N, K], f32 scale_inv) of each GEMM, each weight scaled by its own amax."""
    result = []
    for block in layout.blocks():
        w = layout.join([weights[i].detach() for i in block])
        scale = scale_of(amax(w), E4M3)
        result.append((quantize(w, scale, E4M3), scale.reciprocal()))
    return result


def scaled_mm(
    a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, out_dtype: torch.dtype, bias: Tensor | None, fast: bool
) -> Tensor:
    """torch's FP8 GEMM. A bias goes into its epilogue where the hardware has that (16-bit outputs)."""
    in_epilogue = bias is not None and out_dtype != torch.float32
    y = torch._scaled_mm(
        a, b.t(), a_inv, b_inv, bias=bias if in_epilogue else None, out_dtype=out_dtype, use_fast_accum=fast and a.device.type == "cuda"
    )
    return y if bias is None or in_epilogue else y + bias


def defined_mm(
    a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, out_dtype: torch.dtype, bias: Tensor | None, fast: bool
) -> Tensor:
    """The definition: dequantise, multiply in float32, add the bias, round once."""
    y = dequantize(a, a_inv) @ dequantize(b, b_inv).t()
    return (y if bias is None else y + bias.float()).to(out_dtype)


NATIVE_CPU = Gemm(scaled_mm, contiguous=False)
NATIVE_CUDA = Gemm(scaled_mm, contiguous=True, multiple=16)
REFERENCE = Gemm(defined_mm, contiguous=False)
