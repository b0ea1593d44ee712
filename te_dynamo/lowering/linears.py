"""FP8 linears of one input: forward, dgrad and wgrad, over plain tensors, for any GEMM that multiplies FP8.

What a provider brings is a `Gemm`; the order of quantization, what is saved for backward and where amaxes go are the
same for all. Saved for backward: the input in FP8, once for all linears that share it. The weights' FP8 copies are made
again in backward from the weights themselves, with the scales of the forward.

`scales` are those of one site: linear i of a group has its input's at `2 * i` and its weight's at `2 * i + 1`, its
gradient's at `i` of the gradients' scales. With `first`, one that is 0 is unset: that tensor takes its scale from its own
amax. Without `scales` all do: current scaling. Amaxes are returned a row at a time, [rows] for each tensor, the last step
being the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import te_dynamo.lowering.kernels.cast_transpose
import te_dynamo.lowering.kernels.transpose  # noqa: F401  (registers its operator)
from te_dynamo.lowering.first_use import agreed
from te_dynamo.lowering.fp8 import Casting, amax, dequantize, quantize, row_amax
from te_dynamo.lowering.partition import cast_of_input, input_in_fp8, made_again_in_backward


class Scale(NamedTuple):
    """What a tensor is multiplied by before its cast, and one over it; 0-d float32."""

    value: Tensor
    inverse: Tensor


# gemm(a, b, a_scale_inv, b_scale_inv, out_dtype, bias, fast): a [M, K], b [N, K], both FP8 -> a @ b.T + bias [M, N] in
# out_dtype; fast: the hardware may accumulate with fewer bits (as TE does in forward, and not in backward).
GemmFunction = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype, "Tensor | None", bool], Tensor]


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


def pick(scales: Sequence[Scale] | None, index: int, rows: Tensor, dtype: torch.dtype, casting: Casting, first: bool) -> Scale:
    """The scale of one tensor: the slot's, or the tensor's own where there is none. rows: the tensor's amaxes by row."""
    if scales is not None and not first:
        return scales[index]
    largest = rows.amax() if rows.numel() else rows.sum()
    if scales is None:
        own = casting.scale_of(largest, dtype)
    else:
        slot = scales[index].value
        own = torch.where(slot > 0, slot, casting.scale_of(agreed(largest, slot, casting.peers), dtype))
    return Scale(own, own.reciprocal())


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """Zero rows at the end, up to a multiple.

    Where the number of rows is symbolic, nothing is ever given the number of missing rows as a size: that it is 0, or
    is not, would be a guard.
    """
    rows = x.shape[0]
    padded = (rows + multiple - 1) // multiple * multiple
    if isinstance(rows, int) and rows == padded:
        return x
    return torch.cat([x, x.new_zeros(multiple - 1, x.shape[1])])[:padded]


class Quantized(NamedTuple):
    """A matrix in FP8: as it is, transposed (either may be missing), its scale, and amaxes of which the largest is its own."""

    data: Tensor | None
    transposed: Tensor | None
    scale: Scale
    amax: Tensor


@dataclass(frozen=True)
class Slots:
    """Where one tensor's scale is found: `scales[index]`, or in itself where `scales` is None or, with `first`, unset."""

    scales: Sequence[Scale] | None
    index: int
    casting: Casting
    first: bool

    @property
    def known(self) -> Scale | None:
        """The scale, where the tensor itself need not be measured for it."""
        return self.scales[self.index] if self.scales is not None and not self.first else None

    def pick(self, amax: Tensor, dtype: torch.dtype) -> Scale:
        """The scale of a tensor with these amaxes."""
        return self.known or pick(self.scales, self.index, amax, dtype, self.casting, self.first)


