"""TE's grouped GEMMs, one product after the other: of lists of tensors, and of tensors whose group sizes are only on the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu import device
from tests.te_on_cpu.gemm import ALIGNMENT, generic_gemm
from tests.te_on_cpu.rounding import FP8

CUBLAS = {(9, 0): 130400, (10, 0): 130300}  # C/gemm/cublaslt_grouped_gemm.cu:35-51
FP8_CUBLAS = {(9, 0): 130500, (10, 0): 130300}


def te_general_grouped_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    D: Any,
    D_type: Any,
    m_splits: Any,
    bias: Any,
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: Any,
    grad: bool,
    workspace: Any,
    workspaceSize: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> Any:
    """The biases, or with `grad` their gradients. With `single_output`, D[0] has all results, concatenated by rows
    (P/csrc/extensions/gemm.cpp:468)."""
    if any(t.numel() for t in pre_gelu_out):
        raise NotImplementedError("a grouped GEMM with GELU has no stand-in")
    start = 0
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        sizes = [list(t.size()) for t in (a, b)]
        rows = sizes[1][-1] if transb else math.prod(sizes[1][:-1])
        out = D[0].view(-1, D[0].shape[-1])[start : start + rows] if single_output else D[i]
        start += rows
        if 0 in sizes[0] or 0 in sizes[1]:
            if not accumulate:
                out.zero_()
            if grad:
                bias[i].zero_()
            continue
        given = bias[i] if bias[i].numel() else None
        _, bias_grad, _, _ = generic_gemm(
            a, transa, b, transb, out, None, D_type, given, bias_type, False, None, grad, workspace[0], 0, accumulate, use_split_accumulator
        )  # fmt: skip
        if bias_grad is not None:
            bias[i].copy_(bias_grad)
    return bias


def get_grouped_gemm_setup_workspace_size(num_tensors: int) -> int:
    return 128 * num_tensors


def te_general_grouped_gemm_for_grouped_tensor(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    D: Any,
    bias: Any,
    bias_scale: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    workspace_setup: Tensor,
    workspace_cublas: Tensor,
    use_split_accumulator: bool,
    sm_count: int,
) -> Any:
    """D. Raises RuntimeError for what the device rejects, and if an operand does not have the layout that TE's kernels read."""
    here, per_group = device.capability(), device.capability() >= (10, 0)
    if not (9, 0) <= here <= (11, 0):
        raise RuntimeError("grouped GEMM requires Hopper or Blackwell (SM10x and SM110)")
    formats = {_format(A), _format(B)}
    oldest = (CUBLAS if formats == {None} else FP8_CUBLAS)[(10, 0) if per_group else (9, 0)]
    if device.get_cublasLt_version() < oldest:
        raise RuntimeError(f"this grouped GEMM requires cuBLASLt {oldest}, this is {device.get_cublasLt_version()}")
    if len(formats) == 2 and None in formats:
        raise RuntimeError("A and B must both be FP8 or both be not")
    if formats == {torch.float8_e5m2}:
        raise RuntimeError("E5M2 x E5M2 is not a GEMM of this device")
    members = [_members(t) for t in (A, B, D)]
    if len({len(m) for m in members}) != 1:
        raise RuntimeError("A, B and D must have the same number of tensors")
    count = len(members[0])
    if {alpha.numel(), beta.numel()} != {count if per_group else 1}:
        raise RuntimeError("alpha and beta must have one element for each group on a Blackwell, one in all on a Hopper")
    device.hear("use_split_accumulator", use_split_accumulator)
    biases = [None] * count if bias is None else _members(bias)
    rows = 0
    for i, (a, b, out, added) in enumerate(zip(*members, biases, strict=True)):
        by, keep = (t.expand(count)[i].item() for t in (alpha, beta))
        product = by * ((b.t() if transb else b).float() @ (a if not transa else a.t()).float())
        out.copy_(product + keep * out.float() if keep else product)
        if added is not None:  # a separate kernel, on the rounded result
            scale = 1.0 if bias_scale is None else bias_scale.flatten()[rows : rows + len(out)].unsqueeze(1).float()
            out.copy_(out.float() + scale * added.float())
        rows += len(out)
    return D


def _also(name: str) -> Callable[..., Any]:
    """The same function under another name, with the same signature: `_members` also takes a list of matrices for a grouped tensor."""

    @functools.wraps(te_general_grouped_gemm_for_grouped_tensor)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return te_general_grouped_gemm_for_grouped_tensor(*args, **kwargs)

    stand_in.__name__ = name
    return stand_in


te_general_grouped_gemm_for_discrete_in = _also("te_general_grouped_gemm_for_discrete_in")  # A: weights
te_general_grouped_gemm_for_discrete_out = _also("te_general_grouped_gemm_for_discrete_out")  # D: their gradients


def _format(t: Any) -> torch.dtype | None:
    """The FP8 dtype of a grouped tensor, or of a list of matrices."""
    if isinstance(t, (list, tuple)):
        return None if isinstance(t[0], Tensor) and not hasattr(t[0], "_fp8_dtype") else FP8[int(t[0]._fp8_dtype)]
    return None if t.quantizer is None else FP8[int(t.quantizer.dtype)]


def _members(t: Any) -> list[Tensor]:
    """The matrices of a grouped tensor, or of a list: FP8 ones in float32, others as views of their memory."""
    if isinstance(t, (list, tuple)):
        if _format(t) is not None:
            raise NotImplementedError("lists of FP8 matrices have no stand-in in a grouped GEMM")
        return list(t)
    data, quantizer = t.rowwise_data, t.quantizer
    if data is None or t.last_dims is not None or t.columnwise_data is not None:
        raise NotImplementedError("grouped tensors have row-wise data alone here, with rows that differ in number")
    if data.dim() != 1 or not data.is_contiguous():
        raise RuntimeError("the data of a grouped tensor is one-dimensional and contiguous")
    columns = t.logical_shape[1]
    if t.first_dims is None:
        rows = [t.logical_shape[0] // t.num_tensors] * t.num_tensors
        starts = [sum(rows[:i]) * columns for i in range(t.num_tensors)]
    else:
        if t.first_dims.dtype != torch.int64 or t.tensor_offsets.dtype != torch.int64:
            raise RuntimeError("sizes and offsets of groups are int64")
        rows, offsets = t.first_dims.tolist(), t.tensor_offsets.tolist()
        if len(rows) != t.num_tensors or any(end - start != n * columns for n, (start, end) in zip(rows, pairwise(offsets), strict=True)):
            raise RuntimeError("the offsets are not those of the groups' sizes")
        starts = offsets[:-1]
    pieces = [data[start : start + n * columns].view(n, columns) for start, n in zip(starts, rows, strict=True)]
    if quantizer is None:
        return pieces
    if columns % ALIGNMENT or any(n % ALIGNMENT for n in rows):
        raise RuntimeError(f"the rows and columns of each group are multiples of {ALIGNMENT}: the caller must pad")
    if not device.any_fp8_layout():
        raise NotImplementedError("FP8 on a Hopper wants transposed copies, which have no stand-in")
    if t.scale_inv.shape != (t.num_tensors,) or t.scale_inv.dtype != torch.float32:
        raise RuntimeError("scale_inv has one float32 for each group")
    return [p.view(FP8[int(quantizer.dtype)]).float() * inverse for p, inverse in zip(pieces, t.scale_inv, strict=True)]
