"""Linears of one input with one scale per tensor: forward, dgrad and wgrad, for any FP8 GEMM.

A provider supplies `Kernels`; the order of quantization, what is saved for backward and where amaxes go are the same for all. Saved: the
input in FP8, once for all linears that share it, and the weights' scales. The weights' FP8 copies are remade in backward from the
weights, with forward's scales, or kept where a kernel wrote them (see `Call.remakes`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import te_dynamo.lowering.kernels.cast_both
import te_dynamo.lowering.kernels.cast_transpose
import te_dynamo.lowering.kernels.transpose  # noqa: F401  (registers its operator)
from te_dynamo.ir.linear import GemmRows
from te_dynamo.ir.sizes import product
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.compute import scales_of
from te_dynamo.lowering.fp8 import E4M3, FP8_MAX, casting_of, dequantize, quantize, row_amax
from te_dynamo.lowering.limits import unaligned, unsupported_dtype
from te_dynamo.lowering.partition import kept_for_backward, recomputed_in_backward
from te_dynamo.lowering.quantized import Kept, MadeGradient, MadeOperand, Quantized, Scale, ScaleOf, Scales
from te_dynamo.lowering.registry import Backward, Case, Forward, Implementation, Needs
from te_dynamo.recipe import margin_of

# gemm(a, b, a_scale_inv, b_scale_inv, out_dtype, bias, fast): a [M, K], b [N, K], both FP8 -> a @ b.T + bias [M, N] in
# out_dtype; fast: the hardware may accumulate with fewer bits (as TE does in forward, and not in backward).
GemmFunction = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype, "Tensor | None", bool], Tensor]


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """Zero rows at the end, up to a multiple.

    If the number of rows is symbolic, the number of missing rows is never used as a size: whether it is 0 would become a guard.
    """
    rows = x.shape[0]
    padded = (rows + multiple - 1) // multiple * multiple
    if isinstance(rows, int) and rows == padded:
        return x
    return torch.cat([x, x.new_zeros(multiple - 1, x.shape[1])])[:padded]


def stored(t: Tensor) -> Tensor:
    """`t`, which several kernels read, stored in memory row by row. Otherwise Inductor would store it once for each reader, in the order
    that its source happens to have."""
    t = t.contiguous()
    return t.as_strided(t.shape, t.stride())


@dataclass(frozen=True)
class Kernels:
    """How a provider multiplies and quantizes.

    contiguous: operands must have K innermost (Hopper's FP8 GEMM is TN only), so backward writes transposed copies; otherwise views do.
    multiple: what the token count is padded to.
    """

    gemm: GemmFunction
    contiguous: bool = False
    multiple: int = 1

    def multiply(
        self, a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, dtype: torch.dtype, bias: Tensor | None = None, fast: bool = False
    ) -> Tensor:
        return self.gemm(a, b, a_inv, b_inv, dtype, bias, fast)

    def stored(self, t: Tensor) -> Tensor:
        return stored(t) if self.contiguous else t

    def transposed(self, t: Tensor) -> Tensor:
        """`t.t()` as an operand, for a `t` that is in memory."""
        return torch.ops.te_dynamo.transpose(t) if self.contiguous else t.t()

    def activation(self, x: Tensor, scale_of: ScaleOf, *, remade: bool) -> Quantized:
        """x [T, K], padded and quantized by plain torch, which Inductor fuses with what computes x. Backward keeps the result, not x,
        unless `remade`."""
        amax = row_amax(x)
        scale = scale_of.of(amax)
        with recomputed_in_backward() if remade else nullcontext():
            scaled = pad_rows(scale_of.casting.saturated(x, scale.value, scale_of.dtype), self.multiple)
        with recomputed_in_backward() if remade else kept_for_backward():
            data = self.stored(scaled.to(scale_of.dtype))
        return Quantized(data, scale.inverse, scale=scale.value, amax=amax)

    def weight(self, parts: Sequence[Tensor], rows: GemmRows, scale_of: ScaleOf, *, across: bool) -> Quantized:
        """The weights [N_i, K] of one GEMM, joined to [N, K]; across: with the transposed copy, if the kernels have one. Without it,
        backward quantizes them again."""
        with recomputed_in_backward():
            w = rows.join(parts)
        amax = row_amax(w)
        scale = scale_of.of(amax)
        with recomputed_in_backward():
            return Quantized(quantize(w, scale.value, scale_of.dtype), scale.inverse, scale=scale.value, amax=amax)

    def weight_transposed(self, parts: Sequence[Tensor], rows: GemmRows, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """[K, N] for dgrad, if forward made no transposed copy."""
        with recomputed_in_backward():
            t = quantize(rows.join(parts), scale, dtype).t()
            return self.stored(t.contiguous()) if self.contiguous else t

    def activation_in_memory(self, x: Tensor, scale_of: ScaleOf) -> Quantized:
        """Like `activation`, for an x that no kernel computes, so that its cast cannot be fused, and whose transposed copy backward
        reads."""
        return self.activation(x, scale_of, remade=False)

    def gradient_in_memory(self, grad: Tensor, scale_of: ScaleOf, data: bool, bias: bool) -> tuple[Quantized, Tensor | None]:
        """Like `gradient`, for a gradient that no kernel computes, with the transposed copy."""
        return self.gradient(grad, scale_of, data, True, bias)

    def gradient(self, grad: Tensor, scale_of: ScaleOf, data: bool, transposed: bool, bias: bool) -> tuple[Quantized, Tensor | None]:
        """grad [T, N], padded and quantized: for dgrad (without `data` it may be omitted), for wgrad if `transposed`, and its sum over the
        tokens [N], float32, if `bias`."""
        amax = row_amax(grad)
        scale = scale_of.of(amax)
        g8 = self.stored(pad_rows(scale_of.casting.saturated(grad, scale.value, scale_of.dtype), self.multiple).to(scale_of.dtype))
        db = grad.sum(0, dtype=torch.float32) if bias else None
        return Quantized(g8, scale.inverse, self.transposed(g8) if transposed else None, scale=scale.value, amax=amax), db


# cast(parts [N_i, C], scale, dtype, interleave, data, transposed) -> (FP8 [N, C], FP8 [C, N], amaxes)
Cast = Callable[[list[Tensor], Tensor, torch.dtype, int, bool, bool], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class OnePassKernels(Kernels):
    """One kernel reads a weight and writes its FP8 copy, the transposed copy and the amax. If the transposed copy is kept, backward does
    not read the weight again; otherwise the kernel writes the copy there.

    Activations and gradients are left to Inductor, which writes them from the kernel that computes them: that saves more than one read
    would. If no kernel computes them and the scale is known, one kernel writes both copies.
    """

    cast: Cast = field(kw_only=True)

    def weight(self, parts: Sequence[Tensor], rows: GemmRows, scale_of: ScaleOf, *, across: bool) -> Quantized:
        scale = scale_of.known or scale_of.of(torch.cat([row_amax(p) for p in parts]))
        data, transposed, amax = self.cast(list(parts), scale.value, scale_of.dtype, _interleave(parts, rows), True, across)
        return Quantized(data, scale.inverse, transposed if across else None, scale=scale.value, amax=amax)

    def weight_transposed(self, parts: Sequence[Tensor], rows: GemmRows, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return self.cast(list(parts), scale, dtype, _interleave(parts, rows), False, True)[1]

    def activation_in_memory(self, x: Tensor, scale_of: ScaleOf) -> Quantized:
        scale = scale_of.known
        return super().activation_in_memory(x, scale_of) if scale is None else self._both(x, scale_of, scale, data=True, sums=False)[0]

    def gradient_in_memory(self, grad: Tensor, scale_of: ScaleOf, data: bool, bias: bool) -> tuple[Quantized, Tensor | None]:
        scale = scale_of.known
        if scale is None:
            return super().gradient_in_memory(grad, scale_of, data, bias)
        made, sums = self._both(grad, scale_of, scale, data, bias)
        return made, sums.sum(0) if bias else None

    def _both(self, t: Tensor, scale_of: ScaleOf, scale: Scale, data: bool, sums: bool) -> tuple[Quantized, Tensor]:
        kinds = (scale_of.dtype, scale_of.casting.saturates_infinite, self.multiple, data, sums)
        plain, across, amaxes, summed = torch.ops.te_dynamo.cast_both(t, scale.value, *kinds)
        return Quantized(plain, scale.inverse, across, scale=scale.value, amax=amaxes), summed


def _interleave(parts: Sequence[Tensor], rows: GemmRows) -> int:
    return rows.interleave if len(parts) > 1 else 0


class PerTensorLinears(Implementation):
    """`linears` with one scale for each tensor."""

    cached = frozenset({"training", "inference"})
    takes_producer = True

    def __init__(self, kernels: Kernels, opaque: bool = False) -> None:
        self.kernels, self.opaque = kernels, opaque
        self.takes_gradient = kernels.contiguous and not opaque
        if opaque:
            self.cached = frozenset({"inference"})

    def backward_reads(self, call: Call, needs: Needs) -> tuple[str, ...]:
        return ("weights",)

    def unsupported(self, case: Case) -> str | None:
        return (unaligned(case) if self.kernels.contiguous else None) or unsupported_dtype(case.attributes["out_dtype"])

    def quantize_operand(self, call: Call, x: Tensor, scale: ScaleOf) -> Quantized:
        return self.kernels.activation(x, scale, remade="input" in call.remakes)

    def quantize_weights(self, call: Call, weights: Sequence[Tensor]) -> list[Quantized]:
        """For training, each has its transposed copy, and one number for its amax. Scaling each by its own amax costs one more read, but a
        kept weight could outgrow the scale of its slot."""
        rows, own = GemmRows.of(call.attributes), scales_of(call, None)
        made = []
        for gemm in rows.gemms():
            w8 = self.kernels.weight([weights[i].detach() for i in gemm], rows, own.at("weight", gemm[0]), across=call.cached == "training")
            assert w8.data is not None and w8.amax is not None
            if call.cached == "inference":
                made.append(w8.for_backward("data", "scale_inv"))
            else:
                across = w8.data.t().contiguous() if w8.transposed is None else w8.transposed
                made.append(w8._replace(transposed=across, amax=w8.amax.amax()))
        return made

    def kept_as(self, call: Call) -> Kept | None:
        rows = GemmRows.of(call.attributes)
        return kept_by_one_scale(call, tuple(rows.gemms()), rows.interleave)

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        kernels, rows, dtype = self.kernels, GemmRows.of(call.attributes), call["out_dtype"]
        x, weights, biases, *kept = inputs
        x8, lead = x if isinstance(x, MadeOperand) else (self._operand(call, matrix(x), scales.at("input"), needs), x.shape[:-1])
        assert x8.data is not None and x8.scale_inv is not None and x8.amax is not None
        outputs, saved, amaxes = [], [], [x8.amax] * (2 * len(rows.sizes))
        for number, gemm in enumerate(rows.gemms()):
            if call.cached:
                w8 = (kept[0] if kept else weights)[number]
            else:
                w8 = kernels.weight([weights[i] for i in gemm], rows, scales.at("weight", gemm[0]), across="weights" not in call.remakes)
            bias = rows.join_biases(biases, gemm, dtype, x8.data)
            y = kernels.multiply(x8.data, w8.data, x8.scale_inv, w8.scale_inv, dtype, bias, True)
            y = y[: tokens_of(lead)] if kernels.multiple > 1 else y
            outputs.append(y.reshape(*lead, y.shape[-1]))
            saved.append(w8.for_backward("transposed", "scale", "scale_inv"))
            if w8.amax is not None:
                for i in gemm:
                    amaxes[scales.roles.place("weight", i)] = w8.amax
        _, wanted, _ = needs
        again = isinstance(x, MadeOperand) and "input" in call.remakes  # by the producer
        read = "scale" if again else "data" if x8.transposed is None else "transposed"
        kept_of_x = x8.for_backward(read, "scale_inv") if any(wanted) else Quantized()
        return Forward(outputs, [kept_of_x, *saved], amaxes)

    def backward(
        self,
        call: Call,
        inputs: Sequence[Any],
        saved: Sequence[Quantized],
        grads: Sequence[Any],
        scales: Scales,
        needs: Needs,
    ) -> Backward:
        kernels, rows = self.kernels, GemmRows.of(call.attributes)
        (x8, *w8s), weights, (needs_x, needs_w, needs_b) = saved, inputs[1], needs
        x_dtype, weight_dtype = call.inputs[0], scales.casting.forward
        with recomputed_in_backward():
            x8t = kernels.transposed(x8.data) if x8.data is not None and any(needs_w) else x8.transposed
        dws: list[Tensor | None] = [None] * len(rows.sizes)
        dbs: list[Tensor | None] = [None] * len(rows.sizes)
        amaxes: list[Any] = [None] * len(rows.sizes)
        dx: Tensor | None = None
        lead = grads[0].lead if isinstance(grads[0], MadeGradient) else grads[0].shape[:-1]
        for gemm, grad, w8 in zip(rows.gemms(), grads, w8s, strict=True):
            wanted, summed = (any(n[i] for i in gemm) for n in (needs_w, needs_b))
            scale_of = scales.at("grad_output", gemm[0])
            if isinstance(grad, MadeGradient):
                g8, db = made_gradient(grad, scale_of)
            elif "grad_output" in call.in_memory and wanted:
                g8, db = kernels.gradient_in_memory(matrix(grad), scale_of, data=needs_x, bias=summed)
            else:
                g8, db = kernels.gradient(matrix(grad), scale_of, data=needs_x, transposed=wanted, bias=summed)
            peak = g8.amax
            assert peak is not None
            if needs_x:
                w8t = w8.transposed
                if w8t is None:
                    w8t = kernels.weight_transposed([weights[i] for i in gemm], rows, w8.scale, weight_dtype)
                part = kernels.multiply(g8.data, w8t, g8.scale_inv, w8.scale_inv, x_dtype)[: tokens_of(lead)]
                dx = part if dx is None else dx.float() + part.float()
            if wanted:
                self._wgrads(call, rows, gemm, needs_w, g8, x8t, x8.scale_inv, into=dws)
            for member, i in enumerate(gemm):
                amaxes[i] = peak
                if needs_b[i]:
                    dbs[i] = rows.rows(db, member, len(gemm)).to(call.inputs[2][i])
        if dx is not None:
            dx = dx.to(x_dtype).reshape(*lead, dx.shape[-1])
        return Backward([dx, dws, dbs], amaxes)

    def _operand(self, call: Call, x: Tensor, scale_of: ScaleOf, needs: Needs) -> Quantized:
        """x [T, K], which no producer makes, quantized."""
        alone = "input" in call.in_memory and "input" not in call.remakes and any(needs[1])
        return self.kernels.activation_in_memory(x, scale_of) if alone else self.quantize_operand(call, x, scale_of)

    def _wgrads(
        self,
        call: Call,
        rows: GemmRows,
        gemm: Sequence[int],
        needs: Sequence[bool],
        g8: Quantized,
        x8t: Tensor | None,
        x_inv: Tensor | None,
        into: list[Tensor | None],
    ) -> None:
        """The weight gradients of one GEMM's linears: one GEMM if their rows are adjacent, else one for each."""
        assert g8.transposed is not None and x8t is not None and g8.scale_inv is not None and x_inv is not None
        wanted, dtypes = [i for i in gemm if needs[i]], {call.inputs[1][i] for i in gemm}
        if self.kernels.contiguous and not rows.interleave and len(wanted) == len(gemm) and len(dtypes) == 1:
            whole = self.kernels.multiply(g8.transposed, x8t, g8.scale_inv, x_inv, dtypes.pop())
            for member, i in enumerate(gemm):
                into[i] = rows.rows(whole, member, len(gemm))
            return
        for i in wanted:
            part = rows.rows(g8.transposed, gemm.index(i), len(gemm))
            into[i] = self.kernels.multiply(part, x8t, g8.scale_inv, x_inv, call.inputs[1][i])

    def flops(self, call: Call, inputs: Sequence[Any]) -> int:
        return forward_flops(call, inputs)

    def backward_flops(self, call: Call, inputs: Sequence[Any], saved: Sequence[Any], grads: Sequence[Any], needs: Needs) -> int:
        return backward_flops(inputs, grads, needs)


def made_gradient(grad: MadeGradient, scale_of: ScaleOf) -> tuple[Quantized, Tensor | None]:
    """Like `Kernels.gradient`, for a gradient that was handed over."""
    scale = scale_of.known
    assert scale is not None, "a gradient is handed over only where its scale is known"
    return Quantized(grad.data, scale.inverse, grad.transposed, scale=scale.value, amax=grad.amaxes), grad.sums.sum(0)


def forward_flops(call: Call, inputs: Sequence[Any]) -> int:
    """FLOPs of linears, from the shapes of their inputs."""
    return 2 * product(inputs[0]) * sum(call["sizes"])


def backward_flops(inputs: Sequence[Any], grads: Sequence[Any], needs: Needs) -> int:
    """FLOPs of linears: one GEMM for each weight gradient, and one for each weight that the input's gradient goes through."""
    needs_x, needs_w, _ = needs
    return sum(2 * product(grads[0][:-1]) * product(w) * (needs_x + needed) for w, needed in zip(inputs[1], needs_w, strict=True))


def matrix(t: Tensor) -> Tensor:
    """[..., N] -> [tokens, N]"""
    return t.reshape(-1, t.shape[-1])


def tokens_of(lead: Sequence[Any]) -> Any:
    """The product of leading sizes, symbolic where they are."""
    total: Any = 1
    for size in lead:
        total = total * size
    return total


def kept_by_one_scale(call: Call, gemms: tuple[tuple[int, ...], ...], interleave: int = 0) -> Kept | None:
    """How kept weights are computed from the weights, with one scale for each GEMM."""
    casting = casting_of(call.recipe)
    if casting.forward != E4M3:
        return None
    top = FP8_MAX[E4M3] * 2.0 ** -margin_of(casting.margin, "weight", gradient=False)
    return Kept(gemms, interleave, top, casting.amax_epsilon, casting.power_2_scale)


def scaled_mm(a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, out_dtype: torch.dtype, bias: Tensor | None, fast: bool) -> Tensor:
    """torch's FP8 GEMM. Both scale_inv are 0-d, or they are [M, 1] and [1, N]. A bias is added in the epilogue where the hardware can
    (16-bit outputs).

    On a CPU the values, which are exact in float32, are multiplied in float32: torch's kernel takes a thousand times as long for two
    E4M3 operands on processors with AMX (33 s for 512 x 576 x 1536, torch 2.13).
    """
    if a.device.type == "cpu":
        y = a.float() @ b.float().t() * a_inv * b_inv
        return (y if bias is None else y + bias.float()).to(out_dtype)
    in_epilogue = bias is not None and out_dtype != torch.float32
    y = torch._scaled_mm(a, b.t(), a_inv, b_inv, bias=bias if in_epilogue else None, out_dtype=out_dtype, use_fast_accum=fast)
    return y if bias is None or in_epilogue else y + bias


def defined_mm(a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, out_dtype: torch.dtype, bias: Tensor | None, fast: bool) -> Tensor:
    """The definition: dequantize, multiply in float32, add the bias, round once."""
    y = dequantize(a, a_inv) @ dequantize(b, b_inv).t()
    return (y if bias is None else y + bias.float()).to(out_dtype)
