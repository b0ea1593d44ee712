"""The kernels for a CPU: C++ that Inductor's compiler compiles once, called through ctypes."""

from __future__ import annotations

import warnings
from ctypes import CDLL, POINTER, Structure, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

SOURCES = ("fp8.h", "image.h", "gemm.h", "gemv.h", "linears.cpp", "kept.cpp")
ANY, DOT_PRODUCTS, TILES = range(3)  # which instructions multiply


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as the C++ numbers them


class LinearsStruct(Structure):
    """`Linears` of linears.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("count", "in_features", "interleave", "merged", "x_dtype", "out_dtype")),
        *((name, c_int64) for name in ("gradient_is_e5m2", "saturates_infinite", "power_of_2", "agrees")),
        *((name, c_float) for name in ("epsilon", "top_input", "top_weight", "top_gradient")),
        *((name, POINTER(c_int64)) for name in ("sizes", "weight_dtypes", "bias_dtypes")),
    ]


@cache
def library() -> CDLL | None:
    """None if it cannot be compiled."""
    try:
        return compiled()
    except Exception as error:  # Inductor raises its own where it finds no compiler
        warnings.warn(f"te_fp8: the kernels for a CPU could not be compiled, torch's are used, which are slow: {error}", stacklevel=2)
        return None


def compiled() -> CDLL:
    """For the processor at hand, or the one that Inductor is told to compile for."""
    from torch._inductor.codecache import CppCodeCache

    source = "".join((Path(__file__).parent / name).read_text() for name in SOURCES)
    found: CDLL = CppCodeCache.load(source, extra_flags=("-ffp-contract=fast",))
    pointer, number = c_void_p, c_int64
    found.te_quantize.argtypes = [pointer, number, *[pointer] * 3]
    found.te_quantize.restype = None
    found.te_pack.argtypes = [*[number] * 4, pointer, number, c_float, *[pointer] * 2]
    found.te_unpack.argtypes = [*[number] * 3, *[pointer] * 3]
    found.te_pack.restype = found.te_unpack.restype = None
    found.te_forward.argtypes = [pointer, number, pointer, number, *[pointer] * 8]
    found.te_backward.argtypes = [pointer, number, *[pointer] * 10]
    found.te_use_instructions.argtypes = [number]
    for function in (found.te_use_instructions, found.te_forward, found.te_backward):
        function.restype = number
    found.te_use_instructions(TILES if torch.cpu._init_amx() else DOT_PRODUCTS)
    return found