@dataclass(frozen=True)
class Gemm:
    """How a provider multiplies and quantizes.

    contiguous: operands must lie with K innermost (Hopper's FP8 GEMM is TN only), so that backward writes transposed
    copies; else views do. multiple: the token count is padded to it.
    """

    function: GemmFunction
    contiguous: bool
    multiple: int = 1

    def __call__(
        self, a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None, fast: bool = False
    ) -> Tensor:
        return self.function(a, b, a_inv, b_inv, out_dtype, bias, fast)

    def operand(self, t: Tensor) -> Tensor:
        """`t`, which more than one kernel reads, as something that lies in memory, row by row: Inductor would else store it for
        each, and keep the order that its source happens to have."""
        if not self.contiguous:
            return t
        t = t.contiguous()
        return t.as_strided(t.shape, t.stride())

    def transposed(self, t: Tensor) -> Tensor:
        """`t.t()` as an operand, of a `t` that lies in memory."""
        return torch.ops.te_dynamo.transpose(t) if self.contiguous else t.t()

    def activation(self, x: Tensor, slots: Slots) -> Quantized:
        """x [T, K], padded: left to Inductor, which fuses it with what makes x. It is what backward keeps of x."""
        amax, dtype = row_amax(x), slots.casting.forward
        scale = slots.pick(amax, dtype)
        with cast_of_input():
            scaled = pad_rows(slots.casting.saturated(x, scale.value, dtype), self.multiple)
        with input_in_fp8():
            data = self.operand(scaled.to(dtype))
        return Quantized(data, None, scale, amax)

    def weight(self, parts: Sequence[Tensor], layout: Layout, slots: Slots) -> Quantized:
        """The weights [N_i, K] of one GEMM, joined [N, K]. Backward makes it again."""
        with made_again_in_backward():
            w = layout.join(parts)
        amax, dtype = row_amax(w), slots.casting.forward
        scale = slots.pick(amax, dtype)
        with made_again_in_backward():
            return Quantized(quantize(w, scale.value, dtype), None, scale, amax)

    def weight_transposed(self, parts: Sequence[Tensor], layout: Layout, scale: Scale, dtype: torch.dtype) -> Tensor:
        """[K, N] for dgrad, where forward made none."""
        with made_again_in_backward():
            t = quantize(layout.join(parts), scale.value, dtype).t()
            return self.operand(t.contiguous()) if self.contiguous else t

    def gradient(self, grad: Tensor, slots: Slots, data: bool, transposed: bool, bias: bool) -> tuple[Quantized, Tensor | None]:
        """grad [T, N], padded: as dgrad reads it, and as wgrad does, if they are wanted; and its sum over the tokens [N], float32."""
        amax, dtype = row_amax(grad), slots.casting.gradient
        scale = slots.pick(amax, dtype)
        g8 = self.operand(pad_rows(slots.casting.saturated(grad, scale.value, dtype), self.multiple).to(dtype))
        db = grad.sum(0, dtype=torch.float32) if bias else None
        return Quantized(g8, self.transposed(g8) if transposed else None, scale, amax), db


