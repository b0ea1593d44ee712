"""Two small operators on the scales and amaxes of a whole graph, so that its kernels number the same however many its sites."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 4  # float32 elements from one scalar to the next: kernels take pointers that are aligned to 16 bytes

_library = torch.library.Library("te_dynamo", "FRAGMENT")
# What unpack returns are views of two buffers, which `torch.library.custom_op` refuses (nothing ever writes them).
_library.define("unpack(Tensor packed) -> (Tensor[], Tensor[])", tags=[torch.Tag.pt2_compliant_tag])


@torch.library.impl(_library, "unpack", "CompositeExplicitAutograd")
def _unpack(packed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """packed: f32 [F] -> F scalars (0-d, each 16-byte aligned), F reciprocals of them: two kernels."""
    values = packed.detach().unsqueeze(-1).expand(-1, ALIGNMENT).contiguous()
    return list(values[:, 0].unbind()), list(values.reciprocal()[:, 0].unbind())


@torch.library.register_fake("te_dynamo::unpack")
def _(packed):
    return [packed.new_empty(()) for _ in range(packed.shape[0])], [packed.new_empty(()) for _ in range(packed.shape[0])]


@torch.library.custom_op("te_dynamo::largest", mutates_args=())
def largest(parts: list[Tensor], which: list[int]) -> Tensor:
    """parts: f32, of any length -> f32 [len(which)], the largest element of `parts[i]` for each i of `which`.

    0 for an empty part: only amaxes are.
    """
    peaks = torch._foreach_max([p if p.numel() else p.new_zeros(1) for p in parts])
    return torch.stack([peaks[i] for i in which])


@largest.register_fake
def _(parts, which):
    return parts[0].new_empty(len(which))


def largest_of(tensors: list[Tensor]) -> Tensor:
    """The largest element of each tensor, each computed once."""
    parts = list({id(t): t for t in tensors}.values())
    place = {id(t): i for i, t in enumerate(parts)}
    return torch.ops.te_dynamo.largest(parts, [place[id(t)] for t in tensors])
