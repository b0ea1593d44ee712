"""Transformer Engine as a library: whether it can run here, and the functions that are called.

TE's quantizers and tensor classes never leave the operators of this package: AOTAutograd, Inductor, CUDA graphs and the
caches see ordinary tensors.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from contextlib import AbstractContextManager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from packaging.version import Version

from te_dynamo.lowering.devices import BLACKWELL, BLACKWELL_RTX, HOPPER, Capability, dotted

EXTENSION = "transformer_engine_torch"
OLDEST, NEWEST = (2, 20), (3, 0)  # supported: OLDEST <= version < NEWEST


def unavailable(device: torch.device) -> str | None:
    """Why TE cannot run on a device, as a clause with its remedy; None if it can: on CUDA, or anywhere with a stand-in."""
    return not_installed(device) or (import_error() if stand_in() is None else None)


def not_installed(device: torch.device) -> str | None:
    """As `unavailable`, without importing TE."""
    try:
        found = version("transformer_engine")
    except PackageNotFoundError:
        return f"the package transformer_engine is not installed ({install()})"
    if not OLDEST <= Version(found).release < NEWEST:
        return f"transformer_engine {found} is not supported ({install(f'>={dotted(OLDEST)},<{dotted(NEWEST)}')})"
    if stand_in() is not None:
        return None
    if sys.modules.get(EXTENSION) is None and importlib.util.find_spec(EXTENSION) is None:
        return f"transformer_engine is installed without its extension for PyTorch, {EXTENSION} ({install()})"
    if device.type != "cuda":
        return f"transformer_engine's kernels are for CUDA devices, not {device.type}"
    return None


@cache
def import_error() -> str | None:
    """Why an installed TE cannot be imported (it was built against another torch, for example); None if it can."""
    try:
        api()
    except Exception as error:  # whatever a foreign import raises
        return f"transformer_engine cannot be imported: {error} ({install()})"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its type if there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def install(versions: str = "") -> str:
    """The command that installs TE. Without build isolation its extension is built against the installed torch."""
    return f"pip install --no-build-isolation 'transformer_engine[pytorch]{versions}'"


@cache
def api() -> Any:
    """The part of TE that is called, imported on first use: the import takes seconds."""
    with running():
        import transformer_engine.pytorch  # noqa: F401  (loads the extension)
        import transformer_engine_torch as tex
        from transformer_engine.pytorch import Float8BlockQuantizer, Float8Quantizer, MXFP8Quantizer
        from transformer_engine.pytorch.constants import TE_DType
        from transformer_engine.pytorch.cpp_extensions import fused_attn_bwd, fused_attn_fwd, general_gemm
        from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend
        from transformer_engine.pytorch.cpp_extensions.gemm import general_grouped_gemm_for_grouped_tensor
        from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
        from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
        from transformer_engine.pytorch.tensor.storage.grouped_tensor_storage import GroupedTensorStorage
        from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage
    return SimpleNamespace(
        tex=tex,
        general_gemm=general_gemm,
        grouped_gemm=general_grouped_gemm_for_grouped_tensor,
        fused_attn_fwd=fused_attn_fwd,
        fused_attn_bwd=fused_attn_bwd,
        AttnBackend=FusedAttnBackend,
        Float8Quantizer=Float8Quantizer,
        Float8BlockQuantizer=Float8BlockQuantizer,
        MXFP8Quantizer=MXFP8Quantizer,
        Storage=Float8TensorStorage,
        BlockStorage=Float8BlockwiseQTensorStorage,
        MXFP8Storage=MXFP8TensorStorage,
        GroupedStorage=GroupedTensorStorage,
        dtype=TE_DType,
    )


def stand_in() -> Any:
    """The module that stands in for TE's extension on a CPU, marked `__stand_in__ = True`; None if there is none."""
    extension = sys.modules.get(EXTENSION)
    return extension if getattr(extension, "__stand_in__", False) else None


def capability(device: torch.device) -> Capability:
    """The compute capability of a device. Off CUDA, the one a stand-in pretends, Hopper's by default."""
    if device.type == "cuda" and stand_in() is None:
        return torch.cuda.get_device_capability(device)
    return getattr(stand_in(), "capability", lambda: HOPPER)()


def casts_transpose(device: torch.device) -> bool:
    """Whether TE's casts write a transposed copy. Not where FP8 GEMMs take any operand layout (C/transformer_engine.cpp:1191)."""
    found = capability(device)
    return not (BLACKWELL <= found < BLACKWELL_RTX or found >= (13, 0))


def cudnn_version() -> int:
    """As TE reports it: 91002 is 9.10.2."""
    with running():
        return int(api().tex.get_cudnn_version())


def running() -> AbstractContextManager[Any]:
    """The context for calls into TE: a no-op on a GPU; a stand-in's makes TE treat the CPU as a CUDA device."""
    extension = stand_in()
    if extension is None:
        return contextlib.nullcontext()
    owner = extension if hasattr(extension, "cuda_is_cpu") else sys.modules[extension.quantize.__module__]
    return owner.cuda_is_cpu()
