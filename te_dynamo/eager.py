"""Runs a lowered graph as it is, operator by operator: the calibrating graph, which runs once or twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.autograd.function import once_differentiable
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from te_dynamo.ir.graph import tensor
from te_dynamo.passes.effects import storage, written_memory


def runs_eagerly(gm: GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether eager mode gives the same as AOTAutograd, which takes apart tensors of subclasses, and operators with graphs of their own
    (such as checkpoints), tells autograd of inputs that the graph writes, and makes results that share memory, with an input or among
    themselves, views of one another again."""
    nodes = gm.graph.nodes
    given = {storage(n) for n in nodes if n.op == "placeholder"}
    results = [storage(n) for n in tree_leaves(gm.graph.output_node().args[0]) if tensor(n) is not None]
    apart = len({*results}) == len(results) and given.isdisjoint(results)
    higher_order = any(isinstance(n.target, HigherOrderOperator) for n in nodes)
    simple = not (higher_order or any(map(is_traceable_wrapper_subclass, inputs)))
    return simple and apart and given.isdisjoint(written_memory(gm.graph))


def eager(gm: GraphModule) -> Callable[..., Any]:
    """`gm` with a backward that is one autograd node, as a compiled graph's is: the state takes the gradient of its sink from this node,
    even if a backward is asked only for the gradients of some inputs."""

    class Graph(torch.autograd.Function):  # a class of its own, as each compiled graph has: the sink has one place among its inputs
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Any, ...]:
            with torch.enable_grad():
                ctx.given = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
                ctx.results = list(gm(*ctx.given))
            ctx.set_materialize_grads(False)
            # Copies, so that a caller's writes to them do not reach what backward reads.
            outputs = [r.detach().clone() if isinstance(r, Tensor) else r for r in ctx.results]
            ctx.mark_non_differentiable(*[o for o, r in zip(outputs, ctx.results, strict=True) if _is_constant(r)])
            return tuple(outputs)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            pairs = [(r, g) for r, g in zip(ctx.results, grads, strict=True) if g is not None]
            needs = ctx.needs_input_grad
            if not pairs:  # what reads the results gives no gradient
                return (None,) * len(needs)
            wanted = [a for a, needed in zip(ctx.given, needs, strict=True) if needed]
            keep = torch._C._autograd._get_current_graph_task_keep_graph()
            results, upstream = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(results, wanted, upstream, retain_graph=keep, allow_unused=True))
            return tuple(next(found) if needed else None for needed in needs)

    def run(*args: Any) -> Any:
        learns = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        return Graph.apply(*args) if learns else gm(*args)

    return run


def _is_constant(result: Any) -> bool:
    return isinstance(result, Tensor) and not result.requires_grad
