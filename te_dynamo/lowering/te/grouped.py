"""Experts on a Blackwell by Transformer Engine's grouped GEMM, for all three GEMMs of a training step; the host reads no offsets.

A Blackwell multiplies FP8 matrices of any layout, so forward, dgrad and wgrad read the same two copies, and nothing is transposed. Each
tensor has one scale, as for any linear. On a Hopper cuBLAS has this GEMM from 13.5 on, for transposed copies; torch's is used there
(`native.grouped`). Groups begin at multiples of 16 rows, as with TE's own padding: the cast writes them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import register_flop_formula

import te_dynamo.lowering.kernels.cast_matrices  # noqa: F401  (registers its operator)
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.compute import scales_of
from te_dynamo.lowering.devices import BLACKWELL, BLACKWELL_RTX, HOPPER, Capability, dotted
from te_dynamo.lowering.fp8 import row_amax
from te_dynamo.lowering.group_rows import Groups
from te_dynamo.lowering.limits import unaligned, unsupported_dtype
from te_dynamo.lowering.partition import kept_or_remade, recomputed_in_backward
from te_dynamo.lowering.per_tensor import kept_by_one_scale, stored
from te_dynamo.lowering.quantized import Kept, Quantized, ScaleOf, Scales
from te_dynamo.lowering.registry import PER_TENSOR, Backward, Case, Forward, Implementation, Needs, implements
from te_dynamo.lowering.te.library import api, capability, first_line, running

OLDEST_CUBLAS = 130300  # common/gemm/cublaslt_grouped_gemm.cu:51
FORWARD, DGRAD, WGRAD = "TN", "NN", "NT"  # as TE names the layouts of A and B, which are `b` and `a` here


@torch.library.custom_op("te_dynamo::te_grouped_gemm", mutates_args=())
def te_grouped_gemm(
    a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, ends: Tensor, layout: str, out_dtype: torch.dtype, fast: bool
) -> Tensor:
    """cuBLAS's grouped FP8 GEMM, after a small kernel that computes the groups' pointers.

    a: rows [P, C], those of group e ending before ends[e] (int32 [E]); b: matrices [E, N, K], or rows [P, K] for the layout "NT". Both FP8,
    not both E5M2; scale_inv f32, 0-d. Returns, in out_dtype: "TN" the rows times b[e].T, [P, N]; "NN" the rows times b[e], [P, K]; "NT"
    a[rows].T @ b[rows] of each group, [E, C, K]. Rows after the last group are neither read nor written.
    """
    te = api()
    with running():
        rows = torch.diff(ends, prepend=ends.new_zeros(1)).long()

        def of_rows(t: Tensor, **given: Any) -> Any:
            starts = torch.cat([ends.new_zeros(1), ends]).long() * t.shape[1]
            return te.GroupedStorage(tuple(t.shape), out_dtype, num_tensors=len(ends), first_dims=rows, tensor_offsets=starts, **given)

        def of_matrices(t: Tensor, **given: Any) -> Any:
            return te.GroupedStorage((t.shape[0] * t.shape[1], t.shape[2]), out_dtype, num_tensors=len(ends), **given)

        def quantized(t: Tensor, inverse: Tensor, make: Any) -> Any:
            one = inverse.reshape(1)
            return make(
                t,
                data=t.contiguous().view(torch.uint8).flatten(),
                scale_inv=one.expand(len(ends)).contiguous(),
                quantizer=te.Float8Quantizer(one, one, te.dtype[t.dtype], rowwise=True, columnwise=False),
            )

        y = _empty(a, b, ends, layout, out_dtype)
        te.grouped_gemm(
            quantized(b, b_inv, of_rows if layout == WGRAD else of_matrices),
            quantized(a, a_inv, of_rows),
            (of_matrices if layout == WGRAD else of_rows)(y, data=y.flatten()),
            layout=layout,
            use_split_accumulator=not fast,
        )
    return y


@te_grouped_gemm.register_fake
def _(a, b, a_inv, b_inv, ends, layout, out_dtype, fast):
    return _empty(a, b, ends, layout, out_dtype)


def _empty(a: Tensor, b: Tensor, ends: Tensor, layout: str, out_dtype: torch.dtype) -> Tensor:
    shapes: dict[str, tuple[Any, ...]] = {
        FORWARD: (a.shape[0], b.shape[-2]),
        DGRAD: (a.shape[0], b.shape[-1]),
        WGRAD: (ends.shape[0], a.shape[1], b.shape[-1]),
    }
    return a.new_empty(shapes[layout], dtype=out_dtype)


@register_flop_formula(torch.ops.te_dynamo.te_grouped_gemm)
def _(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * a_shape[0] * b_shape[-1] * (a_shape[1] if len(b_shape) == 2 else b_shape[-2])


def why_not(device: torch.device) -> str | None:
    """Why a device has no such GEMM, as a clause: its capability and cuBLAS's version are checked, then the GEMM is tried."""
    return _why_not(device, capability(device))


