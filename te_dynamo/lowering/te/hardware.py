"""Which recipes Transformer Engine supports on which GPU: a table, and TE's own answer where it can be asked.

Sources are lines of TE 2.20.2 below its folders pytorch/ and common/. CUDA versions without a line of their own are those of
TE's installation guide (12.1; 12.8 for Blackwell).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version

from te_dynamo.lowering.devices import ADA, BLACKWELL, BLACKWELL_RTX, HOPPER, Capability, dotted
from te_dynamo.lowering.te.library import capability, first_line, stand_in
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


@dataclass(frozen=True)
class Gate:
    """What TE requires for a recipe.

    least, below: compute capabilities from `least` up to, not including, `below` (None: no limit); cuda: the oldest CUDA that
    torch may be built for; rows, columns: what a matrix's sizes must be multiples of (columns: the summed dimension), or TE
    raises; ask: TE's own function for it; source: where TE says so; note: further conditions, in words.
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
    least=ADA,
    below=None,
    cuda=(12, 1),
    rows=8,
    columns=16,
    ask="is_fp8_available",
    source="pytorch/quantization.py:149, pytorch/utils.py:708",
    note="on 8.9 (Ada) with cuBLASLt 12.1.3 or newer; training on 8.9, 9.0 and 12.0 also sums over rows: then multiples of 16 too",
)

GATES: Mapping[type[Recipe], Gate] = {
    DelayedScaling: _PER_TENSOR,
    Float8CurrentScaling: _PER_TENSOR,
    Float8BlockScaling: Gate(
        least=HOPPER,
        below=None,
        cuda=(12, 9),
        rows=8,
        columns=16,
        ask="is_fp8_block_scaling_available",
        source="pytorch/quantization.py:178, common/gemm/cublaslt_gemm.cu:209 and :295",
        note="from 10.0 on TE computes it as MXFP8, which needs scales that are powers of two",
    ),
    MXFP8BlockScaling: Gate(
        least=BLACKWELL,
        below=BLACKWELL_RTX,
        cuda=(12, 8),
        rows=32,
        columns=32,
        ask="is_mxfp8_available",
        source="pytorch/quantization.py:162, pytorch/csrc/quantizer.cpp:1514 and :1861",
    ),
    NVFP4BlockScaling: Gate(
        least=BLACKWELL,
        below=None,
        cuda=(12, 8),
        rows=16,
        columns=16,
        ask="is_nvfp4_available",
        source="pytorch/quantization.py:171, pytorch/csrc/quantizer.cpp:1982",
    ),
}

# Recipes that TE does not have (common/recipe/__init__.py): why, as a clause.
NOT_IN_TE: Mapping[type[Recipe], str] = {Float8RowwiseScaling: "Transformer Engine has no row-wise recipe"}


def unavailable_recipe(recipe: Recipe, device: torch.device) -> str | None:
    """Why TE does not support a recipe on a device, as a clause; None if it does.

    This is what the device allows, whether or not TE is installed (`library.unavailable` checks that). TE is asked last: it
    caches one answer per process, whereas the table tells devices apart. A stand-in for TE's extension has the compute
    capability that it pretends, and no CUDA version.
    """
    if type(recipe) in NOT_IN_TE:
        return NOT_IN_TE[type(recipe)]
    gate, real = GATES[type(recipe)], stand_in() is None
    if real and device.type != "cuda":
        return f"Transformer Engine's kernels are for CUDA devices, not {device.type}"
    if real and torch.version.cuda is None:
        return "Transformer Engine's kernels are for CUDA, and this PyTorch is built without it"
    found = capability(device)
    reason = refused(gate, found) or _scales_refused(recipe, found)
    if reason is None and real:
        reason = _cuda_too_old(gate) or (_ask(gate.ask, device) if unavailable_library(device) is None else None)
    return reason


def refused(gate: Gate, found: Capability) -> str | None:
    """Why a gate refuses a compute capability."""
    if found < gate.least:
        return f"it needs compute capability {dotted(gate.least)} or newer, this device has {dotted(found)}"
    if gate.below is not None and found >= gate.below:
        return f"it needs a compute capability below {dotted(gate.below)}, this device has {dotted(found)}"
    return None


def _scales_refused(recipe: Recipe, found: Capability) -> str | None:
    """common/transpose/quantize_transpose_vector_blockwise.cu:534"""
    if not isinstance(recipe, Float8BlockScaling) or recipe.power_2_scale or found < BLACKWELL:
        return None
    return "from compute capability 10.0 on TE computes it as MXFP8, which needs scales that are powers of two (power_2_scale=True)"


def _cuda_too_old(gate: Gate) -> str | None:
    if Version(str(torch.version.cuda)).release >= gate.cuda:
        return None
    return f"it needs CUDA {dotted(gate.cuda)} or newer, this PyTorch is built for {torch.version.cuda}"


def _ask(name: str, device: torch.device) -> str | None:
    """TE's own answer, on a real device."""
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError) as error:  # a library is missing, or of another version
        return f"transformer_engine cannot be imported: {first_line(error)}"
    ask: Any = getattr(te, name, None)
    if ask is None:
        return None
    with torch.cuda.device(device):
        available, reason = ask(return_reason=True)
    return None if available else f"Transformer Engine says: {str(reason).rstrip('.')}"
