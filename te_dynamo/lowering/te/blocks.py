"""TE's GEMM of operands that have a scale for each block, and the cast that makes them: blocks of 128, and MXFP8's of 32.

A matrix [R, C] has up to two copies in FP8: the row-wise one for GEMMs that sum over C, the column-wise one for those that sum
over R. Each is quantized from high precision with its own scales, both by one kernel. Scales are laid out as the GEMM reads them:

    block of                     128                                         32
    column-wise copy             [C, R]: transposed                          [R, C]
    scale_inv                    float32                                     uint8, the bytes of E8M0
      row-wise                   [C/128, R to 4]                             [R to 128, C/32 to 4]
      column-wise                [R/128, C to 4]                             [R/32 to 4, C to 128]
      square, row-wise           [R/128, C/128 to 4]                         as above: equal for 32 rows
      square, column-wise        [C/128, R/128 to 4]                         as above: equal for 32 columns
    their order                  row by row                                  cuBLAS's: tiles of 128 x 4

(a/b is rounded up, "to b" is rounded up to a multiple; padding is undefined.) So with blocks of 128 the column-wise copy of a matrix
is the row-wise one of its transpose, and every GEMM is TN.

The calls are those of TE 2.20 (pytorch/tensor/float8_blockwise_tensor.py, pytorch/tensor/mxfp8_tensor.py,
pytorch/cpp_extensions/gemm.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from te_dynamo.lowering.te.library import api, running

MX = 32  # MXFP8's block size; the other one is 128


@torch.library.custom_op("te_dynamo::te_block_quantize", mutates_args=())
def te_block_quantize(
    x: Tensor, dtype: torch.dtype, block: int, square: bool, power_of_2: bool, epsilon: float, row_wise: bool, column_wise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [R, C] in high precision -> (data, scale_inv) of the row-wise copy and of the column-wise one, data in `dtype`, FP8.

    One kernel. block: 128 or 32 (R and C are multiples of 32 then); square: a scale for each block x block, not for each 1 x
    block; power_of_2, epsilon: for blocks of 128, whether scales are powers of two, and the least amax. row_wise, column_wise:
    which copies are wanted; the tensors of any other are empty.
    """
    te = api()
    # The kernel of 128 x 128 always writes the row-wise copy.
    usage = {"rowwise": row_wise or (square and block != MX), "columnwise": column_wise}
    with running():
        if block == MX:
            quantizer = te.MXFP8Quantizer(te.dtype[dtype], with_2d_quantization=square, **usage)
            quantizer.optimize_for_gemm = True  # scales in cuBLAS's order: the GEMM needs no kernel to sort them
        else:
            quantizer = te.Float8BlockQuantizer(
                te.dtype[dtype], force_pow_2_scales=power_of_2, amax_epsilon=epsilon, block_scaling_dim=2 if square else 1, **usage
            )
        quantizer.internal = True
        made = te.tex.quantize(x, quantizer)
    rows = (made._rowwise_data, made._rowwise_scale_inv) if row_wise else _absent(x, block)
    columns = (made._columnwise_data, made._columnwise_scale_inv) if column_wise else _absent(x, block)
    return rows[0].view(dtype), rows[1], columns[0].view(dtype), columns[1]


@te_block_quantize.register_fake
def _(x, dtype, block, square, power_of_2, epsilon, row_wise, column_wise):
    rows, columns = x.shape
    across = (rows, columns) if block == MX else (columns, rows)
    scales = _scale_dtype(block)
    plain = (x.new_empty(rows, columns, dtype=dtype), x.new_empty(_scale_shape(rows, columns, block, square, False), dtype=scales))
    other = (x.new_empty(across, dtype=dtype), x.new_empty(_scale_shape(rows, columns, block, square, True), dtype=scales))
    nothing = [(data.view(dtype), scale) for data, scale in (_absent(x, block), _absent(x, block))]
    return *(plain if row_wise else nothing[0]), *(other if column_wise else nothing[1])


