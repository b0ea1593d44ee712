"""What AOTAutograd's partitioner is told: which values are saved for backward, and which are recomputed there."""

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
    """The context for rounding an input to FP8: backward either keeps the rounded input or recomputes it."""
    return recomputed_in_backward() if "input" in call.remakes else kept_for_backward()


def kept_for_backward() -> AbstractContextManager[None]:
    """Values computed in this context are saved if backward needs them, never recomputed. Otherwise the partitioner, to which recomputing a
    cast costs nothing, would save the high-precision tensor instead of the FP8 one, or in addition to it."""
    return _marked(CheckpointPolicy.MUST_SAVE)


def recomputed_in_backward() -> AbstractContextManager[None]:
    """Values computed in this context are never saved: backward recomputes the ones it needs."""
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
    """The contexts of a selective checkpoint, with a policy that is also asked about the GEMMs of the original model that a site replaces.
    If the policy saves one of these, the site's results are saved."""
    contexts = context_fn()
    for context in contexts:
        if hasattr(context, "policy_fn"):
            context.policy_fn = partial(_policy, context.policy_fn)
    return contexts


def _policy(policy: Callable[..., Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    answers = [policy(ctx, op, *args, **kwargs), *(policy(ctx, other, *tensors) for other, tensors in _stands_for(op, args))]
    return next((a for a in answers if a in (True, CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)), answers[0])


def _stands_for(op: Any, args: Sequence[Any]) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    """The operators of the original model that one of our operators, or an FP8 GEMM, replaces."""
    if op is torch.ops.aten._scaled_mm.default:
        return [(torch.ops.aten.mm.default, tuple(args[:2]))]
    if op is not torch.ops.te_dynamo.site_fwd.default:
        return []
    call = Call.parse(args[0])
    inputs = call.nested(args[1][: call.count])
    if call.producer is not None:
        inputs[0] = inputs[0][0]  # has the operand's leading sizes
    return call.operation.in_aten(*inputs)
