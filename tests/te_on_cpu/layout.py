"""The memory layout of q, k and v: TE's layouts are claims about memory that cuDNN does not check; here they are checked.

A layout names one, two or three buffers, joined by "_": `bs3hd` is one [b, s, 3, h, d], `bshd_bs2hd` is q [b, s, h, d] and one
[b, s, 2, h, d] of k and v, `bshd_bshd_bshd` three. Its format is what remains without the digits: `bshd`, `sbhd` or `thd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    buffers: tuple[str, ...]  # e.g. "bs3hd"
    q_format: str
    kv_format: str

    @staticmethod
    def of(layout: Any) -> Layout:
        """layout: tex.NVTE_QKV_Layout. Raises NotImplementedError for a paged layout."""
        name = layout.name.removeprefix("NVTE_")
        if "Paged" in name or "BHSD" in name or "NOT_SET" in name:
            raise NotImplementedError(f"attention in the layout {layout.name} has no stand-in")
        buffers = tuple(name.lower().split("_"))
        formats = [buffer.replace("3", "").replace("2", "") for buffer in buffers]
        return Layout(buffers, formats[0], formats[-1])

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raises RuntimeError if q, k, v do not have the layout."""
        groups: Sequence[tuple[Tensor, ...]] = {1: [(q, k, v)], 2: [(q,), (k, v)], 3: [(q,), (k,), (v,)]}[len(self.buffers)]
        for buffer, parts in zip(self.buffers, groups, strict=True):
            expected = _views(torch.empty(_packed_shape(buffer, parts[0].shape), device="meta"), buffer)
            first = parts[0]
            for part, view in zip(parts, expected, strict=True):
                offset = part.storage_offset() - first.storage_offset()
                together = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
                if part.shape != view.shape or not _same_strides(part, view) or not together or offset != view.storage_offset():
                    is_, wanted = (f"shape {list(t.shape)}, strides {t.stride()}" for t in (part, view))
                    raise RuntimeError(
                        f"{'_'.join(self.buffers)}: a part of {buffer} has {is_} and lies {offset} elements behind the first, "
                        f"not {wanted} and {view.storage_offset()}"
                    )

    def empty(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
        """Zeros for q, k, v of these shapes (in the layout's own formats), as views of the layout's buffers."""
        firsts = {1: shapes[:1], 2: shapes[:2], 3: shapes}[len(self.buffers)]
        return [
            view
            for buffer, shape in zip(self.buffers, firsts, strict=True)
            for view in _views(torch.zeros(_packed_shape(buffer, shape), dtype=dtype), buffer)
        ]


def _packed_shape(buffer: str, shape: Sequence[int]) -> list[int]:
    packed = list(shape)
    for digit in "23":
        if digit in buffer:
            packed.insert(len(packed) - 2 if buffer.endswith(f"{digit}hd") else len(packed) - 1, int(digit))
    return packed


def _views(buffer: Tensor, name: str) -> list[Tensor]:
    if not any(digit in name for digit in "23"):
        return [buffer]
    return list(buffer.unbind(-3 if name[-3] in "23" else -2))


def _same_strides(a: Tensor, b: Tensor) -> bool:
    return all(size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))


@dataclass(frozen=True)
class Sequences:
    """Which rows of a tensor belong to which sample: rows [0, lengths[i]) of sample i's block, which in thd starts at starts[i]."""

    format: str
    starts: list[int]
    lengths: list[int]
    longest: int

    @staticmethod
    def of(format: str, cu_seqlens: Tensor, cu_padded: Tensor | None, padding: bool, longest: int) -> Sequences:
        """cu_seqlens, cu_padded: int32 [b + 1]. Without a padding mask cuDNN does not read the lengths of bshd and sbhd."""
        if cu_seqlens.dtype != torch.int32:
            raise RuntimeError(f"cu_seqlens are int32, not {cu_seqlens.dtype}")
        starts = (cu_seqlens if cu_padded is None else cu_padded).tolist()[:-1]
        lengths = cu_seqlens.diff().tolist()
        if format != "thd" and not padding:
            lengths = [longest] * len(lengths)
        if lengths and max(lengths) > longest:
            raise RuntimeError(f"a sequence is {max(lengths)} long, and the maximum is said to be {longest}")
        return Sequences(format, starts, lengths, longest)

    def check(self, t: Tensor) -> None:
        """Raises RuntimeError if a dense tensor's sizes differ from those passed to cuDNN."""
        told = {"bshd": (len(self.lengths), self.longest), "sbhd": (self.longest, len(self.lengths)), "thd": tuple(t.shape[:2])}
        if tuple(t.shape[:2]) != told[self.format]:
            raise RuntimeError(f"a tensor {list(t.shape)} in {self.format} of {len(self.lengths)} sequences up to {self.longest} long")

    def rows(self, t: Tensor, sample: int) -> Tensor:
        """A view [length, h, d] of one sample's rows."""
        length = self.lengths[sample]
        if self.format == "thd":
            return t[self.starts[sample] : self.starts[sample] + length]
        return t[sample, :length] if self.format == "bshd" else t[:length, sample]


def in_format(t: Tensor, source: str, target: str) -> Tensor:
    """A view of `t`, which has format `source`, in format `target`."""
    if source == target:
        return t
    if "thd" in (source, target):
        raise NotImplementedError(f"attention from {source} to {target} has no stand-in")
    return t.transpose(0, 1)
