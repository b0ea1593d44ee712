"""Weights that FSDP gathers: the same tensors at the same addresses at every call, refilled without a new version counter."""

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
    if any(getattr(t, "_fsdp_flattened", False) for t in tensors):  # FSDP 1 marks its views so
        return True
    ids = {id(t) for t in tensors}
    return any(id(parameter) in ids for parameter in _gathered_by_fsdp2())


def _gathered_by_fsdp2() -> Iterator[Any]:
    """The gathered parameters of all modules that `fully_shard` was applied to."""
    from torch.distributed import _composable_state

    states: list[Any] = list(_composable_state._module_state_mapping.values())
    for found in states:
        state = found() if isinstance(found, weakref.ref) else found
        for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
            for parameter in getattr(group, "fsdp_params", ()):
                yield getattr(parameter, "_unsharded_param", None)