def _absent(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((0, 0), dtype=torch.uint8), x.new_empty((0, 0), dtype=_scale_dtype(block))


def _scale_dtype(block: int) -> torch.dtype:
    return torch.uint8 if block == MX else torch.float32


def _scale_shape(rows: Any, columns: Any, block: int, square: bool, across: bool) -> tuple[Any, Any]:
    """The shape of the scale_inv of a copy of a matrix [rows, columns]; TE's `get_scale_shape`."""
    if block == MX:
        if across:
            return _up(_count(rows, block), 4), _up(columns, 128)
        return _up(rows, 128), _up(_count(columns, block), 4)
    if across:
        rows, columns = columns, rows
    return (_count(rows, block), _up(_count(columns, block), 4)) if square else (_count(columns, block), _up(rows, 4))


def _count(size: Any, block: int) -> Any:
    return (size + block - 1) // block


def _up(size: Any, multiple: int) -> Any:
    return _count(size, multiple) * multiple


@torch.library.custom_op("te_dynamo::te_block_gemm", mutates_args=())
def te_block_gemm(
    a: Tensor,
    b: Tensor,
    a_inv: Tensor,
    b_inv: Tensor,
    a_square: bool,
    b_square: bool,
    layout: str,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """cuBLAS's GEMM, one kernel, of two copies and their scale_inv as `te_block_quantize` gives them -> [M, N] in out_dtype.

    layout, as TE spells it, b being its first operand:

        TN      a [M, C], b [N, C]      a @ b.T         blocks of 128: always
        NN      a [M, C], b [C, N]      a @ b           b column-wise, of MXFP8
        NT      a [C, M], b [C, N]      a.T @ b         both column-wise, of MXFP8

    a_square, b_square: how they were quantized; not both, for blocks of 128. bias [N] in 16 bits, added in the epilogue. fast:
    accumulates with fewer bits (TE's use_split_accumulator=False), which blocks of 128 never do.
    """
    te = api()
    with running():
        first = _operand(te, b, b_inv, b_square, layout[0] == "T", out_dtype)
        second = _operand(te, a, a_inv, a_square, layout[1] == "N", out_dtype)
        y, *_ = te.general_gemm(first, second, out_dtype=out_dtype, layout=layout, bias=bias, use_split_accumulator=not fast)
    return y


@te_block_gemm.register_fake
def _(a, b, a_inv, b_inv, a_square, b_square, layout, bias, out_dtype, fast):
    m, _, n = _sizes(a.shape, b.shape, layout)
    return a.new_empty(m, n, dtype=out_dtype)


@register_flop_formula(torch.ops.te_dynamo.te_block_gemm)
def _(a_shape, b_shape, a_inv, b_inv, a_square, b_square, layout, *args, out_shape=None, **kwargs) -> int:
    m, c, n = _sizes(a_shape, b_shape, layout)
    return 2 * m * c * n


def _sizes(a_shape: Any, b_shape: Any, layout: str) -> tuple[Any, Any, Any]:
    """(M, C, N)"""
    c, m = a_shape if layout[1] == "T" else reversed(a_shape)
    return m, c, b_shape[0] if layout[0] == "T" else b_shape[1]


def _operand(te: Any, data: Tensor, scale_inv: Tensor, square: bool, row_wise: bool, dtype: torch.dtype) -> Any:
    """A TE tensor that holds only this copy."""
    copy, other = ("rowwise", "columnwise") if row_wise else ("columnwise", "rowwise")
    arguments: dict[str, Any] = {"fp8_dtype": te.dtype[data.dtype], "quantizer": None, "fake_dtype": dtype}
    arguments |= {f"{copy}_data": data.view(torch.uint8), f"{copy}_scale_inv": scale_inv}
    arguments |= {f"{other}_data": None, f"{other}_scale_inv": None}
    if scale_inv.dtype == _scale_dtype(MX):
        return te.MXFP8Storage(**arguments, with_gemm_swizzled_scales=True)
    return te.BlockStorage(**arguments, is_2D_scaled=square)
