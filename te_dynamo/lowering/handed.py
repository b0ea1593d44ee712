"""A gradient that is handed over quantized: from the site that reads a GEMM's output to the GEMM's own.

Autograd hands on a gradient in the dtype of what it is the gradient of. Where one kernel could write the gradient of a GEMM's
output in FP8, both ways, with its amax and the sums of a bias's gradient, that will not do. So the GEMM's site gives *carriers* beside
its outputs: empty tensors, used for nothing, of which these four are the "gradients"; as the sink's is what backward measured.

Both calls hold the same description of it, made by `described`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from te_dynamo.lowering.kernels.tiles import empty_both

CARRIERS = 4  # the fields of `kernels.tiles.Both`


def described(
    starts: Sequence[int],
    widths: Sequence[int],
    dtype: torch.dtype,
    saturate: bool,
    multiple: int,
    *,
    data: bool,
    transposed: bool,
    sums: bool,
) -> dict[str, Any]:
    """starts: at which column of the GEMM's output each input of the reader lies; widths: how many it has.

    dtype: of the gradient; saturate: whether infinities are cast to the largest number; multiple: of the rows.
    data, transposed, sums: which are wanted: for dgrad, wgrad and a bias.
    """
    given = {"starts": tuple(starts), "widths": tuple(widths), "dtype": dtype, "saturate": saturate, "multiple": multiple}
    return {**given, "data": data, "transposed": transposed, "sums": sums}


def carriers(output: Tensor, wanted: Mapping[str, Any]) -> Sequence[Tensor]:
    """Of a GEMM's output [..., N]."""
    tokens: Any = 1
    for size in output.shape[:-1]:
        tokens = tokens * size
    kinds = (wanted[name] for name in ("dtype", "multiple", "data", "transposed", "sums"))
    return empty_both(output, tokens, wanted["widths"], *kinds)
