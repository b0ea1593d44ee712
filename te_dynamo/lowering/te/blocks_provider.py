"""The provider of the recipes that TE computes with a scale for each block: blocks of 128, and MXFP8.

What TE's own linear does (2.20.2, pytorch/module/linear.py) is done here, kernel for kernel. An input is quantized once, for
forward and for wgrad, which reads its column-wise copy: that is saved, nothing else of it. So is a weight, for forward and for
dgrad, and its column-wise copy is saved too: a byte an element from forward to backward, instead of another kernel that reads
the weight. A gradient is quantized once, for dgrad and for wgrad. Copies that nobody asks for are not made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

import te_dynamo.lowering.te.blocks  # noqa: F401  (registers its operators)
from te_dynamo.lowering.granularity import MX, Blocks, Quantized
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
    """A matrix in FP8 as a GEMM reads it along one of its dimensions (see `blocks`)."""

    data: Tensor
    scale_inv: Tensor
    square: bool


class Blockwise:
    """Two operators, a kernel each; Inductor pads and joins what they read. A site has neither scales nor amaxes: those that are
    given are not read, those that are returned are empty."""

    name = "te"
    opaque = False
    keeps_weights = False

    def __init__(self, recipe: Recipe) -> None:
        """recipe: one of `BLOCKWISE`."""
        self.recipe = recipe
        operands = operands_of(recipe)
        self.x, self.weight, self.gradient = operands.forward.a, operands.forward.b, operands.dgrad.a
        self.multiple = GATES[type(recipe)].columns  # of K, of N and, since wgrad sums over them, of the tokens
        self.mx = isinstance(recipe, MXFP8BlockScaling)

    def unavailable(self, device: torch.device) -> str | None:
        return library.unavailable(device) or unavailable_recipe(self.recipe, device)

    def unsupported_linear(self, device: torch.device, k: Any, n: Any, dtype: torch.dtype) -> str | None:
        gemms = "MXFP8 GEMMs" if self.mx else "FP8 GEMMs on a GPU"
        return unaligned(k, n, self.multiple, gemms) or unsupported_dtype(dtype)

    def linears_forward(self, x, weights, biases, scales, layout, out_dtype, recipe, peers, first):
        x_rows, x_columns = self._quantize(_matrix(x), self.x, column_wise=any(w.requires_grad for w in weights))
        ws, kept = [], [x_columns.scale_inv]
        for block in layout.blocks():
            w_rows, w_columns = self._quantize(layout.join([weights[i] for i in block]), self.weight, column_wise=x.requires_grad)
            ws.append(w_rows)
            kept += [w_columns.data, w_columns.scale_inv]
        return self._outputs(x, x_rows, ws, biases, layout, out_dtype), x_columns.data, kept, x.new_empty(0, dtype=torch.float32)

    def linears_backward(self, grads, x8, weights, used, scales, layout, needs, x_dtype, recipe, peers, first):
        x_scale_inv, *kept = used
        parts: list[Tensor] = []
        part_dtype = x_dtype if len(grads) == 1 else torch.float32  # several are summed before the rounding
        dws: list[Tensor | None] = [None] * len(weights)
        dbs: list[Tensor | None] = [None] * len(weights)
        for block, grad, w8, w_inv in zip(layout.blocks(), grads, kept[::2], kept[1::2], strict=True):
            g, wanted = _matrix(grad), [i for i in block if needs.weights[i]]
            g_rows, g_columns = self._quantize(g, self.gradient, row_wise=needs.x, column_wise=bool(wanted))
            if needs.x:
                w_columns = Copy(w8, w_inv, _square(self.weight))
                parts.append(self._gemm(g_rows, w_columns, "NN", part_dtype)[: g.shape[0]])
            if wanted:
                dtypes = {weights[i].dtype for i in wanted}
                x_columns = Copy(x8, x_scale_inv, _square(self.x))
                whole = self._gemm(g_columns, x_columns, "NT", dtypes.pop() if len(dtypes) == 1 else torch.float32)
                for i in wanted:
                    dws[i] = layout.rows(whole, block.index(i), len(block)).to(weights[i].dtype)
            for member, i in enumerate(block):
                if needs.biases[i]:
                    dbs[i] = layout.rows(g.t(), member, len(block)).sum(-1, dtype=torch.float32)
        dx = reduce(torch.add, parts).to(x_dtype).reshape(*grads[0].shape[:-1], weights[0].shape[1]) if parts else None
        return dx, dws, dbs, grads[0].new_empty(0, dtype=torch.float32)

    def linears_inference(self, x, w8s, w_invs, biases, scales, layout, out_dtype, recipe, peers, first):
        x_rows, _ = self._quantize(_matrix(x), self.x)
        ws = [Copy(w8, w_inv, _square(self.weight)) for w8, w_inv in zip(w8s, w_invs, strict=True)]
        return self._outputs(x, x_rows, ws, biases, layout, out_dtype)

    def quantize_weights(self, weights: Sequence[Tensor], layout: Layout, recipe: str) -> list[Quantized]:
        """The row-wise copy of the weight of each GEMM: data [N, K], and its scale_inv."""
        joined = [layout.join([weights[i].detach() for i in block]) for block in layout.blocks()]
        copies = [self._quantize(w, self.weight)[0] for w in joined]
        return [Quantized(w.data, w.scale_inv) for w in copies]

    def _outputs(
        self, x: Tensor, x_rows: Copy, ws: Sequence[Copy], biases: Sequence[Tensor | None], layout: Layout, out_dtype: torch.dtype
    ) -> list[Tensor]:
        """x [..., K], its copy, and that of the weight of each GEMM -> [..., N] of each."""
        ys = []
        for block, w_rows in zip(layout.blocks(), ws, strict=True):
            bias = join_biases([biases[i] for i in block], [layout.sizes[i] for i in block], layout, out_dtype, x.device)
            # cuBLAS adds no float32 bias, and TE rounds it to bf16: it is added after the GEMM.
            in_epilogue = bias is not None and out_dtype != torch.float32
            y = self._gemm(x_rows, w_rows, "TN", out_dtype, bias if in_epilogue else None, fast=self.mx)  # as TE does
            y = y[: _matrix(x).shape[0]].reshape(*x.shape[:-1], y.shape[-1])
            ys.append(y if bias is None or in_epilogue else y + bias)
        return ys

    def _quantize(self, t: Tensor, how: Blocks | MX, *, row_wise: bool = True, column_wise: bool = False) -> tuple[Copy, Copy]:
        """t [R, C], its rows padded to `multiple` -> its row-wise copy and its column-wise one; one that is not wanted is empty."""
        power_of_2, epsilon = (how.power_of_2, how.epsilon) if isinstance(how, Blocks) else (True, 0.0)
        rows, rows_inv, columns, columns_inv = torch.ops.te_dynamo.te_block_quantize(
            pad_rows(t, self.multiple), how.dtype, how.columns, _square(how), power_of_2, epsilon, row_wise, column_wise
        )
        return Copy(rows, rows_inv, _square(how)), Copy(columns, columns_inv, _square(how))

    def _gemm(self, a: Copy, b: Copy, layout: str, out_dtype: torch.dtype, bias: Tensor | None = None, fast: bool = False) -> Tensor:
        """layout: what it would be of the matrices themselves. Of blocks of 128 column-wise copies lie transposed."""
        return torch.ops.te_dynamo.te_block_gemm(
            a.data, b.data, a.scale_inv, b.scale_inv, a.square, b.square, layout if self.mx else "TN", bias, out_dtype, fast
        )


def _square(how: Blocks | MX) -> bool:
    return how.rows != 1


def _matrix(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])
