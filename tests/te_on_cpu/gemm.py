"""cuBLAS's GEMM as TE calls it. In row-major terms it is `D = op(B) @ op(A)`, accumulated in float32 and rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu.quantize import FP8, quantize

HIGH_PRECISION = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16}  # tex.DType
ALIGNMENT = 16


def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: Tensor | None,
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
    """[D, bias gradient or None, None, None]. Raises RuntimeError for what an FP8 GEMM on a Hopper refuses."""
    if gelu or comm_overlap is not None or extra_output is not None or bulk_overlap:
        raise NotImplementedError("GELU epilogues and overlapped communication have no stand-in")
    in_fp8 = _is_fp8(A) or _is_fp8(B)
    if in_fp8:
        _refuse_dtypes(A, B, bias, grad)
    a, b = _operand(A, not transA), _operand(B, transB)  # both [rows, K]
    product = alpha * (b @ a.t())
    bias_grad = None
    if bias is not None and grad:  # the wgrad GEMM: b is the output's gradient, transposed
        bias_grad = b.sum(1).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    if D is None:
        out = product.to(HIGH_PRECISION[int(output_dtype)])
    else:
        out = D.add_(product) if accumulate else D.copy_(product)
    return [out if quantizer is None else quantize(out, quantizer), bias_grad, None, None]


def _is_fp8(t: Any) -> bool:
    return hasattr(t, "_fp8_dtype")


def _refuse_dtypes(A: Any, B: Any, bias: Tensor | None, grad: bool) -> None:
    if not (_is_fp8(A) and _is_fp8(B)):
        raise RuntimeError("one operand of the GEMM is FP8 and the other is not")
    if FP8[int(A._fp8_dtype)] == FP8[int(B._fp8_dtype)] == torch.float8_e5m2:
        raise RuntimeError("E5M2 x E5M2 is not a GEMM of this device")
    if bias is not None and not grad and bias.dtype == torch.float32:
        raise RuntimeError("an FP8 GEMM takes no float32 bias")


def _operand(t: Any, transposed: bool) -> Tensor:
    """[rows, K] in float32, out of the copy of `t` that has K innermost."""
    if not _is_fp8(t):
        rows = t.float().reshape(-1, t.shape[-1])
        return rows.t() if transposed else rows
    copy = t._transpose if transposed else t._data
    if copy is None or (transposed and t._transpose_invalid):
        raise RuntimeError(f"FP8 GEMMs on this device are TN only, and the {'transposed' if transposed else 'row-wise'} copy is missing")
    rows = copy.reshape(copy.shape[0], -1) if transposed else copy.reshape(-1, copy.shape[-1])
    if rows.shape[-1] % ALIGNMENT:
        raise RuntimeError(f"the leading dimension {rows.shape[-1]} is not a multiple of {ALIGNMENT}: the caller must pad")
    return rows.view(FP8[int(t._fp8_dtype)]).float() * t._scale_inv
