"""Transformer Engine's kernels, each behind one operator that takes and gives plain tensors.

TE's own quantizers and tensor classes are built inside an operator and do not leave it: AOTAutograd, Inductor, CUDA graphs and
the caches see ordinary tensors. The calls are those of TE 2.20 (pytorch/cpp_extensions/gemm.py, pytorch/tensor/float8_tensor.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from contextlib import AbstractContextManager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

EXTENSION = "transformer_engine_torch"
OLDEST, NEWEST = (2, 20), (3, 0)  # supported: from, and below


def unavailable(device: torch.device) -> str | None:
    """Why TE cannot compute on a device, as a clause with its remedy; None where it can.

    It can where its extension is loaded or importable, on a CUDA device; or where a stand-in for the extension says of itself
    `__stand_in__ = True`.
    """
    try:
        found = version("transformer_engine")
    except PackageNotFoundError:
        return "the package transformer_engine is not installed (pip install 'transformer_engine[pytorch]')"
    numbers = tuple(int(n) for n in found.split(".")[:2] if n.isdigit())
    if not OLDEST <= numbers < NEWEST:
        wanted = f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, NEWEST))}"
        return f"transformer_engine {found} is not supported (pip install 'transformer_engine[pytorch]{wanted}')"
    loaded = sys.modules.get(EXTENSION)
    if getattr(loaded, "__stand_in__", False):
        return None
    if loaded is None and importlib.util.find_spec(EXTENSION) is None:
        return f"transformer_engine is installed without its extension for PyTorch, {EXTENSION} (pip install 'transformer_engine[pytorch]')"
    if device.type != "cuda":
        return f"transformer_engine's kernels are for CUDA devices, not {device.type}"
    return None


@cache
def _api() -> Any:
    """What is called of TE, imported once, when it is first wanted: the import takes seconds."""
    from types import SimpleNamespace

    with running():
        import transformer_engine.pytorch  # noqa: F401  (loads the extension)
        import transformer_engine_torch as tex
        from transformer_engine.pytorch import Float8Quantizer
        from transformer_engine.pytorch.constants import TE_DType
        from transformer_engine.pytorch.cpp_extensions import general_gemm
        from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
    return SimpleNamespace(tex=tex, general_gemm=general_gemm, Float8Quantizer=Float8Quantizer, Storage=Float8TensorStorage, dtype=TE_DType)


def running() -> AbstractContextManager[Any]:
    """Around TE's calls: nothing on a device; a stand-in on a CPU brings what lets TE believe in one."""
    extension: Any = sys.modules.get(EXTENSION)
    if not getattr(extension, "__stand_in__", False):
        return contextlib.nullcontext()
    owner = extension if hasattr(extension, "cuda_is_cpu") else sys.modules[extension.quantize.__module__]
    return owner.cuda_is_cpu()


@torch.library.custom_op("te_dynamo::te_gemm", mutates_args=())
def te_gemm(a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, bias: Tensor | None, out_dtype: torch.dtype, fast: bool) -> Tensor:
    """cuBLAS's FP8 GEMM, one kernel: a [M, K] and b [N, K], FP8, not both E5M2; scale_inv f32, 0-d; bias [N] in 16 bits, in the
    epilogue; fast: accumulates with fewer bits (TE's use_split_accumulator=False) -> a @ b.T + bias [M, N] in out_dtype."""
    te = _api()
    with running():
        operands = [
            te.Storage(
                data=t.view(torch.uint8),
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
    te = _api()
    amax = x.new_zeros(1, dtype=torch.float32)
    with running():
        quantizer = te.Float8Quantizer(scale.reshape(1), amax, te.dtype[dtype], rowwise=data, columnwise=transposed)
        quantizer.internal = True
        made = te.tex.quantize(x, quantizer)
    plain, across = made._data if data else None, made._transpose if transposed else None
    empty = x.new_empty((0, 0), dtype=dtype)
    return empty if plain is None else plain.view(dtype), empty.clone() if across is None else across.view(dtype), amax


@te_quantize.register_fake
def _(x, scale, dtype, data, transposed):
    rows, columns = x.shape
    plain = x.new_empty((rows, columns) if data else (0, 0), dtype=dtype)
    return plain, x.new_empty((columns, rows) if transposed else (0, 0), dtype=dtype), x.new_empty(1, dtype=torch.float32)


def gemm(a: Tensor, b: Tensor, a_inv: Tensor, b_inv: Tensor, out_dtype: torch.dtype, bias: Tensor | None, fast: bool) -> Tensor:
    """A `lowering.linears.GemmFunction`. A float32 bias is added after the GEMM: cuBLAS has none, and TE rounds it to bf16."""
    in_epilogue = bias is not None and out_dtype != torch.float32
    y = torch.ops.te_dynamo.te_gemm(a, b, a_inv, b_inv, bias if in_epilogue else None, out_dtype, fast)
    return y if bias is None or in_epilogue else y + bias


def cast(
    parts: list[Tensor], scale: Tensor, dtype: torch.dtype, interleave: int, data: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A `lowering.linears.Cast`: TE's kernel for one matrix; ours where matrices are joined, which TE's would have copied first."""
    if len(parts) > 1:
        return torch.ops.te_dynamo.cast_transpose(parts, scale, dtype, interleave, data, transposed)
    return torch.ops.te_dynamo.te_quantize(parts[0], scale, dtype, data, transposed)