# cast(parts [N_i, C], scale, dtype, interleave, data, transposed) -> (FP8 [N, C], FP8 [C, N], amaxes)
Cast = Callable[[list[Tensor], Tensor, torch.dtype, int, bool, bool], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class OnePassGemm(Gemm):
    """One kernel reads a weight and writes it, its transposed copy and its amax. The transposed copy is kept for backward, which
    does not read the weight again.

    Activations and gradients are left to Inductor: it writes them from within the kernel that makes them, which saves more
    than one reading does.
    """

    cast: Cast = field(kw_only=True)

    def weight(self, parts: Sequence[Tensor], layout: Layout, slots: Slots) -> Quantized:
        dtype = slots.casting.forward
        scale = slots.known or slots.pick(torch.cat([row_amax(p) for p in parts]), dtype)
        interleave = layout.interleave if len(parts) > 1 else 0
        data, transposed, amax = self.cast(list(parts), scale.value, dtype, interleave, True, True)
        return Quantized(data, transposed, scale, amax)


def forward(
    gemm: Gemm,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[Scale] | None,
    layout: Layout,
    out_dtype: torch.dtype,
    casting: Casting,
    first: bool,
    ready: Sequence[Quantized] = (),
) -> tuple[list[Tensor], Tensor | None, list[Scale], list[Tensor], list[Tensor]]:
    """x [T, K] -> (outputs [T, N] of each GEMM, x8 [T padded, K], the scales of x and of each GEMM's weight, 2n amaxes, the
    transposed FP8 weights [K, N] of the GEMMs for backward, none where it makes them itself).

    ready: the weight of each GEMM as `prepare_weights` gave it, where they are not to be quantized here.
    """
    x8 = gemm.activation(x, Slots(scales, 0, casting, first))
    ys, used, amaxes, kept = multiply(gemm, x8, x.shape[0], weights, biases, scales, layout, out_dtype, casting, first, ready)
    return ys, x8.data, used, amaxes, kept


def multiply(
    gemm: Gemm,
    x8: Quantized,
    tokens: int,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[Scale] | None,
    layout: Layout,
    out_dtype: torch.dtype,
    casting: Casting,
    first: bool,
    ready: Sequence[Quantized] = (),
) -> tuple[list[Tensor], list[Scale], list[Tensor], list[Tensor]]:
    """`forward` of an input [T padded, K] that is quantized already, of which the first `tokens` rows count."""
    ys, used, amaxes, kept = [], [x8.scale], [x8.amax] * (2 * len(weights)), []
    for number, block in enumerate(layout.blocks()):
        slots = Slots(scales, 2 * block[0] + 1, casting, first)
        w8 = ready[number] if ready else gemm.weight([weights[i] for i in block], layout, slots)
        bias = join_biases([biases[i] for i in block], [layout.sizes[i] for i in block], layout, out_dtype, x8.data.device)
        y = gemm(x8.data, w8.data, x8.scale.inverse, w8.scale.inverse, out_dtype, bias, True)
        ys.append(y[:tokens] if gemm.multiple > 1 else y)
        used.append(w8.scale)
        kept += [] if w8.transposed is None else [w8.transposed]
        for i in block:
            amaxes[2 * i + 1] = w8.amax
    return ys, used, amaxes, kept


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
    used: Sequence[Scale],
    kept: Sequence[Tensor],
    scales: Sequence[Scale] | None,
    layout: Layout,
    needs: Needs,
    x_dtype: torch.dtype,
    casting: Casting,
    first: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor]]:
    """grads [T, N] of each GEMM -> (dx [T, K] or None, each dw [N_i, K], each db [N_i] f32, n amaxes)."""
    x_scale, *w_scales = used
    with made_again_in_backward():
        x8t = None if x8 is None else gemm.transposed(x8)
    dws: list[Tensor | None] = [None] * len(weights)
    dbs: list[Tensor | None] = [None] * len(weights)
    amaxes: list[Tensor] = list(grads[:1]) * len(weights)
    dx: Tensor | None = None
    for number, (block, grad, w_scale) in enumerate(zip(layout.blocks(), grads, w_scales, strict=True)):
        tokens = grad.shape[0]
        wanted = any(needs.weights[i] for i in block)
        summed = any(needs.biases[i] for i in block)
        g8, db = gemm.gradient(grad, Slots(scales, block[0], casting, first), data=needs.x, transposed=wanted, bias=summed)
        if needs.x:
            parts = [weights[i] for i in block]
            w8t = kept[number] if kept else gemm.weight_transposed(parts, layout, w_scale, casting.forward)
            part = gemm(g8.data, w8t, g8.scale.inverse, w_scale.inverse, x_dtype)[:tokens]
            dx = part if dx is None else dx.float() + part.float()
        if wanted:
            assert x8t is not None
            _wgrads(gemm, layout, block, needs, g8.transposed, x8t, (g8.scale.inverse, x_scale.inverse), weights, into=dws)
        for member, i in enumerate(block):
            amaxes[i] = g8.amax
            if needs.biases[i]:
                assert db is not None
                dbs[i] = layout.rows(db, member, len(block)).clone() if len(block) > 1 else db  # an operator's outputs overlap nowhere
    return (None if dx is None else dx.to(x_dtype)), dws, dbs, amaxes


