"""NVIDIA's own `transformer_engine` Python package on a CPU: what te_dynamo is held to.

Its modules, quantizers, autocast, recipes and scale-state machine are the wheel's. Only the C++ layer below them, the module
`transformer_engine_torch` ("tex"), is stood in for, by definition and no further than te.Linear with per-tensor scaling
needs it. The stand-in is a Hopper: FP8 GEMMs are TN only, operands are aligned, and what that hardware refuses is an error.

    te = te_on_cpu.install()          # before anything else imports transformer_engine
    with te_on_cpu.cuda_is_cpu():     # around TE's eager modules, backward included; never around torch.compile
        ...

    signatures.json  the built module's functions and enums (2.20.2), as far as TE imports them by name or we stand in for them
    extension.py     makes the module of them, each stand-in checked against its signature
    device.py        lets TE believe in a device
    quantize.py, gemm.py, scaling.py  the stand-ins
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from tests.te_on_cpu.device import cuda_is_cpu
from tests.te_on_cpu.extension import VERSION, extension

__all__ = ["cuda_is_cpu", "install", "missing"]


def missing() -> str | None:
    """Why TE cannot be had here, or None."""
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
    """Puts the stand-in in place, and returns `transformer_engine.pytorch`.

    Raises ImportError where the wheel or one of its dependencies is missing.
    """
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # transformer_engine.common then loads no shared library
    os.environ.setdefault("NVTE_TORCH_COMPILE", "0")  # TE's own small compiled helpers run eagerly
    sys.modules.setdefault("transformer_engine_torch", extension())
    from transformer_engine import common

    common.load_framework_extension = lambda framework: None
    with cuda_is_cpu():
        import transformer_engine.pytorch as te
    return te
