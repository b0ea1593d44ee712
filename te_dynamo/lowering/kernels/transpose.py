"""The transposed copy of an FP8 matrix, as a separate kernel.

Inductor would write this copy in the kernel that computes the matrix: with scattered stores, if that is a row reduction (for the amax).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

BLOCK = 128


@torch.library.custom_op("te_dynamo::transpose", mutates_args=())
def transpose(x: Tensor) -> Tensor:
    """x: [M, N] of a one-byte dtype, contiguous -> [N, M], contiguous."""
    if x.device.type != "cuda":
        return x.t().clone(memory_format=torch.contiguous_format)
    return launch(x)


@transpose.register_fake
def _(x):
    return x.new_empty(x.shape[1], x.shape[0])


def launch(x: Tensor) -> Tensor:
    x = x.contiguous()
    rows, columns = x.shape
    out = x.new_empty(columns, rows)
    if x.numel():
        blocks = -(-rows // BLOCK) * -(-columns // BLOCK)
        _kernel()[(blocks,)](x.view(torch.uint8), out.view(torch.uint8), rows, columns, BLOCK, num_warps=8)
    return out


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def transpose_kernel(source, target, rows, columns, BLOCK: tl.constexpr):
        block = tl.program_id(0).to(tl.int64)
        across = tl.cdiv(columns, BLOCK)
        row = block // across * BLOCK + tl.arange(0, BLOCK)
        column = block % across * BLOCK + tl.arange(0, BLOCK)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        values = tl.load(source + row[:, None] * columns + column[None, :], mask=inside)
        tl.store(target + column[:, None] * rows + row[None, :], tl.trans(values), mask=tl.trans(inside))

    return transpose_kernel
