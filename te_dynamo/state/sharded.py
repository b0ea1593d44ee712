"""Weights that FSDP gathers: the same tensors at the same place at every call, filled anew without a trace in their version."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


def gathered(tensors: Sequence[Tensor]) -> bool:
    """Whether any of these is a weight that FSDP (1 or 2) gathers before it is used."""
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    if any(getattr(t, "_fsdp_flattened", False) for t in tensors):  # what FSDP 1 says of its views
        return True
    ours = {id(t) for t in tensors}
    return any(id(parameter) in ours for parameter in _of_fully_shard())


def _of_fully_shard() -> Iterator[Any]:
    """The gathered parameters of all modules that `fully_shard` was applied to."""
    from torch.distributed import _composable_state

    states: list[Any] = list(_composable_state._module_state_mapping.values())
    for found in states:
        state = found() if isinstance(found, weakref.ref) else found
        for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
            for parameter in getattr(group, "fsdp_params", ()):
                yield getattr(parameter, "_unsharded_param", None)
