"""A matrix that backward reads, kept in E4M3 with a scale for each block of a row: in plain torch, which Inductor fuses on a GPU, and as
operators, in C++ on a CPU (`cpu/kept.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from te_dynamo.lowering.cpu.library import DTYPES, library
from te_dynamo.lowering.fp8 import E4M3, FP8_MAX, LEAST_AMAX

SIZES = (128, 64)  # of a block
aten = torch.ops.aten


def in_blocks(t: Tensor) -> Tensor:
    """[T, N], of any row stride -> [T, blocks, size]."""
    size = size_of_blocks(t.shape[-1])
    return aten.view.default(t, [-1, t.shape[-1] // size, size])


def size_of_blocks(columns: int) -> int:
    """The largest of `SIZES` that divides a row, or the whole row."""
    return next((size for size in SIZES if columns and columns % size == 0), columns)


def pack(v: Tensor) -> tuple[Tensor, Tensor]:
    """v [T, N] -> E4M3 [T, blocks, size], scale_inv float32 [T, blocks, 1]. NaN stays NaN and counts towards no amax; a block with an
    infinity becomes NaN."""
    blocks = in_blocks(v)
    magnitude = blocks.abs().float()
    amax = torch.where(magnitude.isnan(), 0.0, magnitude).amax(-1, keepdim=True)
    scale = torch.where(amax > LEAST_AMAX, amax.new_full((), FP8_MAX[E4M3]) / amax, 1.0)  # as in `fp8.scale_of`
    return (blocks.float() * scale).to(E4M3), amax / FP8_MAX[E4M3]


def unpack(data: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`: [T, N]."""
    return aten.view.default((data.float() * scale_inv).to(dtype), [-1, data.shape[1] * data.shape[2]])


# On a CPU, as operators. Not by `custom_op`, as in `lowering.opaque`.
torch.library.define("te_dynamo::pack_kept", "(Tensor v) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define(
    "te_dynamo::unpack_kept", "(Tensor data, Tensor scale_inv, ScalarType dtype) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.impl("te_dynamo::pack_kept", "default")
def _pack(v: Tensor) -> tuple[Tensor, Tensor]:
    if (kernels := library()) is None:
        return pack(v)
    v = v if v.stride(1) == 1 else v.contiguous()
    data, scale_inv = _packed(v)
    rows, blocks, size = data.shape
    kernels.te_pack(
        DTYPES[v.dtype], rows, blocks * size, size, v.data_ptr(), v.stride(0), LEAST_AMAX, data.data_ptr(), scale_inv.data_ptr()
    )
    return data, scale_inv


@torch.library.register_fake("te_dynamo::pack_kept")
def _packed(v: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = v.shape
    size = size_of_blocks(columns)
    return v.new_empty((rows, columns // size, size), dtype=E4M3), v.new_empty((rows, columns // size, 1), dtype=torch.float32)


@torch.library.impl("te_dynamo::unpack_kept", "default")
def _unpack(data: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    if (kernels := library()) is None:
        return unpack(data, scale_inv, dtype)
    v, (rows, blocks, size) = _unpacked(data, scale_inv, dtype), data.shape
    given = (data.contiguous(), scale_inv.contiguous(), v)
    kernels.te_unpack(DTYPES[dtype], rows * blocks, size, *(t.data_ptr() for t in given))
    return v


@torch.library.register_fake("te_dynamo::unpack_kept")
def _unpacked(data: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    return data.new_empty((data.shape[0], data.shape[1] * data.shape[2]), dtype=dtype)
