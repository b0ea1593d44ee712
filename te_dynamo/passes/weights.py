"""Which tensors of a graph are weights: parameters, seen through the casts and views between them and their use."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from te_dynamo.ir.graph import fake, is_call, is_method, same_shape, tensor, upstream
from te_dynamo.ir.meta import PARAMETER
from te_dynamo.sites import clean_path

VIEWS: tuple[Callable[..., Any], ...] = (
    torch.chunk,
    torch.flatten,
    torch.narrow,
    torch.permute,
    torch.reshape,
    torch.select,
    torch.split,
    torch.squeeze,
    torch.t,
    torch.transpose,
    torch.unbind,
    torch.unflatten,
    torch.unsqueeze,
)
METHOD_VIEWS = ("to", "type", "contiguous", "detach")


@dataclass(frozen=True)
class WeightRef:
    """root: the parameter's placeholder; chain: the casts and views that lead from it to the node asked about, in order. computed: more
    than casts and views lead there, and other parameters may go into it too."""

    root: Node
    chain: tuple[Node, ...]
    computed: bool = False


def weight_of(node: Any) -> WeightRef | None:
    """The parameter behind `node`; None if there is none, or if it is more than cast and viewed."""
    root, chain = origin(node)
    return WeightRef(root, chain) if root is not None and is_parameter(root) else None


def weight_of_gemm(node: Any) -> WeightRef | None:
    """The parameter that stands for the weight of a GEMM: the weight itself or, if that is computed from parameters (weight norm, pruning
    and other parametrizations, a merged adapter), the first of them that has its shape. None if there is none."""
    ref, value = weight_of(node), tensor(node)
    if ref is not None or value is None or not depends_on_weights_only(node):
        return ref
    sources = sorted(n for n in upstream(node) if is_owned(n))
    alike = [n for n in sources if same_shape(fake(n).shape, value.shape)]
    return WeightRef(alike[0], (), computed=True) if alike else None


def origin(node: Any) -> tuple[Node | None, tuple[Node, ...]]:
    """The node that `node` is a cast or view of, and the nodes that lead from it to `node`."""
    chain: list[Node] = []
    while is_view(node):
        chain.append(node)
        node = node.args[0]
    return (node if isinstance(node, Node) else None), tuple(reversed(chain))


def is_view(node: Any) -> bool:
    """Whether `node` only casts, reorders or selects parts of its first argument."""
    if is_call(node, operator.getitem):
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return not any(isinstance(i, (Node, list)) for i in index)
    return is_call(node, *VIEWS) or is_method(node, *METHOD_VIEWS)


def is_parameter(node: Node) -> bool:
    """Whether a placeholder is a parameter: of a module, closed over, or an argument that is trained as one (a 2-D leaf).

    In the sub-graph of a higher-order operator no placeholder says where it comes from: `meta[PARAMETER]` does.
    """
    value = tensor(node)
    if node.op != "placeholder" or value is None:
        return False
    return is_owned(node) or (value.requires_grad and value.is_leaf and value.dim() == 2)


def is_owned(node: Node) -> bool:
    """Whether a placeholder is a parameter for certain, and not an argument that happens to require grad."""
    declared = bool(node.meta.get(PARAMETER)) or "._parameters['" in source_of(node)
    return node.op == "placeholder" and (declared or isinstance(tensor(node), torch.nn.Parameter))


def is_frozen(node: Node) -> bool:
    """Whether a placeholder is a parameter that is not trained."""
    return is_owned(node) and not fake(node).requires_grad


def depends_on_weights_only(node: Any) -> bool:
    """Whether `node` is computed from at least one parameter and from nothing that changes with the model's inputs."""
    found = False
    for source in upstream(node):
        if source.op == "placeholder" and not is_buffer(source):
            if not is_owned(source):
                return False
            found = True
    return found


def is_buffer(node: Node) -> bool:
    """Whether a placeholder is a module's buffer."""
    return "._buffers['" in source_of(node)


def source_of(node: Node) -> str:
    """Dynamo's name for where a placeholder comes from; "" where it has none."""
    source = getattr(node, "_dynamo_source", None)
    return source.name if source is not None and isinstance(source.name, str) else ""


def path_of(placeholder: Node) -> str:
    """The path of the module that owns a parameter, inside the compiled module, with the parameter's name where it is not
    "weight"; a variable's name for a parameter that no module owns; "" where the graph does not tell."""
    source = source_of(placeholder)
    path = clean_path(source)
    if not path:
        variable = re.fullmatch(r"[LG]\['([^']*)'\].*", source)
        return variable.group(1) if variable and variable.group(1) != "self" else ""
    return path.removesuffix("weight").removesuffix(".") if path.split(".")[-1] == "weight" else path
