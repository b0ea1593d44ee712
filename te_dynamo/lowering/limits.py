"""What every FP8 linear here is limited to."""

from __future__ import annotations

import torch

from te_dynamo.lowering.registry import Case

SIXTEEN_BITS = (torch.bfloat16, torch.float16)  # what fused attention kernels take
DTYPES = (torch.float32, *SIXTEEN_BITS)
ALIGNMENT_ON_GPU = 16  # FP8 GEMM on NVIDIA: K and N; the token count is padded inside


def unsupported_dtype(dtype: torch.dtype) -> str | None:
    return None if dtype in DTYPES else f"dtype {str(dtype).removeprefix('torch.')} has no FP8 path (float32, bfloat16, float16 do)"


def unaligned(case: Case, multiple: int = ALIGNMENT_ON_GPU, what: str = "FP8 GEMMs on a GPU") -> str | None:
    """Why a GPU cannot multiply by the weights [N, K] of a site in FP8."""
    weights = case.inputs["weights"] if "weights" in case.inputs else [case.inputs["weight"]]
    for n, k in (w.shape[-2:] for w in weights):
        for name, size in (("in_features", k), ("out_features", n)):
            if size % multiple:
                return f"{name} {size} is not a multiple of {multiple}, which {what} need"
    return None
