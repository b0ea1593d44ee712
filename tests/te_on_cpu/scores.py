"""Attention's scores: which query attends to which key, and their softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu.layout import Layout, Sequences


def probabilities(scores: Tensor, log_sum: Tensor) -> Tensor:
    """exp(scores - log_sum) [h, sq, skv]; zero in a fully masked row."""
    return torch.where(log_sum[..., None].isfinite(), (scores - log_sum[..., None]).exp(), torch.zeros(()))


@dataclass(frozen=True)
class Problem:
    """Which positions attend to which: samples of any lengths, a band of each sample's score matrix."""

    queries: Sequences
    keys: Sequences
    causal: bool
    bottom_right: bool  # the diagonal ends at the last query and key, instead of beginning at the first ones
    window: tuple[int, int]  # attended keys before and after the diagonal; -1: all
    heads: int
    scale: float

    @staticmethod
    def of(
        layout: Layout, mask: Any, window: Sequence[int], bottom_right_diagonal: bool, heads: int, scale: float,
        longest_q: int, longest_kv: int, cu_q: Tensor, cu_kv: Tensor, cu_q_padded: Tensor | None, cu_kv_padded: Tensor | None,
    ) -> Problem:  # fmt: skip
        """mask: tex.NVTE_Mask_Type; cu_*: int32 [b + 1]."""
        padding = "PADDING" in mask.name
        return Problem(
            queries=Sequences.of(layout.q_format, cu_q, cu_q_padded, padding, longest_q),
            keys=Sequences.of(layout.kv_format, cu_kv, cu_kv_padded, padding, longest_kv),
            causal="CAUSAL" in mask.name,
            bottom_right="BOTTOM_RIGHT" in mask.name or bottom_right_diagonal,
            window=(window[0], window[1]),
            heads=heads,
            scale=scale,
        )

    @property
    def samples(self) -> int:
        return len(self.queries.lengths)

    def heads_of_queries(self, t: Tensor, sample: int) -> Tensor:
        """[h, sq, d] of one sample."""
        return self.queries.rows(t, sample).movedim(1, 0)

    def heads_of_keys(self, t: Tensor, sample: int) -> Tensor:
        """[h, skv, d] of one sample: each head repeated for every query head that shares it."""
        return self.keys.rows(t, sample).movedim(1, 0).repeat_interleave(self.heads // t.shape[-2], 0)

    def write(self, gradient: Tensor, part: Tensor, sample: int, of_queries: bool) -> None:
        """Writes part [h, length, d] to one sample's rows; for keys, the query heads that share a head are summed."""
        sequences = self.queries if of_queries else self.keys
        groups = gradient.shape[-2]
        sequences.rows(gradient, sample).copy_(part.reshape(groups, -1, *part.shape[1:]).sum(1).movedim(0, 1))

    def scores(self, q: Tensor, k: Tensor, sample: int, bias: Tensor | None, sink: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """q @ k scaled, plus the bias, -inf for masked keys [h, sq, skv]; and the sink's score [h, sq, 1]."""
        scores = self.heads_of_queries(q, sample) @ self.heads_of_keys(k, sample).transpose(-1, -2) * self.scale
        if bias is not None:
            scores = scores + self._bias_of(bias, sample, scores)
        scores = scores.masked_fill(~self._seen(*scores.shape[1:]), -torch.inf)
        return scores, None if sink is None else sink[:, None, None].expand(-1, scores.shape[1], 1)

    def _seen(self, queries: int, keys: int) -> Tensor:
        i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
        diagonal = i + (keys - queries if self.bottom_right else 0)
        seen = torch.ones(queries, keys, dtype=torch.bool)
        if self.causal:
            seen &= j <= diagonal
        before, behind = self.window
        if before >= 0:
            seen &= j >= diagonal - before
        if behind >= 0:
            seen &= j <= diagonal + behind
        return seen

    def empty_per_row(self, t: Tensor) -> Tensor:
        """Zeros for one float32 per query and head: [b, h, the longest, 1] or, if `t` is in thd, [t, h, 1]."""
        if self.queries.format == "thd":
            return torch.zeros(t.shape[0], self.heads, 1)
        return torch.zeros(self.samples, self.heads, self.queries.longest, 1)

    def rows_of(self, per_row: Tensor, sample: int) -> Tensor:
        """A view [h, sq] of one sample's rows."""
        if self.queries.format == "thd":
            return self.queries.rows(per_row, sample)[..., 0].t()
        return per_row[sample, :, : self.queries.lengths[sample], 0]

    @staticmethod
    def _bias_of(bias: Tensor, sample: int, like: Tensor) -> Tensor:
        """A view [1 or h, 1 or sq, skv] of a bias [1 or b, 1 or h, 1 or s, s]."""
        own = bias[sample if bias.shape[0] > 1 else 0]
        return own[:, : like.shape[1], : like.shape[2]]

    def add_to_bias(self, gradient: Tensor, ds: Tensor, sample: int) -> None:
        own = self._bias_of(gradient, sample, ds)
        own += ds.sum_to_size(own.shape)
