"""The first use of a slot: its scale comes from that very batch, in data parallel from the batches of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]


@torch.library.custom_op("te_dynamo::agreed", mutates_args=())
def _agreed(amax: Tensor, slot: Tensor, amax_group: str) -> Tensor:
    """amax: f32, 0-d, of this rank; slot: the scale, f32, 0-d; amax_group: the name of a process group -> the largest amax of its
    ranks where the slot is unset (0), which all of them must agree on; else `amax`. An unset slot of a rank that runs alone is
    -0 (see `Group.scales`)."""
    result = amax.clone()
    if slot == 0 and not torch.signbit(slot):
        dist.all_reduce(result, op=dist.ReduceOp.MAX, group=_resolve_process_group(amax_group))
    return result


@_agreed.register_fake
def _(amax: Tensor, slot: Tensor, amax_group: str) -> Tensor:
    return torch.empty_like(amax)


def agreed(amax: Tensor, slot: Tensor, amax_group: str) -> Tensor:
    """The amax by which an unset slot is first scaled: that of all ranks of the group `amax_group`, or this one's where it is ""."""
    return torch.ops.te_dynamo.agreed(amax, slot, amax_group) if amax_group else amax
