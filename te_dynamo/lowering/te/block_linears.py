"""Linears for the recipes that TE computes with one scale per block: blocks of 128, and MXFP8.

This does what TE's own linear does (2.20.2, pytorch/module/linear.py), kernel for kernel. An input is quantized once, for forward and
for wgrad, which reads its column-wise copy; nothing else of the input is saved. A weight is quantized once, for forward and for dgrad.
Its column-wise copy is saved too, a byte per element from forward to backward, which saves a kernel that reads the weight again; unless
backward is to remake it (`Call.remakes`). A gradient is quantized once, for dgrad and for wgrad. Copies that nothing reads are not made.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

import te_dynamo.lowering.te.blocks  # noqa: F401  (registers its operators)
from te_dynamo.ir.linear import GemmRows
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.fine_grained import operands_of
from te_dynamo.lowering.granularity import MX, Blocks
from te_dynamo.lowering.limits import unaligned, unsupported_dtype
from te_dynamo.lowering.per_tensor import matrix, pad_rows
from te_dynamo.lowering.quantized import Quantized, Scales
from te_dynamo.lowering.registry import Backward, Case, Forward, Implementation, Needs, implements, missing
from te_dynamo.lowering.te.hardware import GATES, NOT_IN_TE, unavailable_recipe
from te_dynamo.recipe import Float8BlockScaling, MXFP8BlockScaling, NVFP4BlockScaling, Recipe

missing(
    "linears",
    "te",
    {
        **NOT_IN_TE,
        NVFP4BlockScaling: "Transformer Engine's NVFP4 is not connected",
    },
)


class Copy(NamedTuple):
    """A matrix in FP8 as a GEMM reads it along one of its dimensions (see `blocks`)."""

    data: Tensor
    scale_inv: Tensor
    square: bool


@implements("linears", provider="te", recipes=(Float8BlockScaling, MXFP8BlockScaling))
class BlockLinears(Implementation):
    """Two operators, one kernel each; Inductor pads and joins their inputs. A site has neither scales nor amaxes."""

    cached = frozenset({"inference"})

    def backward_reads(self, call: Call, needs: Needs) -> tuple[str, ...]:
        return ("weights",) if "weights" in call.remakes else ()

    def unavailable(self, recipe: Recipe | None, device: torch.device) -> str | None:
        assert recipe is not None
        return unavailable_recipe(recipe, device)

    def unsupported(self, case: Case) -> str | None:
        gemms = "MXFP8 GEMMs" if isinstance(case.recipe, MXFP8BlockScaling) else "FP8 GEMMs on a GPU"
        multiple = GATES[type(case.recipe)].columns
        return unaligned(case, multiple, gemms) or unsupported_dtype(case.attributes["out_dtype"])

    def quantize_weights(self, call: Call, weights: Sequence[Tensor]) -> list[Quantized]:
        """The row-wise copy of the weight of each GEMM: data [N, K], and its scale_inv."""
        kernels, rows = _Kernels(call.scaling), GemmRows.of(call.attributes)
        copies = [kernels.quantize(rows.join([weights[i].detach() for i in g]), kernels.weight)[0] for g in rows.gemms()]
        return [Quantized(c.data, c.scale_inv) for c in copies]

    def forward(self, call: Call, inputs: Sequence[Any], scales: Scales, needs: Needs) -> Forward:
        kernels, rows, dtype = _Kernels(call.scaling), GemmRows.of(call.attributes), call["out_dtype"]
        (x, weights, biases), (needs_x, needs_w, _) = inputs, needs
        flat = matrix(x)
        x_rows, x_columns = kernels.quantize(kernels.visible(flat), kernels.x, column_wise=any(needs_w))
        outputs, saved = [], [Quantized(x_columns.data, x_columns.scale_inv)]
        for number, gemm in enumerate(rows.gemms()):
            if call.cached:
                w_rows = Copy(weights[number].data, weights[number].scale_inv, _square(kernels.weight))
            else:
                kept = needs_x and "weights" not in call.remakes
                w_rows, w_columns = kernels.quantize(rows.join([weights[i] for i in gemm]), kernels.weight, column_wise=kept)
                saved.append(Quantized(w_columns.data, w_columns.scale_inv))
            bias = rows.join_biases(biases, gemm, dtype, x)
            # cuBLAS adds no float32 bias, and TE rounds it to bf16: it is added after the GEMM.
            in_epilogue = bias is not None and dtype != torch.float32
            y = kernels.gemm(x_rows, w_rows, "TN", dtype, bias if in_epilogue else None, fast=kernels.mx)  # as TE does
            y = y[: flat.shape[0]].reshape(*x.shape[:-1], y.shape[-1])
            outputs.append(y if bias is None or in_epilogue else y + bias)
        return Forward(outputs, saved, [])

    def backward(
        self, call: Call, inputs: Sequence[Any], saved: Sequence[Quantized], grads: Sequence[Tensor], scales: Scales, needs: Needs
    ) -> Backward:
        kernels, rows = _Kernels(call.scaling), GemmRows.of(call.attributes)
        (x8, *w8s), (needs_x, needs_w, needs_b) = saved, needs
        parts: list[Tensor] = []
        part_dtype = call.inputs[0] if len(grads) == 1 else torch.float32  # several are summed before the rounding
        dws: list[Tensor | None] = [None] * len(rows.sizes)
        dbs: list[Tensor | None] = [None] * len(rows.sizes)
        for gemm, grad, w8 in zip(rows.gemms(), grads, w8s, strict=True):
            g, wanted = matrix(grad), [i for i in gemm if needs_w[i]]
            if needs_x or wanted:
                g_rows, g_columns = kernels.quantize(kernels.visible(g), kernels.gradient, row_wise=needs_x, column_wise=bool(wanted))
            if needs_x:
                if "weights" in call.remakes:
                    w = rows.join([inputs[1][i] for i in gemm])
                    w_columns = kernels.quantize(w, kernels.weight, row_wise=False, column_wise=True)[1]
                else:
                    w_columns = _copy(w8, kernels.weight)
                parts.append(kernels.gemm(g_rows, w_columns, "NN", part_dtype)[: g.shape[0]])
            if wanted:
                dtypes = {call.inputs[1][i] for i in wanted}
                dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
                whole = kernels.gemm(g_columns, _copy(x8, kernels.x), "NT", dtype)
                for i in wanted:
                    dws[i] = rows.rows(whole, gemm.index(i), len(gemm)).to(call.inputs[1][i])
            for member, i in enumerate(gemm):
                if needs_b[i]:
                    dbs[i] = rows.rows(g.t(), member, len(gemm)).sum(-1, dtype=torch.float32).to(call.inputs[2][i])
        dx = reduce(torch.add, parts).to(call.inputs[0]) if parts else None
        return Backward([None if dx is None else dx.reshape(*grads[0].shape[:-1], dx.shape[-1]), dws, dbs], [])


class _Kernels:
    """TE's two operators, called as one recipe requires."""

    def __init__(self, recipe: Recipe) -> None:
        operands = operands_of(recipe)
        self.x, self.weight, self.gradient = operands.forward.a, operands.forward.b, operands.dgrad.a
        self.multiple = GATES[type(recipe)].columns  # of K, of N and, since wgrad sums over them, of the tokens
        self.mx = isinstance(recipe, MXFP8BlockScaling)

    def quantize(self, t: Tensor, how: Any, *, row_wise: bool = True, column_wise: bool = False) -> tuple[Copy, Copy]:
        """t [R, C], its rows padded to `multiple` -> its row-wise copy and its column-wise one; one that is not wanted is empty."""
        power_of_2, epsilon = (how.power_of_2, how.epsilon) if isinstance(how, Blocks) else (True, 0.0)
        rows, rows_inv, columns, columns_inv = torch.ops.te_dynamo.te_block_quantize(
            pad_rows(t, self.multiple), how.dtype, how.columns, _square(how), power_of_2, epsilon, row_wise, column_wise
        )
        return Copy(rows, rows_inv, _square(how)), Copy(columns, columns_inv, _square(how))

    def visible(self, t: Tensor) -> Tensor:
        """`t` with NaN in place of infinities: TE's cast for blocks of 128 saturates them, and a GradScaler would miss the overflow."""
        return t if self.mx else torch.where(t.isinf(), torch.nan, t)

    def gemm(self, a: Copy, b: Copy, layout: str, out_dtype: torch.dtype, bias: Tensor | None = None, fast: bool = False) -> Tensor:
        """layout: for matrices that are not transposed. With blocks of 128, column-wise copies are stored transposed, so the GEMM is TN."""
        return torch.ops.te_dynamo.te_block_gemm(
            a.data, b.data, a.scale_inv, b.scale_inv, a.square, b.square, layout if self.mx else "TN", bias, out_dtype, fast
        )


def _copy(saved: Quantized, how: Any) -> Copy:
    assert saved.data is not None and saved.scale_inv is not None
    return Copy(saved.data, saved.scale_inv, _square(how))


def _square(how: Blocks | MX) -> bool:
    return how.rows != 1
