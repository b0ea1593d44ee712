"""Which linears are routers of a mixture of experts: the largest of their results choose the experts. They stay in high precision unless
the user includes them, since no later precision makes up for a wrong choice."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from te_dynamo.ir import op_of
from te_dynamo.ir.graph import is_call, is_method, tensor

CHOICES: tuple[Any, ...] = (torch.topk, torch.argmax, torch.sort, torch.argsort)
CHOICE_METHODS = ("topk", "argmax", "sort", "argsort")
# Operations between a score and the choice that keep an entry for each expert.
SCORES: frozenset[Any] = frozenset(
    {
        torch.add,
        torch.clone,
        torch.div,
        torch.masked_fill,
        torch.mul,
        torch.reshape,
        torch.sigmoid,
        torch.softmax,
        torch.sqrt,
        torch.sub,
        torch.tanh,
        torch.transpose,
        torch.where,
        F.sigmoid,
        F.softmax,
        F.softplus,
    }
)
SCORE_METHODS = ("to", "float", "view", "contiguous", "sigmoid", "softmax", "masked_fill", "reshape", "clone")
FAR = 12  # steps


def find_routers(gm: GraphModule) -> set[Node]:
    """The linears of a raised graph from whose result the graph takes a top-k or the like: routers, and logits that it samples from."""
    return {n for n in gm.graph.nodes if (op := op_of(n)) is not None and op.gemms(n) and tensor(n) is not None and _chooses(n)}


def _chooses(linear: Node) -> bool:
    reached, seen = [linear], {linear}
    for _ in range(FAR):
        following = []
        for user in (u for n in reached for u in n.users if u not in seen):
            seen.add(user)
            if is_call(user, *CHOICES) or is_method(user, *CHOICE_METHODS):
                return True
            if is_call(user, *SCORES) or is_method(user, *SCORE_METHODS):
                following.append(user)
        reached = following
    return False
