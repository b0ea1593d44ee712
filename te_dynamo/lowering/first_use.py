"""The first use of a slot: its scale comes from the current batch (in data parallel, from the batches of all ranks)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]


@torch.library.custom_op("te_dynamo::agreed", mutates_args=())
def _agreed(amax: Tensor, slot: Tensor, amax_group: str) -> Tensor:
    """amax: f32, 0-d, of this rank; slot: the scale, f32, 0-d; amax_group: the name of a process group -> if the slot is unset (0), on
    which all ranks must agree, the largest amax of the group's ranks; else `amax`. For a rank that runs alone, an unset slot is -0 (see
    `Group.scales`)."""
    result = amax.clone()
    if slot == 0 and not torch.signbit(slot):
        dist.all_reduce(result, op=dist.ReduceOp.MAX, group=_resolve_process_group(amax_group))
    return result


@_agreed.register_fake
def _(amax: Tensor, slot: Tensor, amax_group: str) -> Tensor:
    return torch.empty_like(amax)


def agreed(amax: Tensor, slot: Tensor, amax_group: str) -> Tensor:
    """The amax that first scales an unset slot: the largest over the ranks of `amax_group`, or this rank's own if that is ""."""
    return torch.ops.te_dynamo.agreed(amax, slot, amax_group) if amax_group else amax
