"""What AOTAutograd's partitioner is told: which values backward keeps, and which it makes again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch.fx import traceback
from torch.utils.checkpoint import CheckpointPolicy

from te_dynamo.lowering.call import Call


def kept_or_remade(call: Call) -> AbstractContextManager[None]:
    """Around the rounding of an input to FP8: it is what backward keeps of the input, or makes again."""
    return recomputed_in_backward() if "input" in call.remakes else kept_for_backward()


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


def asks_about_gemms(context_fn: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """The contexts of a selective checkpoint, whose policy is asked about what a site stands for too: the GEMMs of the model as it was
    written. What says that one of these is saved has the site's results saved."""
    contexts = context_fn()
    for context in contexts:
        if hasattr(context, "policy_fn"):
            context.policy_fn = partial(_policy, context.policy_fn)
    return contexts


def _policy(policy: Callable[..., Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    answers = [policy(ctx, op, *args, **kwargs), *(policy(ctx, other, *tensors) for other, tensors in _stands_for(op, args))]
    return next((a for a in answers if a in (True, CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)), answers[0])


def _stands_for(op: Any, args: Sequence[Any]) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    """The operators of the model that one of ours, or an FP8 GEMM, takes the place of."""
    if op is torch.ops.aten._scaled_mm.default:
        return [(torch.ops.aten.mm.default, tuple(args[:2]))]
    if op is not torch.ops.te_dynamo.site_fwd.default:
        return []
    call = Call.parse(args[0])
    inputs = call.nested(args[1][: call.count])
    if call.producer is not None:
        inputs[0] = inputs[0][0]  # of the operand's leading sizes
    return call.operation.in_aten(*inputs)
