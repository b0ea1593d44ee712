"""A matrix in FP8 with a scale for each row, written by the kernel that computes the matrix, which itself is not stored.

A row's amax must be known before its first element can be cast, so the kernel passes over a row twice. As separate steps, Inductor would
store in 16 bits what it computed in the first pass, and read that in the second. This is one operator, whose lowering computes an element
wherever it needs it: the second pass reads again what the first one read, which is still in the cache, and nothing but FP8 is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from te_dynamo.lowering import fp8
from te_dynamo.lowering.aten import GraphPass, aten, keeps_shape


def _definition(parts: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    amax = reduce(torch.maximum, [fp8.row_amax(part) for part in parts]).unsqueeze(1)
    scale = fp8.power_of_2(fp8.scale_of(amax, dtype))
    data = torch.cat([fp8.quantize(part, scale, dtype) for part in parts], 1)
    return data, scale.reciprocal().masked_fill(amax.isinf(), torch.nan), amax


@torch.library.custom_op("te_dynamo::quantize_rows", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def quantize_rows(parts: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """parts: [R, C_i], the columns of a matrix -> (data [R, C] in FP8, saturated; its scale_inv, a power of two for each row, f32 [R, 1],
    NaN where the row has an infinite element; the amaxes, f32 [R, 1])."""
    return _definition(parts, dtype)


@quantize_rows.register_fake
def _(parts, dtype):
    rows, columns = parts[0].shape[0], sum(part.shape[1] for part in parts)
    of_rows = [parts[0].new_empty(rows, 1, dtype=torch.float32) for _ in range(2)]
    return parts[0].new_empty(rows, columns, dtype=dtype), *of_rows


class Apart(GraphPass):
    """Gives the operator the parts of a concatenation (the gradients of gate and up), which would otherwise be stored."""

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.te_dynamo.quantize_rows.default):
            (matrix,), dtype = node.args
            between = [matrix]
            while keeps_shape(between[-1]):
                between.append(between[-1].args[0])
            joined = between[-1]
            if joined.target is aten.cat.default and joined.args[1:] in ((1,), (-1,)) and all(len(n.users) == 1 for n in between):
                node.args = (joined.args[0], dtype)
                for unused in between:
                    graph.erase_node(unused)


@cache
def register_lowering() -> None:
    """Tells Inductor."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    from te_dynamo.lowering.inline import Inline

    @register_lowering(torch.ops.te_dynamo.quantize_rows.default, type_promotion_kind=None)
    def _(parts: Sequence[Any], dtype: torch.dtype) -> Any:
        examples = [node.meta["val"] for node in V.graph.current_node.args[0]]
        with V.fake_mode:
            graph = make_fx(lambda *given: _definition(given, dtype), select_decomp_table(), tracing_mode="symbolic")(*examples)
        return Inline(graph).run(*parts)
