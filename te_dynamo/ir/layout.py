"""The names of attention's memory layouts, as Transformer Engine spells them.

s sequence, b batch, t tokens, h heads, d head size. A digit is the number of tensors that share a buffer, at the dimension that
distinguishes them (`bs3hd`: q, k and v one after another in a token's row; `bsh3d`: head by head), and `_` separates tensors in
different buffers (`bshd_bs2hd`: q separate, k and v packed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from te_dynamo.ir.graph import same_shape, same_size

Form = Literal["bshd", "sbhd", "thd"]
# The dimensions of a [B, H, S, D] tensor in memory order.
ORDER: dict[Form, tuple[int, int, int, int]] = {"bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}
Packing = Literal["3hd", "h3d", "2hd", "h2d", ""]  # q, k and v together; k and v together; all separate


@dataclass(frozen=True)
class Layout:
    """form: the order of the dimensions of q and o; packing: which tensors share a buffer, and how."""

    form: Form = "bshd"
    packing: Packing = ""

    @property
    def name(self) -> str:
        """As Transformer Engine spells it.

        >>> Layout("bshd", "h3d").name, Layout("sbhd", "2hd").name, Layout("bshd", "").name
        ('bsh3d', 'sbhd_sb2hd', 'bshd_bshd_bshd')
        """
        prefix = self.form.removesuffix("hd")
        if self.packing in ("3hd", "h3d"):
            return prefix + self.packing
        return "_".join([self.form, prefix + self.packing] if self.packing else [self.form] * 3)


def as_bhsd(t: Tensor, form: Form) -> Tensor:
    """A [B, H, S, D] view of a tensor whose dimensions are in the order of `form`."""
    order = ORDER[form]
    return t.permute([order.index(i) for i in range(4)])


def in_memory(q: Tensor, k: Tensor, v: Tensor) -> Layout | None:
    """The layout of q [B, H, S, D], k and v, found from their strides, offsets and storages; None if it has no name."""
    for form in ORDER:
        for packing in ("3hd", "h3d", "2hd", "h2d", ""):
            if _lies(q, k, v, form, packing):
                return Layout(form, packing)
    return None


def _lies(q: Tensor, k: Tensor, v: Tensor, form: Form, packing: Packing) -> bool:
    packed = {"3": [q, k, v], "2": [k, v], "": []}["".join(c for c in packing if c.isdigit())]
    apart = [t for t in (q, k, v) if not any(t is p for p in packed)]
    return all(_strided(t, form, 1, "") for t in apart) and _shares(packed, form, packing)


def _shares(tensors: Sequence[Tensor], form: Form, packing: Packing) -> bool:
    """Whether tensors are the parts of one buffer, side by side in each token's row or in each head."""
    if not tensors:
        return True
    first, count = tensors[0], len(tensors)
    step = first.shape[3] if packing.startswith("h") else first.shape[1] * first.shape[3]
    return (
        len({t.untyped_storage()._cdata for t in tensors}) == 1
        and all(same_shape(t.shape, first.shape) and _strided(t, form, count, packing) for t in tensors)
        and all(t.storage_offset() - first.storage_offset() == i * step for i, t in enumerate(tensors))
    )


def _strided(t: Tensor, form: Form, count: int, packing: str) -> bool:
    """Whether t [B, H, S, D] has the strides of one of `count` parts of a buffer."""
    b, h, s, d = t.shape
    row = count * h * d
    head = count * d if packing.startswith("h") else d
    outer = {"bshd": (s * row, row), "sbhd": (row, b * row)}[form]
    wanted = (outer[0], head, outer[1], 1)
    return all(size == 1 or same_size(stride, w) for size, stride, w in zip(t.shape, t.stride(), wanted, strict=True))
