"""NVIDIA's own `transformer_engine` Python package on a CPU: the reference for te_dynamo.

Its modules, quantizers, autocast, recipes and scale state are the wheel's. Only the C++ layer below them, the module
`transformer_engine_torch` ("tex"), is replaced by a stand-in that follows the definitions: slow and obvious. It acts as a Hopper:
FP8 GEMMs are TN only, operands must be aligned, memory must have the claimed layout, and what that hardware rejects is an error.
Another device is pretended by its compute capability. Functions without a stand-in raise NotImplementedError with their name.
docs/te-tests.md says how many of TE's own tests pass.

    te = te_on_cpu.install()          # before anything else imports transformer_engine
    with te_on_cpu.cuda_is_cpu():     # around TE's eager modules, backward included; never around torch.compile
        ...
    with te_on_cpu.pretended((10, 0)):   # around anything: the device is a Blackwell
        ...
    with te_on_cpu.heard() as flags:     # arguments of TE's kernels that change no number here
        ...

    signatures.json  the built module's functions and enums (2.20.2)
    extension.py     makes the module from them, and checks each stand-in against its signature
    device.py        makes TE believe in a device
    rounding.py      amax, scale and cast, for every quantizer
    per_tensor.py, block.py, mx.py   the formats: delayed and current scaling, blocks of 128, MXFP8
    quantize.py      tex.quantize and its kin, over the formats
    scaling.py       delayed scaling's update
    gemm.py, grouped.py, permute.py, norm.py, activation.py, rope.py
    attention.py     fused attention; scores.py, layout.py, attention_support.py: its masks, its memory layouts, when it is supported
    softmax.py, sequence.py   for TE's unfused attention
    plugin.py        runs TE's own tests (tools/run_te_tests.py)
    truth.py, conftest.py, test_*.py   the stand-in's own tests
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch

from tests.te_on_cpu.device import capability, cuda_is_cpu, heard, pretended
from tests.te_on_cpu.extension import VERSION, extension

__all__ = ["cuda_is_cpu", "heard", "install", "missing", "pretended"]


def missing() -> str | None:
    """Why TE is not available here, or None."""
    try:
        found = version("transformer_engine")
    except PackageNotFoundError:
        return f"transformer_engine {VERSION} is not installed"
    if found != VERSION:
        return f"the stand-in is for transformer_engine {VERSION}, this is {found}"
    try:
        install()
    except ImportError as error:
        return f"transformer_engine cannot be imported: {error}"
    return None


def install() -> ModuleType:
    """Installs the stand-in, and returns `transformer_engine.pytorch`.

    Raises ImportError if the wheel or one of its dependencies is missing.
    """
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # transformer_engine.common then loads no shared library
    os.environ.setdefault("NVTE_TORCH_COMPILE", "0")  # TE's own small compiled helpers run eagerly
    stand_in: Any = sys.modules.setdefault("transformer_engine_torch", extension())
    stand_in.cuda_is_cpu, stand_in.capability = cuda_is_cpu, capability
    from transformer_engine import common

    common.load_framework_extension = lambda framework: None
    with cuda_is_cpu():
        import transformer_engine.pytorch as te
        from transformer_engine.pytorch.tensor.storage import mxfp8_tensor_storage
    # TE moves a tensor to a GPU before it dequantizes it. Here there is none.
    mxfp8_tensor_storage._FromMXFP8Func.forward = staticmethod(_dequantize)
    return te


def _dequantize(_: Any, tensor: Any, dtype: torch.dtype) -> torch.Tensor:
    from transformer_engine.pytorch.constants import TE_DType

    return sys.modules["transformer_engine_torch"].dequantize(tensor, TE_DType[dtype])  # type: ignore[attr-defined]