def _wgrads(
    gemm: Gemm,
    layout: Layout,
    block: Sequence[int],
    needs: Needs,
    g8t: Tensor,
    x8t: Tensor,
    inverses: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    into: list[Tensor | None],
) -> None:
    """The weight gradients of one GEMM's linears: one GEMM where their rows stand together, else one for each."""
    wanted = [i for i in block if needs.weights[i]]
    dtypes = {weights[i].dtype for i in block}
    if gemm.contiguous and not layout.interleave and len(wanted) == len(block) and len(dtypes) == 1:
        whole = gemm(g8t, x8t, *inverses, dtypes.pop())
        for member, i in enumerate(block):
            into[i] = layout.rows(whole, member, len(block))
        return
    for i in wanted:
        rows = layout.rows(g8t, block.index(i), len(block))
        into[i] = gemm(rows, x8t, *inverses, weights[i].dtype)


def inference(
    gemm: Gemm,
    x: Tensor,
    w8s: Sequence[Tensor],
    w_invs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[Scale] | None,
    layout: Layout,
    out_dtype: torch.dtype,
    casting: Casting,
    first: bool,
) -> list[Tensor]:
    """x [T, K] and, for each GEMM, the FP8 weight [N, K] and its f32 scale_inv -> the output [T, N] of each GEMM."""
    tokens = x.shape[0]
    x_scale = Slots(scales, 0, casting, first).pick(row_amax(x), casting.forward)
    x8 = gemm.operand(pad_rows(casting.saturated(x, x_scale.value, casting.forward), gemm.multiple).to(casting.forward))
    ys = []
    for block, w8, w_inv in zip(layout.blocks(), w8s, w_invs, strict=True):
        bias = join_biases([biases[i] for i in block], [layout.sizes[i] for i in block], layout, out_dtype, x.device)
        ys.append(gemm(x8, w8, x_scale.inverse, w_inv, out_dtype, bias, True)[:tokens])
    return ys


def quantize_weights(weights: Sequence[Tensor], layout: Layout, casting: Casting) -> list[tuple[Tensor, Tensor]]:
    """(FP8 weight [N, K], f32 scale_inv) of each GEMM, each weight scaled by its own amax."""
    result = []
    for block in layout.blocks():
        w = layout.join([weights[i].detach() for i in block])
        scale = casting.scale_of(amax(w), casting.forward)
        result.append((quantize(w, scale, casting.forward), scale.reciprocal()))
    return result


def prepare_weights(gemm: Gemm, weights: Sequence[Tensor], layout: Layout, casting: Casting) -> list[Quantized]:
    """The weight of each GEMM for both directions of training: with its transposed copy, and its amax as one number.

    Each is scaled by its own amax, which costs one more reading: it is kept, and a scale that it has outgrown would be too.
    """
    result = []
    for block in layout.blocks():
        w8 = gemm.weight([weights[i].detach() for i in block], layout, Slots(None, 0, casting, first=False))
        assert w8.data is not None
        across = w8.data.t().contiguous() if w8.transposed is None else w8.transposed
        result.append(Quantized(w8.data, across, w8.scale, w8.amax.amax()))
    return result


def scaled_mm(a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, out_dtype: torch.dtype, bias: Tensor | None, fast: bool) -> Tensor:
    """torch's FP8 GEMM. A bias goes into its epilogue where the hardware has that (16-bit outputs)."""
    in_epilogue = bias is not None and out_dtype != torch.float32
    y = torch._scaled_mm(
        a, b.t(), a_inv, b_inv, bias=bias if in_epilogue else None, out_dtype=out_dtype, use_fast_accum=fast and a.device.type == "cuda"
    )
    return y if bias is None or in_epilogue else y + bias


def defined_mm(a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, out_dtype: torch.dtype, bias: Tensor | None, fast: bool) -> Tensor:
    """The definition: dequantize, multiply in float32, add the bias, round once."""
    y = dequantize(a, a_inv) @ dequantize(b, b_inv).t()
    return (y if bias is None else y + bias.float()).to(out_dtype)


NATIVE_CPU = Gemm(scaled_mm, contiguous=False)
NATIVE_CUDA = OnePassGemm(scaled_mm, contiguous=True, multiple=16, cast=torch.ops.te_dynamo.cast_transpose)
REFERENCE = Gemm(defined_mm, contiguous=False)
