"""The FLOPs of the attention kernels that Inductor generates for `flex_attention`: they skip blocks that the mask hides, so the mask is
read from the kernel's source and evaluated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

SIZE = re.compile(r"^ *(ZQ|HQ|Q_LEN|KV_LEN|QK_HEAD_DIM|V_HEAD_DIM)(?: : tl\.constexpr)? = (\d+)$", re.MULTILINE)
MASK = re.compile(r"((?:^ *tmp\d+ = .*\n)+) *mask_mod_output = (\w+)", re.MULTILINE)
BLOCK = 128  # create_block_mask's default
SAMPLED = 32  # rows of blocks
ANY = 2**40  # what is read is less than this


def flops_of(name: str, source: str) -> int | None:
    """The FLOPs of a generated kernel, counting whole blocks; None if it is no attention, or its lengths are not in its source."""
    if not name.startswith("triton_tem") or "flex_" not in name:
        return None
    sizes = {found: int(size) for found, size in SIZE.findall(source)}
    if len(sizes) < 6:
        return None
    products = sizes["ZQ"] * sizes["HQ"] * sizes["Q_LEN"] * sizes["KV_LEN"]
    qk, v = sizes["QK_HEAD_DIM"], sizes["V_HEAD_DIM"]
    whole = 2 * products * (3 * qk + 2 * v if "backward" in name else qk + v)
    return int(whole * density(source, sizes["Q_LEN"], sizes["KV_LEN"]))


def density(source: str, rows: int, columns: int) -> float:
    """The fraction of blocks that a kernel computes: an upper bound, as what its mask reads (an attention_mask, lengths, the numbers of
    packed sequences) may be anything. 1.0 for a mask that cannot be evaluated."""
    found = MASK.search(source)
    if found is None:
        return 1.0
    computed, result = "\n".join(line.strip() for line in found[1].splitlines()), found[2]
    with _disable_current_modes():
        height, width = -(-rows // BLOCK), -(-columns // BLOCK)
        sampled = torch.arange(0, height, -(-height // SAMPLED))
        row = (sampled[:, None] * BLOCK + torch.tensor([0, BLOCK // 2, BLOCK - 1])).clamp(max=rows - 1)
        column = (torch.arange(width)[:, None] * BLOCK + torch.tensor([*range(0, BLOCK, 4), BLOCK - 1])).clamp(max=columns - 1)
        known = _Names(m=Range.of(row.reshape(-1, 1)), n=Range.of(column.reshape(1, -1)))
        try:
            exec(computed, FUNCTIONS, known)
        except Exception:
            return 1.0
        seen = known[result].high.expand(row.numel(), column.numel()).unflatten(1, column.shape).unflatten(0, row.shape)
        return float(seen.any(3).any(1).float().mean())


@dataclass(frozen=True)
class Range:
    """What the values of a tensor are at least and at most. Of a condition: whether it holds for certain, and whether it may hold."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, value: Any) -> Range:
        if isinstance(value, Range):
            return value
        value = torch.as_tensor(value)
        return cls(value, value)

    @classmethod
    def spanned(cls, candidates: Iterable[Tensor]) -> Range:
        together = torch.stack(torch.broadcast_tensors(*candidates))
        return cls(together.amin(0), together.amax(0))

    def _corners(self, function: Callable[[Tensor, Tensor], Tensor], other: Any) -> Range:
        other = Range.of(other)
        return Range.spanned(function(a, b) for a in (self.low, self.high) for b in (other.low, other.high))

    def to(self, dtype: torch.dtype) -> Range:
        if dtype != torch.bool or self.low.dtype == torch.bool:
            return Range(self.low.to(dtype), self.high.to(dtype))
        return Range((self.low > 0) | (self.high < 0), (self.low != 0) | (self.high != 0))

    def __add__(self, other: Any) -> Range:
        return self._corners(torch.add, other)

    def __sub__(self, other: Any) -> Range:
        return self._corners(torch.sub, other)

    def __mul__(self, other: Any) -> Range:
        return self._corners(torch.mul, other)

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other: Any) -> Range:
        if not bool((Range.of(other).low > 0).all()):
            raise ValueError("a divisor that may be zero")
        return self._corners(lambda a, b: torch.div(a, b, rounding_mode="trunc"), other)  # as in Triton

    def __invert__(self) -> Range:
        return Range(~self.high, ~self.low)

    def __and__(self, other: Any) -> Range:
        return self._of_conditions(torch.logical_and, other)

    def __or__(self, other: Any) -> Range:
        return self._of_conditions(torch.logical_or, other)

    def _of_conditions(self, function: Callable[[Tensor, Tensor], Tensor], other: Any) -> Range:
        other = Range.of(other)
        if {self.low.dtype, other.low.dtype} != {torch.bool}:
            raise ValueError("bits of numbers")
        return Range(function(self.low, other.low), function(self.high, other.high))

    def __le__(self, other: Any) -> Range:
        other = Range.of(other)
        return Range(self.high <= other.low, self.low <= other.high)

    def __lt__(self, other: Any) -> Range:
        return ~(Range.of(other) <= self)

    def __ge__(self, other: Any) -> Range:
        return Range.of(other) <= self

    def __gt__(self, other: Any) -> Range:
        return ~(self <= other)

    def __eq__(self, other: Any) -> Range:  # type: ignore[override]
        return (self <= other) & (self >= other)

    def __ne__(self, other: Any) -> Range:  # type: ignore[override]
        return ~(self == other)


def _where(condition: Range, first: Any, second: Any) -> Range:
    first, second = Range.of(first), Range.of(second)
    chosen = [torch.where(condition.high, a, b) for a, b in ((first.low, second.low), (first.high, second.high))]
    others = [torch.where(condition.low, a, b) for a, b in ((first.low, second.low), (first.high, second.high))]
    return Range.spanned((*chosen, *others))


def _abs(x: Range) -> Range:
    found = Range.spanned((x.low.abs(), x.high.abs()))
    return Range(torch.where((x.low <= 0) & (x.high >= 0), 0, found.low), found.high)


class _Pointer:
    def __add__(self, index: Any) -> _Pointer:
        return self


class _Names(dict[str, Any]):
    """What a mask may read: pointers, and the batch and the head, of which the first are looked at."""

    def __missing__(self, name: str) -> Any:
        if "ptr" in name:
            return _Pointer()
        if name.startswith("off_"):
            return Range.of(0)
        raise KeyError(name)


FUNCTIONS: dict[str, Any] = {
    "tl": SimpleNamespace(
        full=lambda shape, value, dtype: Range.of(torch.tensor(value, dtype=dtype)),
        load=lambda *_, **__: Range(torch.tensor(-ANY), torch.tensor(ANY)),
        broadcast_to=lambda x, *_: x,
        where=_where,
        minimum=lambda a, b: Range.of(a)._corners(torch.minimum, b),
        maximum=lambda a, b: Range.of(a)._corners(torch.maximum, b),
        int1=torch.bool,
        int8=torch.int64,  # a range of any numbers does not fit in less
        int16=torch.int64,
        int32=torch.int64,
        int64=torch.int64,
        float32=torch.float64,
    ),
    "tl_math": SimpleNamespace(abs=_abs),
}
