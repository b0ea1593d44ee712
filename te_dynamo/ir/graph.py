"""Helpers to read and write FX graphs of torch IR, used by every pass."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes

EXAMPLE = "example_value"  # Dynamo's name for a node's fake value
# Computes the fake values of functions that run several operators, without running them: a fake operator costs a third of a millisecond.
FAKES: dict[Callable[..., Any], Callable[..., Any]] = {}
INHERITED_META = ("nn_module_stack", "stack_trace", "source_fn_stack")


def example(node: Any) -> Any:
    """The fake value of a node; anything that is not a node stands for itself."""
    return node.meta.get(EXAMPLE) if isinstance(node, Node) else node


def tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, or None if it has none."""
    value = example(node)
    return value if isinstance(value, torch.Tensor) else None


def fake(node: Any) -> torch.Tensor:
    """The fake tensor of a node that is known to have one. Raises TypeError if it has none."""
    value = tensor(node)
    if value is None:
        raise TypeError(f"{node} is not a tensor")
    return value


def hint(size: Any) -> int | None:
    """A size as a number, without a guard: a symbolic size's value in this trace, None if that depends on data."""
    return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size


def is_call(node: Any, *targets: Callable[..., Any]) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_method(node: Any, *names: str) -> bool:
    return isinstance(node, Node) and node.op == "call_method" and node.target in names


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without a guard."""
    return statically_known_true(a == b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal, without a guard."""
    return len(a) == len(b) and all(map(same_size, a, b))


def operands(node: Any, *targets: Callable[..., Any]) -> tuple[tuple[Any, Any], ...]:
    """The operands of a plain binary call to one of `targets`, in both orders; () if `node` is not one, or has keywords (alpha, ...)."""
    if not is_call(node, *targets) or len(node.args) != 2 or node.kwargs:
        return ()
    return (node.args[0], node.args[1]), (node.args[1], node.args[0])


def fake_mode_of(graph: Graph) -> Any:
    """The FakeTensorMode of the graph's values (a null context if there is none, as in handmade graphs)."""
    for node in graph.nodes:
        value = tensor(node)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return contextlib.nullcontext()


def emit(
    graph: Graph,
    target: Callable[..., Any] | str,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    like: Node,
    value: Any = None,
) -> Node:
    """A new call to `target` (a function, or the name of a method of the first argument) at the graph's insertion point, with
    its fake value, and with the module stack and stack trace of `like`.

    value: the fake value, if the caller knows it; else `target` is run on the fake values of its arguments.
    """
    node = graph.create_node("call_method" if isinstance(target, str) else "call_function", target, tuple(args), kwargs or {})
    for key in INHERITED_META:
        if key in like.meta:
            node.meta[key] = like.meta[key]
    node.meta[EXAMPLE] = infer(node, fake_mode_of(graph)) if value is None else value
    return node


def emit_permuted(graph: Graph, x: Any, order: Sequence[int], like: Node) -> Any:
    """`x` with its dimensions in `order`; `x` itself if they already are."""
    return x if tuple(order) == tuple(range(len(order))) else emit(graph, torch.permute, (x, tuple(order)), like=like)


def emit_contiguous(graph: Graph, x: Any, like: Node) -> Node:
    """A contiguous copy of `x`."""
    return emit(graph, torch.clone, (x,), {"memory_format": torch.contiguous_format}, like=like)


def infer(node: Node, fake_mode: Any, value_of: Callable[[Node], Any] = example) -> Any:
    """Runs a node's target on the fake values of its arguments. value_of: gives these values, by default those in the nodes' meta."""
    args, kwargs = map_arg((node.args, node.kwargs), value_of)
    if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
        return args[0][args[1]]
    if node.op == "call_function" and node.target in FAKES:
        return FAKES[node.target](*args, **kwargs)
    with fake_mode, torch.no_grad(), torch.amp.autocast("cpu", enabled=False):
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)


def fake_like(like: torch.Tensor, shape: Sequence[Any], dtype: torch.dtype, stride: Sequence[Any] | None = None) -> torch.Tensor:
    """A new tensor on the device of `like`, fake if `like` is. Avoids the cost of a fake operator.

    stride: None for a contiguous tensor.
    """
    is_fake = isinstance(like, FakeTensor)
    options: Any = {"dtype": dtype, "device": "meta" if is_fake else like.device}
    with _disable_current_modes() if is_fake else contextlib.nullcontext():
        made = torch.empty(tuple(shape), **options) if stride is None else torch.empty_strided(tuple(shape), tuple(stride), **options)
        return FakeTensor(like.fake_mode, made, like.device) if isinstance(like, FakeTensor) else made


def upstream(*nodes: Any, inputs: Callable[[Node], Iterable[Any]] = operator.attrgetter("all_input_nodes")) -> Iterator[Node]:
    """`nodes` and the nodes that they are computed from, each once, depth first.

    inputs: which inputs of a node to follow, by default all.
    """
    seen: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if isinstance(node, Node) and node not in seen:
            seen.add(node)
            yield node
            waiting += inputs(node)


def submodules(gm: GraphModule) -> Iterator[tuple[Node, str, GraphModule]]:
    """The sub-graphs that higher-order operators of `gm` run: (the get_attr node, its name, the sub-graph)."""
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value = getattr(gm, node.target, None) if "." not in node.target else None
            if isinstance(value, GraphModule):
                yield node, node.target, value


def erase_if_dead(graph: Graph, nodes: Sequence[Node]) -> None:
    """Erases those of `nodes` that are no longer used, users first. Only for nodes known to be pure."""
    for node in sorted({n for n in nodes if not n._erased}, reverse=True):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def copy_graph_module(gm: GraphModule) -> GraphModule:
    """A copy whose graph, and whose sub-graphs, may be changed without touching `gm`; parameters and metadata are shared."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    old_output = gm.graph.output_node()
    new_output = graph.output(output)
    new_output.meta = dict(old_output.meta)
    for old, new in mapping.items():
        # Dynamo's record of an argument holds a weak reference to it, which dies when Dynamo is done.
        new.meta = {key: value for key, value in old.meta.items() if key != "grapharg"}
        if old.op == "placeholder":
            new._dynamo_source = getattr(old, "_dynamo_source", None)
    copy = _make_graph_module(gm, graph)  # while Dynamo compiles, its code is only generated on demand
    copy.meta = dict(gm.meta)
    for key, value in gm.__dict__.items():
        if key not in copy.__dict__ and not key.startswith("__"):
            copy.__dict__[key] = value
    for name, sub in {name: sub for _, name, sub in submodules(gm)}.items():
        child = copy_graph_module(sub)
        child.__name__ = getattr(sub, "__name__", name)
        setattr(copy, name, child)
    return copy
