"""Where Transformer Engine is: whether it can compute here, and what of it is called.

TE's own quantizers and tensor classes are built inside the operators of this package and do not leave them: AOTAutograd,
Inductor, CUDA graphs and the caches see ordinary tensors.
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
        return f"the package transformer_engine is not installed ({install()})"
    numbers = tuple(int(n) for n in found.split(".")[:2] if n.isdigit())
    if not OLDEST <= numbers < NEWEST:
        wanted = f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, NEWEST))}"
        return f"transformer_engine {found} is not supported ({install(wanted)})"
    loaded = sys.modules.get(EXTENSION)
    if getattr(loaded, "__stand_in__", False):
        return None
    if loaded is None and importlib.util.find_spec(EXTENSION) is None:
        return f"transformer_engine is installed without its extension for PyTorch, {EXTENSION} ({install()})"
    if device.type != "cuda":
        return f"transformer_engine's kernels are for CUDA devices, not {device.type}"
    return import_error()


@cache
def import_error() -> str | None:
    """Why TE, which is installed, cannot be imported: one that was built against another torch, say. None if it can."""
    try:
        api()
    except Exception as error:  # whatever a foreign import raises
        return f"transformer_engine cannot be imported: {error} ({install()})"
    return None


def install(versions: str = "") -> str:
    """The command that installs TE. Its extension is built against the torch that is there, not one that pip fetches to build it."""
    return f"pip install --no-build-isolation 'transformer_engine[pytorch]{versions}'"


@cache
def api() -> Any:
    """What is called of TE, imported once, when it is first wanted: the import takes seconds."""
    with running():
        import transformer_engine.pytorch  # noqa: F401  (loads the extension)
        import transformer_engine_torch as tex
        from transformer_engine.pytorch import Float8BlockQuantizer, Float8Quantizer, MXFP8Quantizer
        from transformer_engine.pytorch.constants import TE_DType
        from transformer_engine.pytorch.cpp_extensions import fused_attn_bwd, fused_attn_fwd, general_gemm
        from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend
        from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
        from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
        from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage
    return SimpleNamespace(
        tex=tex,
        general_gemm=general_gemm,
        fused_attn_fwd=fused_attn_fwd,
        fused_attn_bwd=fused_attn_bwd,
        AttnBackend=FusedAttnBackend,
        Float8Quantizer=Float8Quantizer,
        Float8BlockQuantizer=Float8BlockQuantizer,
        MXFP8Quantizer=MXFP8Quantizer,
        Storage=Float8TensorStorage,
        BlockStorage=Float8BlockwiseQTensorStorage,
        MXFP8Storage=MXFP8TensorStorage,
        dtype=TE_DType,
    )


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a device, or what a stand-in pretends: that of a Hopper, if it does not say."""
    extension: Any = sys.modules.get(EXTENSION)
    if device.type == "cuda" and not getattr(extension, "__stand_in__", False):
        return torch.cuda.get_device_capability(device)
    return getattr(extension, "capability", lambda: (9, 0))()


def casts_transpose(device: torch.device) -> bool:
    """Whether TE's casts write a transposed copy: not where FP8 GEMMs take operands of any layout, so that its own need none
    (C/transformer_engine.cpp:1191)."""
    found = capability(device)
    return not ((10, 0) <= found < (12, 0) or found >= (13, 0))


def cudnn_version() -> int:
    """As TE sees it: 91002 is 9.10.2."""
    with running():
        return int(api().tex.get_cudnn_version())


def running() -> AbstractContextManager[Any]:
    """Around TE's calls: nothing on a device; a stand-in on a CPU brings what lets TE believe in one."""
    extension: Any = sys.modules.get(EXTENSION)
    if not getattr(extension, "__stand_in__", False):
        return contextlib.nullcontext()
    owner = extension if hasattr(extension, "cuda_is_cpu") else sys.modules[extension.quantize.__module__]
    return owner.cuda_is_cpu()
