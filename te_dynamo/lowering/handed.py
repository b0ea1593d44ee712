"""A gradient that is handed over already quantized, from the site that reads a GEMM's output to the GEMM's own site.

Autograd passes on a gradient in the dtype of the tensor that it belongs to. That rules out a gradient that one kernel could write in FP8
along with its transposed copy, its amax and the sums for a bias gradient. So the GEMM's site returns *carriers* besides its outputs: empty
tensors, used for nothing, whose "gradients" are these four; just as the sink's "gradient" is the amaxes measured in backward.

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
    """starts: the column of the GEMM's output at which each input of the reader begins; widths: how many columns each input has.

    dtype: of the gradient; saturate: whether infinities are cast to the largest number; multiple: what the rows are padded to.
    data, transposed, sums: which are wanted: for dgrad, wgrad and a bias.
    """
    given = {"starts": tuple(starts), "widths": tuple(widths), "dtype": dtype, "saturate": saturate, "multiple": multiple}
    return {**given, "data": data, "transposed": transposed, "sums": sums}


def carriers(output: Tensor, wanted: Mapping[str, Any]) -> Sequence[Tensor]:
    """The carriers of a GEMM's output [..., N]."""
    tokens: Any = 1
    for size in output.shape[:-1]:
        tokens = tokens * size
    kinds = (wanted[name] for name in ("dtype", "multiple", "data", "transposed", "sums"))
    return empty_both(output, tokens, wanted["widths"], *kinds)
