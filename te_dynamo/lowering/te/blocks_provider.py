"""The provider of the recipes that TE computes with a scale for each block: blocks of 128, and MXFP8.

What TE's own linear does (2.20.2, pytorch/module/linear.py) is done here, kernel for kernel. An input is quantised once, for
forward and for wgrad, which reads its column-wise copy: that is saved, nothing else of it. So is a weight, for forward and for
dgrad, and its column-wise copy is saved too: a byte an element from forward to backward, instead of another kernel that reads
the weight. A gradient is quantised once, for dgrad and for wgrad. Copies that nobody asks for are not made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

import te_dynamo.lowering.te.blocks  # noqa: F401  (registers its operators)
from te_dynamo.lowering.granularity import MX, Blocks
from te_dynamo.lowering.limits import unaligned, unsupported_dtype
from te_dynamo.lowering.linears import Layout, join_biases, pad_rows
from te_dynamo.lowering.stateless import operands_of
from te_dynamo.lowering.te import library
from te_dynamo.lowering.te.hardware import GATES, unavailable_recipe
from te_dynamo.recipe import Float8BlockScaling, Float8RowwiseScaling, MXFP8BlockScaling, NVFP4BlockScaling, Recipe

BLOCKWISE = (Float8BlockScaling, MXFP8BlockScaling)
# Why TE does not compute the other recipes that are finer than a tensor, as a clause.
NO_TE: Mapping[type[Recipe], str] = {
    Float8RowwiseScaling: "Transformer Engine has no row-wise recipe",
    NVFP4BlockScaling: "Transformer Engine's NVFP4 is not connected",
}


class Copy(NamedTuple):
    """A matrix in FP8, as GEMMs read it along one of its dimensions (see `blocks`)."""

    data: Tensor
    scale_inv: Tensor


class Blockwise:
    """Two operators, a kernel each, around which Inductor pads and joins. A site has neither scales nor amaxes: those that are
    given are not read, those that are returned are empty."""

    name = "te"
    opaque = False

    def __init__(self, recipe: Recipe) -> None:
        """recipe: one of `BLOCKWISE`."""
        self.recipe = recipe
        operands = operands_of(recipe)
        self.x, self.weight, self.gradient = operands.forward.a, operands.forward.b, operands.dgrad.a
        # Also what tokens are padded to: wgrad sums over them.
        self.multiple = GATES[type(recipe)].columns
        self.mx = isinstance(recipe, MXFP8BlockScaling)

    def unavailable(self, device: torch.device) -> str | None:
        return library.unavailable(device) or unavailable_recipe(self.recipe, device)

    def unsupported_linear(self, device: torch.device, k: Any, n: Any, dtype: torch.dtype) -> str | None:
        gemms = "MXFP8 GEMMs" if self.mx else "FP8 GEMMs on a GPU"
        return unaligned(k, n, self.multiple, gemms) or unsupported_dtype(dtype)

    def linears_forward(self, x, weights, biases, scales, layout, out_dtype, recipe, peers, first):
        x_rows, x_columns = self._quantize(_rows(x), self.x, True, any(w.requires_grad for w in weights))
        ys, kept = [], []
        for block in layout.blocks():
            w_rows, w_columns = self._quantize(layout.join([weights[i] for i in block]), self.weight, True, x.requires_grad)
            bias = join_biases([biases[i] for i in block], [layout.sizes[i] for i in block], layout, out_dtype, x.device)
            ys.append(self._forward(x, x_rows, w_rows, bias, out_dtype))
            kept += w_columns
        return ys, x_columns.data, [x_columns.scale_inv, *kept], x.new_empty(0, dtype=torch.float32)

    def linears_backward(self, grads, x8, weights, used, scales, layout, needs, x_dtype, recipe, peers, first):
        x_scale_inv, *kept = used
        dws: list[Tensor | None] = [None] * len(weights)
        dbs: list[Tensor | None] = [None] * len(weights)
        parts: list[Tensor] = []
        part_dtype = x_dtype if len(grads) == 1 else torch.float32  # several are summed before the rounding
        for number, (block, grad) in enumerate(zip(layout.blocks(), grads, strict=True)):
            g, wanted = _rows(grad), [i for i in block if needs.weights[i]]
            g_rows, g_columns = self._quantize(g, self.gradient, needs.x, bool(wanted))
            if needs.x:
                w_columns = Copy(*kept[2 * number : 2 * number + 2])
                part = self._gemm(g_rows, w_columns, self.gradient, self.weight, "NN", part_dtype)
                parts.append(part[: g.shape[0]])
            if wanted:
                dtypes = {weights[i].dtype for i in wanted}
                dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
                whole = self._gemm(g_columns, Copy(x8, x_scale_inv), self.gradient, self.x, "NT", dtype)
                for i in wanted:
                    dws[i] = layout.rows(whole, block.index(i), len(block)).to(weights[i].dtype)
            for member, i in enumerate(block):
                if needs.biases[i]:
                    dbs[i] = layout.rows(g.t(), member, len(block)).sum(-1, dtype=torch.float32)
        dx = reduce(torch.add, parts).to(x_dtype) if parts else None
        return (
            (None if dx is None else dx.reshape(*grads[0].shape[:-1], dx.shape[-1])),
            dws,
            dbs,
            grads[0].new_empty(0, dtype=torch.float32),
        )

    def linears_inference(self, x, w8s, w_invs, biases, scales, layout, out_dtype, recipe, peers, first):
        x_rows, _ = self._quantize(_rows(x), self.x, True, False)
        ys = []
        for block, w8, w_inv in zip(layout.blocks(), w8s, w_invs, strict=True):
            bias = join_biases([biases[i] for i in block], [layout.sizes[i] for i in block], layout, out_dtype, x.device)
            ys.append(self._forward(x, x_rows, Copy(w8, w_inv), bias, out_dtype))
        return ys

    def quantize_weights(self, weights: Sequence[Tensor], layout: Layout, recipe: str) -> list[tuple[Tensor, Tensor]]:
        """The row-wise copy of the weight of each GEMM: (data [N, K], scale_inv)."""
        joined = [layout.join([weights[i].detach() for i in block]) for block in layout.blocks()]
        return [tuple(self._quantize(w, self.weight, True, False)[0]) for w in joined]

    def _forward(self, x: Tensor, x_rows: Copy, w_rows: Copy, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x [..., K], of which x_rows is the copy, padded -> [..., N]"""
        y = self._gemm(x_rows, w_rows, self.x, self.weight, "TN", out_dtype, bias, fast=self.mx)
        return y[: _rows(x).shape[0]].reshape(*x.shape[:-1], y.shape[-1])

    def _quantize(self, t: Tensor, how: Blocks | MX, row_wise: bool, column_wise: bool) -> tuple[Copy, Copy]:
        """t [R, C], padded to [R to `multiple`, C]; a copy that is not wanted is empty."""
        scales = (how.power_of_2, how.epsilon) if isinstance(how, Blocks) else (True, 0.0)
        t = pad_rows(t, self.multiple)
        rows, rows_inv, columns, columns_inv = torch.ops.te_dynamo.te_block_quantize(
            t, how.dtype, how.columns, how.rows != 1, *scales, row_wise, column_wise
        )
        return Copy(rows, rows_inv), Copy(columns, columns_inv)

    def _gemm(
        self,
        a: Copy,
        b: Copy,
        how_a: Blocks | MX,
        how_b: Blocks | MX,
        layout: str,
        out_dtype: torch.dtype,
        bias: Tensor | None = None,
        fast: bool = False,
    ) -> Tensor:
        """layout: of matrices that are not transposed; fast: as TE does, in forward with MXFP8. A float32 bias is added after the
        GEMM: cuBLAS has none, and TE rounds it to bf16."""
        in_epilogue = bias is not None and out_dtype != torch.float32
        y = torch.ops.te_dynamo.te_block_gemm(
            a.data,
            b.data,
            a.scale_inv,
            b.scale_inv,
            how_a.rows != 1,
            how_b.rows != 1,
            layout if self.mx else "TN",
            bias if in_epilogue else None,
            out_dtype,
            fast,
        )
        return y if bias is None or in_epilogue else y + bias


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])
