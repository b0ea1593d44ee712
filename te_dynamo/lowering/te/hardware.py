"""Which recipes Transformer Engine computes on which GPU: declared, and asked of TE itself where it can answer.

Sources are lines of TE 2.20.2, pytorch/ and common/ being folders of its package; the CUDA versions of the rows without a line of
their own are those of TE's installation guide (12.1; Blackwell 12.8).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from te_dynamo.lowering.te.library import EXTENSION
from te_dynamo.lowering.te.library import unavailable as unavailable_library
from te_dynamo.recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Float8RowwiseScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
)

Capability = tuple[int, int]
HOPPER: Capability = (9, 0)  # what a stand-in is that does not say


@dataclass(frozen=True)
class Gate:
    """Where TE computes a recipe, and from which sizes.

    least, below: compute capabilities, from and (None: without end) below; cuda: the least version of CUDA that torch is built
    for; rows, columns: what the sizes of a matrix are multiples of, the summed dimension being its columns (sizes that are not
    are an exception in TE); ask: TE's own function for it; source: where that stands; note: what else there is to know.
    """

    least: Capability
    below: Capability | None
    cuda: tuple[int, int]
    rows: int
    columns: int
    ask: str
    source: str
    note: str = ""


_PER_TENSOR = Gate(
    least=(8, 9),
    below=None,
    cuda=(12, 1),
    rows=8,
    columns=16,
    ask="is_fp8_available",
    source="pytorch/quantization.py:149, pytorch/utils.py:708",
    note="on 8.9 (Ada) with cuBLASLt 12.1.3 or newer; training on 8.9, 9.0 and 12.0 sums over rows too, so these are multiples of 16",
)

GATES: Mapping[type[Recipe], Gate] = {
    DelayedScaling: _PER_TENSOR,
    Float8CurrentScaling: _PER_TENSOR,
    Float8BlockScaling: Gate(
        least=(9, 0),
        below=None,
        cuda=(12, 9),
        rows=8,
        columns=16,
        ask="is_fp8_block_scaling_available",
        source="pytorch/quantization.py:178, common/gemm/cublaslt_gemm.cu:209 and :295",
        note="from 10.0 on TE computes it as MXFP8, which needs scales that are powers of two",
    ),
    MXFP8BlockScaling: Gate(
        least=(10, 0),
        below=(12, 0),
        cuda=(12, 8),
        rows=32,
        columns=32,
        ask="is_mxfp8_available",
        source="pytorch/quantization.py:162, pytorch/csrc/quantizer.cpp:1514 and :1861",
    ),
    NVFP4BlockScaling: Gate(
        least=(10, 0),
        below=None,
        cuda=(12, 8),
        rows=16,
        columns=16,
        ask="is_nvfp4_available",
        source="pytorch/quantization.py:171, pytorch/csrc/quantizer.cpp:1982",
    ),
}

# Recipes that are not among TE's own (common/recipe/__init__.py), as a clause.
NOT_IN_TE: Mapping[type[Recipe], str] = {Float8RowwiseScaling: "Transformer Engine has no recipe with a scale for each row"}


def unavailable_recipe(recipe: Recipe, device: torch.device) -> str | None:
    """Why TE does not compute a recipe on a device, as a clause; None where it does.

    Whether TE is there at all is `library.unavailable`'s to say: without it, this is what a device would allow. A stand-in for
    TE's extension is the device that it says to be (`capability()`, Hopper where it has none). TE keeps its own answers for a
    process: it is asked after the table, which knows one device from another.
    """
    if type(recipe) in NOT_IN_TE:
        return NOT_IN_TE[type(recipe)]
    gate, extension = GATES[type(recipe)], sys.modules.get(EXTENSION)
    if getattr(extension, "__stand_in__", False):
        capability = getattr(extension, "capability", None)
        found = HOPPER if capability is None else capability()
        return refused(gate, found) or _scales_refused(recipe, found)
    if device.type != "cuda":
        return f"Transformer Engine's kernels are for CUDA devices, not {device.type}"
    if torch.version.cuda is None:
        return "Transformer Engine's kernels are for CUDA, and this PyTorch is built without it"
    found = torch.cuda.get_device_capability(device)
    return (
        refused(gate, found)
        or _scales_refused(recipe, found)
        or _too_old(gate, torch.version.cuda)
        or (_asked(gate.ask, device) if unavailable_library(device) is None else None)
    )


def refused(gate: Gate, capability: Capability) -> str | None:
    """Why a gate does not let a compute capability through."""
    if capability < gate.least:
        return f"it needs compute capability {_dotted(gate.least)} or newer, this device has {_dotted(capability)}"
    if gate.below is not None and capability >= gate.below:
        return f"it needs a compute capability below {_dotted(gate.below)}, this device has {_dotted(capability)}"
    return None


def _scales_refused(recipe: Recipe, capability: Capability) -> str | None:
    """common/transpose/quantize_transpose_vector_blockwise.cu:534"""
    if not isinstance(recipe, Float8BlockScaling) or recipe.power_2_scale or capability < (10, 0):
        return None
    return "from compute capability 10.0 on TE computes it as MXFP8, which needs scales that are powers of two (power_2_scale=True)"


def _too_old(gate: Gate, cuda: str) -> str | None:
    found = tuple(int(n) for n in cuda.split(".")[:2])
    return None if found >= gate.cuda else f"it needs CUDA {_dotted(gate.cuda)} or newer, this PyTorch is built for {cuda}"


def _asked(name: str, device: torch.device) -> str | None:
    """TE's own answer on a real device."""
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError) as error:  # a library is missing, or of another version
        return (
            f"transformer_engine cannot be imported: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        )
    ask: Any = getattr(te, name, None)
    if ask is None:
        return None
    with torch.cuda.device(device):
        available, reason = ask(return_reason=True)
    return None if available else f"Transformer Engine says: {str(reason).rstrip('.')}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
