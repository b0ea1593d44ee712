"""TE's FP8 GEMM, and its fused casts: with the transpose, and with a bias's gradient.

The calls are those of TE 2.20 (pytorch/cpp_extensions/gemm.py, pytorch/tensor/float8_tensor.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from te_dynamo.lowering.limits import ALIGNMENT_ON_GPU
from te_dynamo.lowering.per_tensor import OnePassKernels, PerTensorLinears
from te_dynamo.lowering.quantized import Quantized, ScaleOf
from te_dynamo.lowering.registry import PER_TENSOR, implements
from te_dynamo.lowering.te.library import api, casts_transpose, running


@torch.library.custom_op("te_dynamo::te_gemm", mutates_args=())
def te_gemm(a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, bias: Tensor | None, out_dtype: torch.dtype, fast: bool) -> Tensor:
    """cuBLAS's FP8 GEMM, one kernel: a [M, K] and b [N, K], FP8, not both E5M2; scale_inv f32, 0-d; bias [N] in 16 bits, in the
    epilogue; fast: accumulates with fewer bits (TE's use_split_accumulator=False) -> a @ b.T + bias [M, N] in out_dtype."""
    te = api()
    with running():
        operands = [
            te.Storage(
                data=t.contiguous().view(torch.uint8),  # TE reads memory, not strides
                fp8_scale_inv=inv.reshape(1),
                fp8_dtype=te.dtype[t.dtype],
                fake_dtype=out_dtype,
                data_transpose=None,
            )
            for t, inv in ((b, b_inv), (a, a_inv))
        ]
        y, *_ = te.general_gemm(*operands, out_dtype=out_dtype, layout="TN", bias=bias, use_split_accumulator=not fast)
    return y


@te_gemm.register_fake
def _(a, b, a_inv, b_inv, bias, out_dtype, fast):
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


@register_flop_formula(torch.ops.te_dynamo.te_gemm)
def _(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[0]


@torch.library.custom_op("te_dynamo::te_quantize", mutates_args=())
def te_quantize(x: Tensor, scale: Tensor, dtype: torch.dtype, data: bool, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """TE's fused cast and transpose, one kernel: x [R, C], scale f32, 0-d -> (FP8 [R, C], FP8 [C, R], amax f32 [1]).

    data, transposed: which are wanted; the other is empty.
    """
    amax = x.new_zeros(1, dtype=torch.float32)
    with running():
        made = api().tex.quantize(x, quantizer(scale, amax, dtype, data, transposed))
    return *plain(made, x, dtype, data, transposed), amax


@te_quantize.register_fake
def _(x, scale, dtype, data, transposed):
    return *plain_fake(x, dtype, data, transposed), x.new_empty(1, dtype=torch.float32)


@torch.library.custom_op("te_dynamo::te_bgrad_quantize", mutates_args=())
def te_bgrad_quantize(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TE's cast and transpose that also sums the columns: one kernel, and one that adds up its partial sums:

    grad [T, N], scale f32, 0-d -> (FP8 [T, N], FP8 [N, T], the sum over T [N] in grad's dtype, amax f32 [1]).
    """
    amax = grad.new_zeros(1, dtype=torch.float32)
    with running():
        summed, made = api().tex.bgrad_quantize(grad.contiguous(), quantizer(scale, amax, dtype, True, True))
    return *plain(made, grad, dtype, True, True), summed, amax


@te_bgrad_quantize.register_fake
def _(grad, scale, dtype):
    return *plain_fake(grad, dtype, True, True), grad.new_empty(grad.shape[1]), grad.new_empty(1, dtype=torch.float32)


def quantizer(scale: Tensor, amax: Tensor, dtype: torch.dtype, data: bool, transposed: bool) -> Any:
    """TE's delayed-scaling quantizer for one tensor; `amax` [1] becomes its maximum with the tensor's. scale: f32, 0-d."""
    te = api()
    if transposed:  # TE's cast and transpose writes both; where it does not transpose, `plain` does
        data, transposed = True, casts_transpose(scale.device)
    made = te.Float8Quantizer(scale.reshape(1), amax, te.dtype[dtype], rowwise=data, columnwise=transposed)
    made.internal = True
    return made


def plain(made: Any, like: Tensor, dtype: torch.dtype, data: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    """What TE quantized, as plain tensors: as it is, and transposed; each is empty if not wanted.

    Where TE's casts do not transpose, a kernel of ours does: GEMMs here are TN on every device.
    """
    empty = like.new_empty((0, 0), dtype=dtype)
    across = made._transpose
    if transposed and across is None:
        across = torch.ops.te_dynamo.transpose(made._data)
    return made._data.view(dtype) if data else empty, across.view(dtype) if transposed else empty.clone()


def plain_fake(x: Tensor, dtype: torch.dtype, data: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    """The fake result of `plain` for x [R, C]."""
    rows, columns = x.shape
    return x.new_empty((rows, columns) if data else (0, 0), dtype=dtype), x.new_empty(
        (columns, rows) if transposed else (0, 0), dtype=dtype
    )


def gemm(a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, out_dtype: torch.dtype, bias: Tensor | None, fast: bool) -> Tensor:
    """A `per_tensor.GemmFunction`. A float32 bias is added after the GEMM: cuBLAS has none, and TE rounds it to bf16."""
    in_epilogue = bias is not None and out_dtype != torch.float32
    y = torch.ops.te_dynamo.te_gemm(a, b, a_inv, b_inv, bias if in_epilogue else None, out_dtype, fast)
    return y if bias is None or in_epilogue else y + bias


def cast(
    parts: list[Tensor], scale: Tensor, dtype: torch.dtype, interleave: int, data: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A `per_tensor.Cast`: TE's kernel for one matrix; ours for matrices to be joined, which TE's would need copied first, and for a
    transposed copy alone, since TE's would write the other copy as well."""
    if len(parts) > 1 or not data:
        return torch.ops.te_dynamo.cast_transpose(parts, scale, dtype, interleave, data, transposed)
    return torch.ops.te_dynamo.te_quantize(parts[0], scale, dtype, data, transposed)


@dataclass(frozen=True)
class TEKernels(OnePassKernels):
    """TE's GEMM, its fused cast and transpose of weights, and that of gradients if the bias gradient is wanted too.

    Other activations and gradients are quantized by the Inductor kernels that compute them: a separate kernel would read and write them
    once more.
    """

    def gradient(self, grad: Tensor, scale_of: ScaleOf, data: bool, transposed: bool, bias: bool) -> tuple[Quantized, Tensor | None]:
        scale, tokens = scale_of.known, grad.shape[0]
        whole = isinstance(tokens, int) and tokens % self.multiple == 0
        if scale is None or not (data and transposed and bias and whole):
            return super().gradient(grad, scale_of, data, transposed, bias)
        g8, g8t, db, amax = torch.ops.te_dynamo.te_bgrad_quantize(grad, scale.value, scale_of.dtype)
        return Quantized(g8, scale.inverse, g8t, scale=scale.value, amax=amax), db.float()


KERNELS = TEKernels(gemm, contiguous=True, multiple=ALIGNMENT_ON_GPU, cast=cast)
implements("linears", provider="te", recipes=PER_TENSOR, kernels=KERNELS)(PerTensorLinears)
