"""TE's permutation of tokens by expert index, and its padding of groups. row_id_map: int32 [K T]; entry k T + t is the new row of the k-th
copy of token t, -1 if it was dropped (C/permutation/permutation.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu.rounding import FP8


def moe_permute_fwd(inp: Tensor, dtype: Any, indices: Tensor, num_out_tokens: int, workspace: Any, max_expanded_token_num: int) -> Any:
    """The rows of `inp`, once for each expert of a token, in the order of experts; the map; the workspace."""
    tokens, k = indices.shape
    order = indices.flatten().sort(stable=True).indices
    kept = order[:num_out_tokens] if num_out_tokens > 0 else order
    row_id_map = torch.full((k * tokens,), -1, dtype=torch.int32)
    row_id_map[kept % k * tokens + kept // k] = torch.arange(len(kept), dtype=torch.int32)
    return inp[kept // k], row_id_map, workspace


def moe_permute_bwd(input: Tensor, dtype: Any, row_id_map: Tensor, prob: Tensor, num_tokens: int, topK: int) -> Tensor:
    return moe_unpermute_fwd(input, dtype, row_id_map, prob, num_tokens, topK)


def moe_unpermute_fwd(input: Tensor, dtype: Any, row_id_map: Tensor, prob: Tensor, num_tokens: int, topK: int) -> Tensor:
    """The sum of each token's rows, times their probabilities if there are any. Accumulated in float32."""
    fp8 = FP8.get(int(dtype))
    rows = (input if fp8 is None else input.view(fp8)).float()
    places = row_id_map.view(topK, num_tokens).long()
    taken = torch.where((places < 0).unsqueeze(2), 0.0, rows[places.clamp(min=0)])
    if prob.numel():
        taken = taken * prob.float().t().unsqueeze(2)
    total = taken.sum(0)
    return total.to(input.dtype) if fp8 is None else total.to(fp8).view(input.dtype)


def moe_unpermute_bwd(input_bwd: Tensor, input_fwd: Tensor, dtype: Any, row_id_map: Tensor, prob: Tensor) -> Any:
    """The gradients of the permuted rows and of the probabilities, the latter float32 [T, K]."""
    fp8 = FP8.get(int(dtype))
    grad, rows = ((t if fp8 is None else t.view(fp8)).float() for t in (input_bwd, input_fwd))
    tokens = grad.shape[0]
    places = row_id_map.view(-1, tokens).long()
    by = prob.float().t() if prob.numel() else torch.ones(places.shape)
    there = places >= 0
    made = torch.zeros(rows.shape)
    made[places[there]] = (grad.unsqueeze(0) * by.unsqueeze(2))[there]
    dots = torch.where(there, (grad.unsqueeze(0) * rows[places.clamp(min=0)]).sum(2), 0.0)
    act = made.to(input_fwd.dtype) if fp8 is None else made.to(fp8).view(input_fwd.dtype)
    return act, dots.t().contiguous() if prob.numel() else torch.zeros(0)


def fused_multi_row_padding(input: Tensor, output: Tensor, input_row_list: Any, padded_input_row_list: Any) -> None:
    """Copies each group's rows, and pads with zeros to its padded number of rows."""
    output.zero_()
    _each(input, output, input_row_list, padded_input_row_list)


def fused_multi_row_unpadding(input: Tensor, output: Tensor, input_row_list: Any, unpadded_input_row_list: Any) -> None:
    _each(input, output, input_row_list, unpadded_input_row_list)


def _each(input: Tensor, output: Tensor, rows: Any, wanted: Any) -> None:
    for source, target in zip(input.split(list(rows)), output.split(list(wanted)), strict=True):
        n = min(len(source), len(target))
        target[:n] = source[:n]
