"""cuBLAS's GEMM as TE calls it. In row-major terms it is `D = op(B) @ op(A)`, accumulated in float32 and rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu as torch_gelu

from tests.te_on_cpu import block, device, mx, per_tensor
from tests.te_on_cpu.quantize import format_of, is_delayed, quantize, store
from tests.te_on_cpu.rounding import FP8, HIGH_PRECISION

ALIGNMENT = 16  # bytes


def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: Any,
    quantizer: Any,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    """[D, the bias's gradient or None, GELU's input or None, None].

    With `grad`, `bias` requests its gradient, the sum of B over its rows, and `gelu` multiplies by GELU's derivative at
    `gelu_in`. GELU is the tanh form. Raises RuntimeError for what the device rejects (C/gemm/cublaslt_gemm.cu:96-310).
    """
    if comm_overlap is not None or extra_output is not None or bulk_overlap:
        raise NotImplementedError("a GEMM that overlaps communication has no stand-in")
    if not accumulate and beta:
        raise RuntimeError("beta without accumulation has nothing to be applied to")
    device.hear("use_split_accumulator", use_split_accumulator)
    format = _common_format(A, B)
    _refuse_epilogue(format, A, B, bias, gelu, grad)
    a, b = _operand(A, not transA, format), _operand(B, transB, format)  # both [rows, K]
    if a.shape[1] != b.shape[1]:
        raise RuntimeError(f"GEMM of {list(a.shape)} and {list(b.shape)}: the inner dimensions differ")
    if output_dtype is None and D is None and format is not None:
        raise RuntimeError("an FP8 GEMM needs to be told the dtype of its output")
    dtype = HIGH_PRECISION[int(output_dtype)] if output_dtype is not None else (D if D is not None else A).dtype
    if format is not None:
        _refuse_shapes(format, A, B, a, b, 1 if _fused_cast(quantizer, format) else dtype.itemsize)

    product = alpha * (b @ a.t())
    bias_grad = gelu_input = None
    if bias is not None and grad:
        bias_grad = b.sum(1).to(dtype)
    elif bias is not None:
        product = product + bias.float()
    if gelu and grad:
        product = product * _gelu_derivative(gelu_in.float().reshape(product.shape))
    elif gelu:
        aux = HIGH_PRECISION[int(bias_type)] if format is not None else dtype
        gelu_input = product.to(aux)
        product = torch_gelu(product, approximate="tanh")
    shape = ([b.shape[0]] if transB else list(B.size())[:-1]) + [a.shape[0]]
    if accumulate:
        product = product + (1.0 if beta is None else beta) * D.float().reshape(product.shape)
    product = product.reshape(shape)
    if gelu_input is not None:
        gelu_input = gelu_input.reshape(shape)
    return [_output(product, D, quantizer, dtype, format), bias_grad, gelu_input, None]


def _output(product: Tensor, D: Any, quantizer: Any, dtype: torch.dtype, format: Any) -> Any:
    if quantizer is None:
        return product.to(dtype) if D is None else D.copy_(product.reshape(D.shape))
    if _fused_cast(quantizer, format):
        return store(product, dtype, quantizer, D)
    return quantize(product.to(dtype), quantizer, D)


def _fused_cast(quantizer: Any, format: Any) -> bool:
    """Whether the GEMM itself writes FP8: delayed scaling in and out (P/csrc/extensions/gemm.cpp:222)."""
    return format is per_tensor and quantizer is not None and is_delayed(quantizer)


def _common_format(A: Any, B: Any) -> Any:
    if format_of(A) is not format_of(B):
        raise RuntimeError("the operands of the GEMM are scaled in different ways, or one is quantized and the other is not")
    return format_of(A)


def _refuse_epilogue(format: Any, A: Any, B: Any, bias: Tensor | None, gelu: bool, grad: bool) -> None:
    if gelu and grad and bias is not None:
        raise NotImplementedError("GELU's derivative and the bias's gradient in one GEMM have no stand-in")
    if format is None:
        return
    if FP8[int(A._fp8_dtype)] == FP8[int(B._fp8_dtype)] == torch.float8_e5m2:
        raise RuntimeError("E5M2 x E5M2 is not a GEMM of this device")
    if bias is not None and not grad and bias.dtype == torch.float32:
        raise RuntimeError("an FP8 GEMM takes no float32 bias")
    if format is mx and device.capability() < (10, 0):
        raise RuntimeError(f"an MXFP8 GEMM needs compute capability 10.0, this is {device.capability()}")
    if format is block:
        if A._is_2D_scaled and B._is_2D_scaled:
            raise RuntimeError("of two operands scaled in blocks of 128 x 128 there is no GEMM: one must have blocks of 1 x 128")
        if (gelu and not grad) or (bias is not None and grad):
            raise RuntimeError("a block-scaled GEMM has no epilogue but bias and GELU's derivative")


def _refuse_shapes(format: Any, A: Any, B: Any, a: Tensor, b: Tensor, itemsize: int) -> None:
    """a, b: [rows, K]."""
    if a.numel() == 0 or b.numel() == 0:
        return
    for t, rows in ((A, a), (B, b)):
        # If the device takes any layout, the row-wise copy is read as stored; otherwise the copy with K innermost.
        leading = t._data.shape[-1] if format is per_tensor and device.any_fp8_layout() and t._data is not None else rows.shape[1]
        if leading % ALIGNMENT:
            raise RuntimeError(f"the leading dimension {leading} is not a multiple of {ALIGNMENT}: the caller must pad")
    if a.shape[0] * itemsize % ALIGNMENT:
        raise RuntimeError(f"a row of the output, {a.shape[0]} x {itemsize} bytes, is not a multiple of {ALIGNMENT}: the caller must pad")
    if format is block and (a.shape[0] % 8 or (not B._is_2D_scaled and b.shape[0] % 8)):
        raise RuntimeError("a block-scaled GEMM wants outer dimensions that are multiples of 8: the caller must pad")


def _operand(t: Any, transposed: bool, format: Any) -> Tensor:
    """[rows, K] in float32. For a quantized operand, from the copy with K innermost; only some devices can use the other copy."""
    if format is None:
        rows = t.detach().float().reshape(-1, t.shape[-1])
        return rows.t() if transposed else rows
    copy = format.copy_for_gemm(t, transposed)
    if copy is None and format is per_tensor and device.any_fp8_layout():
        other = format.copy_for_gemm(t, not transposed)
        copy = None if other is None else other.t()
    if copy is None:
        name = "transposed (column-wise)" if transposed else "row-wise"
        raise RuntimeError(f"FP8 GEMMs on this device are TN only, and the {name} copy is missing")
    return copy


def _gelu_derivative(x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(torch_gelu(leaf, approximate="tanh").sum(), leaf)[0]