@cache
def _why_not(device: torch.device, found: Capability) -> str | None:
    if not BLACKWELL <= found < BLACKWELL_RTX:
        reason = f"Transformer Engine's grouped FP8 GEMM is used on Blackwell (compute capability 10.0), this device has {dotted(found)}"
        return reason + (" (provider='auto' or 'native' has torch's)" if found == HOPPER else "")
    with running():
        version = int(api().tex.get_cublasLt_version())
    if version < OLDEST_CUBLAS:
        return f"Transformer Engine's grouped GEMM needs cuBLASLt 13.3 or newer, this is {version // 10_000}.{version // 100 % 100}"
    with unset_fake_temporarily():
        return _tried(device)


def _tried(device: torch.device) -> str | None:
    """Why the GEMM is not to be trusted here: it raises, or gives wrong results. Exact numbers; one group is empty except for its gap."""
    generator = torch.Generator().manual_seed(0)
    groups = Groups(torch.tensor([5, 5, 32], dtype=torch.int32, device=device), 40)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float().to(device)

    x, weight, grad = (t.to(torch.float8_e4m3fn) for t in (whole(40, 32), whole(3, 48, 32), whole(40, 48)))
    two, group = torch.tensor(2.0, device=device), groups.of_row[:32]
    x16, g16 = (groups.spread_out(t.float()).to(t.dtype) for t in (x, grad))

    def product(a: Tensor, b: Tensor, layout: str) -> Tensor:
        y = torch.ops.te_dynamo.te_grouped_gemm(a, b, two, two, groups.spread[0], layout, torch.bfloat16, False)
        return y if layout == WGRAD else y[groups.place_of_row[:32]]

    try:
        forward = torch.einsum("tk,tnk->tn", x[:32].float(), weight.float()[group])
        dgrad = torch.einsum("tn,tnk->tk", grad[:32].float(), weight.float()[group])
        wgrad = torch.stack([grad[:32][group == e].float().t() @ x[:32][group == e].float() for e in range(3)])
        for found, exact in (
            (product(x16, weight, FORWARD), forward),
            (product(g16, weight, DGRAD), dgrad),
            (product(g16, x16, WGRAD), wgrad),
        ):
            if not torch.equal(found, (4 * exact).bfloat16()):
                return "Transformer Engine's grouped FP8 GEMM gave wrong results in a trial on this device"
    except Exception as error:  # drivers and libraries raise all kinds
        return f"Transformer Engine's grouped FP8 GEMM failed in a trial on this device: {first_line(error)}"
    return None


