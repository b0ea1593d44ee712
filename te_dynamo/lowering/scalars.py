"""Small operators on all scales and amaxes of a graph: a few kernels, however many sites it has."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("te_dynamo::unpack", mutates_args=())
def unpack(packed: Tensor) -> list[Tensor]:
    """packed: f32 [F] -> F scalars (0-d), then F reciprocals of them.

    Each has memory of its own: an operator's outputs must not overlap, and kernels take pointers that are aligned.
    """
    values = torch._foreach_mul(packed.unbind(), 1.0)
    return [*values, *torch._foreach_reciprocal(values)]


@unpack.register_fake
def _(packed):
    return [packed.new_empty(()) for _ in range(2 * packed.shape[0])]


@torch.library.custom_op("te_dynamo::largest", mutates_args=())
def largest(parts: list[Tensor], which: list[int]) -> Tensor:
    """parts: f32, of any length -> f32 [len(which)], the largest element of `parts[i]` for each i of `which`.

    0 for an empty part: the parts are amaxes.
    """
    peaks = torch._foreach_max([p if p.numel() else p.new_zeros(1) for p in parts])
    return torch.stack([peaks[i] for i in which])


@largest.register_fake
def _(parts, which):
    return parts[0].new_empty(len(which))


# Not by `custom_op`, as in `lowering.opaque`.
torch.library.define("te_dynamo::joined", "(Tensor[] parts) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))  # torch.cat, as a call
torch.library.impl("te_dynamo::joined", "default", lambda parts: torch.cat(parts))


@torch.library.register_fake("te_dynamo::joined")
def _(parts):
    return parts[0].new_empty(sum(p.shape[0] for p in parts))


def largest_of(tensors: list[Tensor]) -> Tensor:
    """The largest element of each tensor, each computed once."""
    parts = list({id(t): t for t in tensors}.values())
    place = {id(t): i for i, t in enumerate(parts)}
    return torch.ops.te_dynamo.largest(parts, [place[id(t)] for t in tensors])
