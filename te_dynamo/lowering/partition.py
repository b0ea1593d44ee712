"""What AOTAutograd's partitioner is told: which values backward keeps, and which it makes again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from torch.fx import traceback
from torch.utils.checkpoint import CheckpointPolicy

_recompute_inputs: ContextVar[bool] = ContextVar("recompute_inputs", default=False)


@contextmanager
def inputs_recomputed(recompute: bool) -> Iterator[None]:
    """What is traced in here makes the FP8 inputs of its linears again in backward, if `recompute`."""
    token = _recompute_inputs.set(recompute)
    try:
        yield
    finally:
        _recompute_inputs.reset(token)


def activation_cast() -> AbstractContextManager[None]:
    """Around the cast of an activation to FP8, up to its last step, the rounding."""
    return recomputed_in_backward() if _recompute_inputs.get() else nullcontext()


def activation_rounding() -> AbstractContextManager[None]:
    """Around the rounding to FP8: its result is what backward keeps of the activation, or makes again."""
    return recomputed_in_backward() if _recompute_inputs.get() else kept_for_backward()


def kept_for_backward() -> AbstractContextManager[None]:
    """What is computed in here is kept where backward needs it, never made again: else a cast, which costs nothing to
    recompute, would have the high-precision tensor kept in its place, or beside it."""
    return _marked(CheckpointPolicy.MUST_SAVE)


def recomputed_in_backward() -> AbstractContextManager[None]:
    """What is computed in here is never kept: where backward needs it, it is made there."""
    return _marked(CheckpointPolicy.MUST_RECOMPUTE)


@contextmanager
def _marked(policy: CheckpointPolicy) -> Iterator[None]:
    """Marks the nodes that AOTAutograd traces in here. Activation checkpointing, which marks them too, has precedence."""
    meta = traceback.current_meta
    if "recompute" in meta:
        yield
        return
    meta["recompute"] = policy
    try:
        yield
    finally:
        meta.pop("recompute", None)
