"""Computes masks of static size that read no data: on the CPU, and only if the result holds for any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from te_dynamo.ir.graph import example, tensor
from te_dynamo.passes.masks.formulas import Unproven

MAX_BYTES = 2**28  # of each tensor on the way


def compute(nodes: Sequence[Node]) -> torch.Tensor:
    """The value of the last of `nodes`, which are all that it depends on, in order. Raises Unproven if it is not certain."""
    for node in nodes:
        if not _is_computable(node):
            raise Unproven(f"{node.name} is not a function of constants, or too large")
    last_use = {n: user for user in nodes for n in user.all_input_nodes}
    values: dict[Node, Any] = {}
    with torch.no_grad(), torch.device("cpu"), _Deterministic():
        for node in nodes:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            args, kwargs = map_aggregate((args, kwargs), lambda a: torch.device("cpu") if isinstance(a, torch.device) else a)
            fn = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
            values[node] = value = fn(*args, **kwargs)
            expected = tensor(node)
            if expected is not None and (value.shape, value.dtype) != (expected.shape, expected.dtype):
                raise Unproven(f"{node.name} is not what the graph says")
            for used in node.all_input_nodes:
                if last_use[used] is node:
                    del values[used]
    return values[nodes[-1]]


def _is_computable(node: Node) -> bool:
    """Whether a node applies one of torch's own functions to constants, and its result is small enough to compute."""
    if node.op not in ("call_function", "call_method"):
        return False
    values = example(node)
    known = node.op == "call_method" or str(getattr(node.target, "__module__", "")).split(".")[0] in ("torch", "_operator", "builtins")
    return known and all(
        isinstance(v, (int, float)) or (isinstance(v, torch.Tensor) and _bytes(v) <= MAX_BYTES)
        for v in (values if isinstance(values, (tuple, list)) else [values])
    )


def _bytes(value: torch.Tensor) -> float:
    sizes = [s for s in value.shape if isinstance(s, int)]
    return math.prod(sizes) * value.element_size() if len(sizes) == value.dim() else math.inf


class _Deterministic(TorchDispatchMode):
    """Raises at operators that read a random generator or uninitialized memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in func.name():
            raise Unproven(f"{func.name()} is not a function of its arguments")
        return func(*args, **(kwargs or {}))
