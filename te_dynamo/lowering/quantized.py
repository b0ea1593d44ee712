"""A quantized tensor, and where its scale comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from te_dynamo.ir.op import Roles
from te_dynamo.lowering.first_use import agreed
from te_dynamo.lowering.fp8 import Casting


class Scale(NamedTuple):
    """What a tensor is multiplied by before its cast, and one over it; 0-d float32."""

    value: Tensor
    inverse: Tensor


class Quantized(NamedTuple):
    """A tensor as kernels read it. Fields that were not computed are None.

    data: the elements; scale_inv: f32, multiplies them to give their values: 0-d, or one for each block.
    transposed: the transposed copy of a matrix, as backward reads it; transposed_inv: its own scale_inv if it has one.
    scale: f32, 0-d, what the tensor was multiplied by.
    amax: f32, amaxes, the largest is the tensor's.
    """

    data: Tensor | None = None
    scale_inv: Tensor | None = None
    transposed: Tensor | None = None
    transposed_inv: Tensor | None = None
    scale: Tensor | None = None
    amax: Tensor | None = None

    @property
    def scales(self) -> Scale:
        assert self.scale is not None and self.scale_inv is not None
        return Scale(self.scale, self.scale_inv)

    def for_backward(self, *names: str) -> Quantized:
        """Only these fields: what is saved."""
        return Quantized(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Kept:
    """How the kept weight of each GEMM is computed from the weights: E4M3 with one scale, or with one for each row.

    gemms: the members of each; interleave: see `ir.linear.GemmRows`; top: what an amax is scaled to; epsilon, power_2_scale: see
    `lowering.fp8.Casting`; by_row: each row of the joined weight has a scale; where its amax is infinite, the inverse is NaN.
    """

    gemms: tuple[tuple[int, ...], ...]
    interleave: int
    top: float
    epsilon: float = 0.0
    power_2_scale: bool = False
    by_row: bool = False


class MadeOperand(NamedTuple):
    """The first input of a site, made by its producer: quantized, [tokens, K]. lead: the leading sizes, whose product is tokens."""

    quantized: Quantized
    lead: Sequence[Any]


class MadeGradient(NamedTuple):
    """The gradient of a GEMM's output, written quantized by the site that reads this output: [tokens, N], padded. Empty if not wanted.

    amaxes: f32, the largest is the tensor's; sums: f32 [n, N], partial sums over the tokens.
    lead: the leading sizes, whose product is tokens.
    """

    data: Tensor
    transposed: Tensor
    amaxes: Tensor
    sums: Tensor
    lead: Sequence[Any]


@dataclass(frozen=True)
class Scales:
    """Where the tensors of a site get their scales in one direction.

    slots: the site's, in the order of `roles`; None if each tensor is scaled by its own amax.
    calibrating: a slot that is 0 was never set; its tensor is then scaled by its own amax too.
    """

    slots: Sequence[Scale] | None
    roles: Roles
    casting: Casting
    calibrating: bool

    def at(self, role: str, member: int = 0) -> ScaleOf:
        return ScaleOf(self, role, member)


@dataclass(frozen=True)
class ScaleOf:
    """The scale of one tensor: `known` before the tensor exists, or computed from its amaxes (`of`)."""

    scales: Scales
    role: str
    member: int

    @property
    def dtype(self) -> torch.dtype:
        """The FP8 dtype of the tensor."""
        return self.casting.gradient if self.gradient else self.casting.forward

    @property
    def gradient(self) -> bool:
        return self.role not in self.scales.roles.forward

    @property
    def casting(self) -> Casting:
        return self.scales.casting

    @property
    def known(self) -> Scale | None:
        """The scale, if it does not require measuring the tensor."""
        return None if self.scales.calibrating else self.slot

    @property
    def slot(self) -> Scale | None:
        slots = self.scales.slots
        return None if slots is None else slots[self.scales.roles.place(self.role, self.member)]

    def of(self, amaxes: Tensor) -> Scale:
        """The scale of a tensor with these amaxes, of any shape."""
        if (known := self.known) is not None:
            return known
        largest = amaxes.amax() if amaxes.numel() else amaxes.sum()
        if self.slot is None:
            own = self.casting.scale_of(largest, self.role, gradient=self.gradient)
        else:
            slot = self.slot.value
            shared = agreed(largest, slot, self.casting.amax_group)
            own = torch.where(slot > 0, slot, self.casting.scale_of(shared, self.role, gradient=self.gradient))
        return Scale(own, own.reciprocal())