@implements("grouped_linear", provider="te", recipes=PER_TENSOR)
class TEGroups(Implementation):
    cached = frozenset({"training", "inference"})

    def suits(self, device: torch.device) -> bool:
        return why_not(device) is None

    def unsupported(self, case: Case) -> str | None:
        return why_not(case.device) or unsupported_dtype(case.attributes["out_dtype"]) or unaligned(case)

    def backward_reads(self, call: Call, needs: Needs) -> tuple[str, ...]:
        return (*(["weight"] if call.remakes_weights else []), "offsets")

    def quantize_weights(self, call: Call, weights: Sequence[Tensor]) -> list[Quantized]:
        made = _weight(weights[0].detach(), scales_of(call, None).at("weight"))
        if call.cached == "inference":
            return [made.for_backward("data", "scale_inv")]
        return [made._replace(scale=None, amax=None if made.amax is None else made.amax.amax())]

    def kept_as(self, call: Call) -> Kept | None:
        return kept_by_one_scale(call, ((0,),))

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        x, weight, offsets, *kept = inputs
        groups = Groups(offsets, x.shape[0])
        x8 = _rows(call, x, groups, scales.at("input"), keeps=True)
        w8 = (kept[0] if kept else weight)[0] if call.cached else _weight(weight, scales.at("weight"))
        y = _multiply(x8, w8, groups, FORWARD, call["out_dtype"], fast=True)
        amaxes = [t.amax for t in (x8, w8) if t.amax is not None]  # a kept weight has none, and is not recorded
        kept_of_x = x8.for_backward("data", "scale_inv") if needs[1] else Quantized()
        fields = ("scale", "scale_inv") if call.remakes_weights else ("data", "scale_inv")
        return Forward([y], [kept_of_x, w8.for_backward(*fields) if needs[0] else Quantized()], amaxes)

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        (_, weight, offsets), (x8, w8), grad = inputs, saved, grads[0]
        groups = Groups(offsets, grad.shape[0])
        g8 = _rows(call, grad, groups, scales.at("grad_output"), keeps=False)
        assert g8.amax is not None
        dx = dw = None
        if needs[0]:
            if call.remakes_weights:
                with recomputed_in_backward():
                    w8 = w8._replace(data=_cast(weight, w8.scale, scales.casting.forward)[0])
            dx = _multiply(g8, w8, groups, DGRAD, call.inputs[0])
        if needs[1]:
            dw = _multiply(g8, x8, groups, WGRAD, call.inputs[1])
            dw = dw.transpose(1, 2).contiguous().transpose(1, 2) if call["inputs_first"] else dw
        return Backward([dx, dw, None], [g8.amax])


def _multiply(a: Quantized, b: Quantized, groups: Groups, layout: str, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """The rows of the operands are spread out; those of the result are not."""
    y = torch.ops.te_dynamo.te_grouped_gemm(a.data, b.data, a.scale_inv, b.scale_inv, groups.spread[0], layout, dtype, fast)
    return y if layout == WGRAD else y[groups.place_of_row]


def _rows(call: Call, t: Tensor, groups: Groups, scale_of: ScaleOf, keeps: bool) -> Quantized:
    """t [T, any], quantized and spread out. keeps: whether backward reads it, unless it is remade there."""
    amax = row_amax(groups.only(t))
    scale = scale_of.of(amax)
    with recomputed_in_backward() if keeps and "input" in call.remakes else nullcontext():
        scaled = scale_of.casting.saturated(groups.spread_out(t), scale.value, scale_of.dtype)
    with kept_or_remade(call) if keeps else nullcontext():
        data = stored(scaled.to(scale_of.dtype))
    return Quantized(data, scale.inverse, amax=amax)


def _weight(weight: Tensor, scale_of: ScaleOf) -> Quantized:
    scale = scale_of.known or scale_of.of(row_amax(weight))
    data, amax = _cast(weight, scale.value, scale_of.dtype)
    return Quantized(data, scale.inverse, scale=scale.value, amax=amax)


def _cast(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight [E, N, K], of any strides -> its FP8 copy, and amaxes."""
    data, _, _, amax = torch.ops.te_dynamo.cast_matrices(weight, scale, dtype, False, True, False)
    return data, amax
