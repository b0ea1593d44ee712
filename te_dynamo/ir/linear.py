"""Linears: `linear` as the model has it, and `linears`, all that share an input, as they are computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from te_dynamo.ir.graph import fake, fake_like
from te_dynamo.ir.meta import MEMBERS
from te_dynamo.ir.op import Gemm, Invariant, ScaledTensor, operation
from te_dynamo.ir.sizes import product, same

aten = torch.ops.aten

FORWARD, GRADIENT = ("input", "weight"), ("grad_output",)


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype) -> Tensor:
    return fake_like(x, (*x.shape[:-1], weight.shape[0]), out_dtype)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return weight.dim() == 2 and same(x.shape[-1:], weight.shape[1:]) and (bias is None or same(bias.shape, weight.shape[:1]))


def _gives(out: Iterable[Tensor], x: Tensor, weights: Sequence[Tensor], interleave: int, dtype: torch.dtype) -> bool:
    def last(w: Tensor) -> tuple[Any, ...]:
        return (w.shape[0] // interleave, interleave) if interleave else (w.shape[0],)

    out = list(out)
    return len(out) == len(weights) and all(
        y.dtype == dtype and same(y.shape, (*x.shape[:-1], *last(w))) for y, w in zip(out, weights, strict=True)
    )


@operation(
    kind="linear",
    fake=_fake_linear,
    forward=FORWARD,
    gradient=GRADIENT,
    grouped="linears",
    gemms=lambda node: [Gemm(*(*node.args, None)[:3])],
    invariants=(
        Invariant("weight is [N, K] with K the last size of x, bias [N]", lambda a: _fits(a.x, a.weight, a.bias)),
        Invariant("the result is [..., N] in out_dtype", lambda a: _gives([a.out], a.x, [a.weight], 0, a.out_dtype)),
    ),
)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype) -> Tensor:
    """`x @ weight.T + bias`, computed in `out_dtype`.

    x: [..., K]; weight: [N, K]; bias: [N] or None. Returns [..., N] in `out_dtype` (the dtype that the model's own
    linear gave: under autocast it differs from that of `x` and `weight`).
    """
    return F.linear(x.to(out_dtype), weight.to(out_dtype), None if bias is None else bias.to(out_dtype))


@dataclass(frozen=True)
class GemmRows:
    """Which linears of a group form one GEMM, and the order of its rows (see `linears`). sizes: the N of each linear."""

    sizes: tuple[int, ...]
    merged: bool = False
    interleave: int = 0

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> GemmRows:
        return cls(tuple(attributes["sizes"]), attributes["merged"], attributes["interleave"])

    def gemms(self) -> list[tuple[int, ...]]:
        """The linears of each GEMM, by index."""
        everyone = tuple(range(len(self.sizes)))
        return [everyone] if self.merged else [(i,) for i in everyone]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Joins [N_i, ...] of a GEMM's members into [sum N_i, ...], in the order of its rows."""
        if len(parts) == 1:
            return parts[0]
        if self.interleave:
            heads = torch.stack([p.unflatten(0, (-1, self.interleave)) for p in parts], 1)
            return heads.flatten(0, 2)
        return torch.cat(list(parts))

    def rows(self, t: Tensor, member: int, count: int) -> Tensor:
        """The rows of one of a GEMM's `count` members, from [sum N_i, ...] in the GEMM's order."""
        rows = self.rows_in_place(t, member, count)
        return rows.flatten(0, 1) if self.interleave and count > 1 else rows

    def rows_in_place(self, t: Tensor, member: int, count: int) -> Tensor:
        """Like `rows`, but a view: [heads, D, ...] if interleaved."""
        if count == 1:
            return t
        if self.interleave:
            return t.unflatten(0, (-1, count, self.interleave))[:, member]
        start = sum(self.sizes[:member])
        return t[start : start + self.sizes[member]]

    def split(self, y: Tensor) -> list[Tensor]:
        """Splits the merged GEMM's output [..., sum N_i] into one view per linear; [..., heads, D] if interleaved."""
        if self.interleave:
            return list(y.unflatten(-1, (-1, len(self.sizes), self.interleave)).unbind(-2))
        return list(y.split(list(self.sizes), -1))

    def join_biases(self, biases: Sequence[Tensor | None], gemm: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor | None:
        """The bias of one GEMM, zero for members without one; None if no member has one."""
        chosen = [(biases[i], self.sizes[i]) for i in gemm]
        if all(b is None for b, _ in chosen):
            return None
        return self.join([torch.zeros(n, dtype=dtype, device=like.device) if b is None else b.to(dtype) for b, n in chosen])


def _fake_linears(x: Tensor, weights: Any, biases: Any, *, out_dtype: torch.dtype, merged: bool = False, interleave: int = 0) -> Any:
    ys = [_fake_linear(x, w, out_dtype=out_dtype) for w in weights]
    return [y.unflatten(-1, (-1, interleave)) for y in ys] if interleave else ys


def _gemms(node: Node) -> list[Gemm]:
    x, weights, biases = node.args
    return [Gemm(x, w, b, i) for i, (w, b) in enumerate(zip(weights, biases, strict=True))]


def _in_aten(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[tuple[OpOverload, tuple[Any, ...]]]:
    rows = fake_like(x, (product(x.shape[:-1]), weights[0].shape[1]), x.dtype)
    found: list[tuple[OpOverload, tuple[Any, ...]]] = []
    for w, b in zip(weights, biases, strict=True):
        columns = fake_like(w, (w.shape[1], w.shape[0]), w.dtype, (1, w.shape[1]))
        found.append((aten.mm.default, (rows, columns)) if b is None else (aten.addmm.default, (b, rows, columns)))
    return found


def _shared(attributes: Mapping[str, Any], members: int) -> list[list[ScaledTensor]]:
    """The common input has one scale. If the members are one GEMM, so do its weight and its output's gradient."""
    shared = FORWARD + GRADIENT if attributes["merged"] else ("input",)
    return [[ScaledTensor(i, role) for i in range(members)] for role in shared] if members > 1 else []


@operation(
    kind="linear",
    fake=_fake_linears,
    forward=FORWARD,
    gradient=GRADIENT,
    gemms=_gemms,
    in_aten=_in_aten,
    shared=_shared,
    alone=lambda attributes, member: None if attributes["merged"] else {**attributes, "sizes": (attributes["sizes"][member],)},
    attributes_of=lambda node, recipe: {
        "sizes": tuple(int(fake(w).shape[0]) for w in node.args[1]),
        "in_features": int(fake(node.args[1][0]).shape[1]),
    },
    noted={MEMBERS: list},
    outputs=lambda attributes, ys: GemmRows.of(attributes).split(ys[0]) if attributes["merged"] else ys,
    invariants=(
        Invariant(
            "each weight is [N_i, K] with K the last size of x, each bias [N_i]",
            lambda a: len(a.weights) == len(a.biases) and all(_fits(a.x, w, b) for w, b in zip(a.weights, a.biases, strict=True)),
        ),
        Invariant("the results are [..., N_i] in out_dtype", lambda a: _gives(a.out, a.x, a.weights, a.interleave, a.out_dtype)),
    ),
)
def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    out_dtype: torch.dtype,
    merged: bool = False,
    interleave: int = 0,
) -> list[Tensor]:
    """Linears that share an input, which is quantized once for all of them.

    x: [..., K]; weights: [N_i, K]; biases: [N_i] or None. Returns one [..., N_i] for each weight.
    merged: one GEMM for all of them; the results are views of one buffer.
    interleave: 0, or the head size: the rows of the merged GEMM are then ordered head by head (q, k and v of a
        head side by side: the BSH3D layout) instead of one linear after the other (BS3HD), and the results are
        [..., N_i / interleave, interleave]. All N_i must be equal.
    """
    ys = [linear(x, w, b, out_dtype=out_dtype) for w, b in zip(weights, biases, strict=True)]
    return [y.unflatten(-1, (-1, interleave)) for y in ys] if interleave else ys
