"""Stage 1: one spelling for each operation, so that a rule needs to know only one.

Methods become functions, operators become torch functions, keyword arguments go where the signature has them, casts
are one method, and in-place arithmetic on a value that nothing else reads is out of place. Nothing is computed
differently: the graph gives bit-identical results.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._dynamo.source import AttrSource
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from te_dynamo.ir.graph import EXAMPLE, example, fake_mode_of, infer, is_call, is_method, tensor
from te_dynamo.passes.effects import storage, writes

LINEAR = torch._C._nn.linear
SDPA = torch._C._nn.scaled_dot_product_attention

BINARY: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.add: torch.add,
    operator.sub: torch.sub,
    operator.mul: torch.mul,
    operator.truediv: torch.div,
    operator.matmul: torch.matmul,
    operator.pow: torch.pow,
    operator.le: torch.le,
    operator.lt: torch.lt,
    operator.ge: torch.ge,
    operator.gt: torch.gt,
    operator.eq: torch.eq,
    operator.ne: torch.ne,
    operator.and_: torch.bitwise_and,
    operator.or_: torch.bitwise_or,
    operator.xor: torch.bitwise_xor,
}
SWAPPED: dict[Callable[..., Any], Callable[..., Any]] = {  # `scalar op tensor`, spelled tensor first
    operator.add: torch.add,
    operator.mul: torch.mul,
    operator.sub: torch.rsub,
    operator.le: torch.ge,
    operator.lt: torch.gt,
    operator.ge: torch.le,
    operator.gt: torch.lt,
    operator.eq: torch.eq,
    operator.ne: torch.ne,
}
UNARY: dict[Callable[..., Any], Callable[..., Any]] = {operator.neg: torch.neg, operator.invert: torch.bitwise_not, operator.abs: torch.abs}
# Tensor methods that are spelled as the torch function of the same name.
METHODS = frozenset(
    {
        "abs",
        "add",
        "addmm",
        "amax",
        "baddbmm",
        "bitwise_and",
        "bitwise_not",
        "bitwise_or",
        "bmm",
        "chunk",
        "clamp",
        "cos",
        "cumsum",
        "div",
        "eq",
        "exp",
        "flatten",
        "ge",
        "gt",
        "le",
        "log_softmax",
        "logical_and",
        "logical_not",
        "logical_or",
        "lt",
        "masked_fill",
        "matmul",
        "mean",
        "mm",
        "mul",
        "ne",
        "neg",
        "permute",
        "pow",
        "reciprocal",
        "rsqrt",
        "sigmoid",
        "sin",
        "softmax",
        "split",
        "sqrt",
        "square",
        "squeeze",
        "std",
        "sub",
        "sum",
        "t",
        "tanh",
        "transpose",
        "tril",
        "triu",
        "unsqueeze",
        "var",
    }
)
ALIASES: dict[Any, Callable[..., Any]] = {
    F.linear: LINEAR,
    F.scaled_dot_product_attention: SDPA,
    torch.true_divide: torch.div,
    torch.divide: torch.div,
    torch.multiply: torch.mul,
    torch.subtract: torch.sub,
    torch.swapaxes: torch.transpose,
    torch.swapdims: torch.transpose,
    torch.rms_norm: F.rms_norm,
}
# Where keyword arguments go; what is not named here stays a keyword. A default of `...` ends what must be present.
SIGNATURES: dict[Callable[..., Any], tuple[tuple[str, Any], ...]] = {
    LINEAR: (("input", ...), ("weight", ...), ("bias", None)),
    SDPA: (("query", ...), ("key", ...), ("value", ...), ("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False)),
    F.layer_norm: (("input", ...), ("normalized_shape", ...), ("weight", None), ("bias", None), ("eps", 1e-5)),
    F.rms_norm: (("input", ...), ("normalized_shape", ...), ("weight", None), ("eps", None)),
    F.dropout: (("input", ...), ("p", 0.5), ("training", True), ("inplace", False)),
}
PARTIAL_SIGNATURES: dict[Callable[..., Any], tuple[str, ...]] = {
    torch.addmm: ("input", "mat1", "mat2"),
    torch.baddbmm: ("input", "batch1", "batch2"),
    torch.matmul: ("input", "other"),
    torch.mm: ("input", "mat2"),
    torch.bmm: ("input", "mat2"),
    torch.softmax: ("input", "dim"),
    torch.mean: ("input", "dim", "keepdim"),
    torch.sum: ("input", "dim", "keepdim"),
    torch.pow: ("input", "exponent"),
    torch.add: ("input", "other"),
    torch.sub: ("input", "other"),
    torch.mul: ("input", "other"),
    torch.div: ("input", "other"),
    torch.transpose: ("input", "dim0", "dim1"),
    torch.masked_fill: ("input", "mask", "value"),
    torch.where: ("condition", "input", "other"),
}
KEYWORD_DEFAULTS = {SDPA: {"scale": None, "enable_gqa": False}}
CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: torch.add,
    operator.isub: torch.sub,
    operator.imul: torch.mul,
    operator.itruediv: torch.div,
    "add_": torch.add,
    "sub_": torch.sub,
    "mul_": torch.mul,
    "div_": torch.div,
    "masked_fill_": torch.masked_fill,
}


def canonicalize(gm: GraphModule) -> None:
    """Rewrites `gm` (a copy of Dynamo's graph), in place."""
    graph = gm.graph
    for node in list(graph.nodes):
        if node.op in ("call_function", "call_method"):
            if _module_number(graph, node):
                continue
            _out_of_place(graph, node)
            _operator(node)
            _method(node)
            _arguments(node)
            _remove_identity(graph, node)
    gm.recompile()


def _module_number(graph: Graph, node: Node) -> bool:
    """A float that a module holds (a norm's eps, an attention's scale) is a number again.

    Under `dynamic=True` Dynamo makes an input of it, since it might change: one of these does not, and a guard has the model
    compiled again if it does.
    """
    value = node.meta.get(EXAMPLE)
    if not is_method(node, "item") or not isinstance(value, torch.SymFloat) or not value.node.has_hint():
        return False
    if not isinstance(getattr(node.args[0], "_dynamo_source", None), AttrSource):
        return False
    number = float(value)
    for user in list(node.users):
        user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda n: number if n is node else n)
    graph.erase_node(node)
    return True


def _operator(node: Node) -> None:
    if node.op != "call_function":
        return
    node.target = ALIASES.get(node.target, node.target)
    tensors = [tensor(a) is not None for a in node.args]
    if node.target in BINARY and len(tensors) == 2 and tensors[0]:
        node.target = BINARY[node.target]
    elif node.target in SWAPPED and len(tensors) == 2 and tensors[1]:
        node.target, node.args = SWAPPED[node.target], (node.args[1], node.args[0])
    elif node.target in UNARY and tensors == [True]:
        node.target = UNARY[node.target]
    elif node.target is torch.layer_norm:  # F.layer_norm, and a flag that says nothing about the result
        node.target, node.args = F.layer_norm, node.args[:5]
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "cudnn_enable"}
    elif (attribute := _transposing_attribute(node)) and tensors[0] and (attribute == "mT" or tensor(node.args[0]).dim() == 2):
        node.target, node.args = torch.transpose, (node.args[0], -2, -1)
    elif node.target is F.softmax:
        names = ("input", "dim", "_stacklevel", "dtype")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        if given.get("dim") is not None:
            node.target, node.args = torch.softmax, (given["input"], given["dim"])
            node.kwargs = {"dtype": given["dtype"]} if given.get("dtype") is not None else {}


def _transposing_attribute(node: Node) -> str | None:
    """Which of `x.T` and `x.mT` a node is; torch 2.15 makes operators of them."""
    if node.target is builtins.getattr and node.args[1] in ("T", "mT"):
        return str(node.args[1])
    attributes: dict[Any, str] = {torch.ops.aten.numpy_T: "T", torch.ops.aten.mT: "mT"}
    return attributes.get(node.target)


def _method(node: Node) -> None:
    if node.op != "call_method" or tensor(node.args[0]) is None:
        return
    name, x, rest = node.target, node.args[0], node.args[1:]
    if name in ("view", "reshape", "permute", "view_as", "reshape_as"):
        if name.endswith("_as"):
            shape: Any = tuple(tensor(rest[0]).shape) if all(isinstance(s, int) for s in tensor(rest[0]).shape) else None
        else:
            shape = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list, torch.Size)) else rest
            shape = node.kwargs.get("dims", node.kwargs.get("shape", shape))
            if len(rest) == 1 and isinstance(rest[0], Node) and isinstance(example(rest[0]), tuple):  # another tensor's size
                return
        if shape is None or any(isinstance(s, torch.dtype) for s in shape):  # view(dtype) reinterprets bits
            return
        _become(node, torch.permute if name == "permute" else torch.reshape, (x, tuple(shape)))
    elif name in CASTS and not rest:
        _cast(node, CASTS[name])
    elif name in ("to", "type_as"):
        _canonical_to(node)
    elif name in METHODS:
        node.op, node.target = "call_function", getattr(torch, name)
        if node.target is torch.softmax and node.kwargs.get("dtype", 0) is None:
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "dtype"}


def _canonical_to(node: Node) -> None:
    """`to` in all its forms: where the device stays, it is a cast to the dtype of the result."""
    before, after = tensor(node.args[0]), tensor(node)
    rest = {"copy", "memory_format"} & {k for k, v in node.kwargs.items() if v}
    if after is None or before is None or rest or before.device != after.device or any(a is True for a in node.args[1:]):
        return
    _cast(node, after.dtype)


def _cast(node: Node, dtype: torch.dtype) -> None:
    node.op, node.target, node.args, node.kwargs = "call_method", "to", (node.args[0], dtype), {}


def _become(node: Node, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    node.op, node.target, node.args, node.kwargs = "call_function", target, args, {}


def _arguments(node: Node) -> None:
    """Keyword arguments go to their positions."""
    if node.op != "call_function":
        return
    kwargs = dict(node.kwargs)
    if node.target in SIGNATURES:
        args = list(node.args)
        for name, default in SIGNATURES[node.target][len(args) :]:
            args.append(kwargs.pop(name) if default is ... else kwargs.pop(name, default))
        node.args, node.kwargs = tuple(args), KEYWORD_DEFAULTS.get(node.target, {}) | kwargs
    elif node.target in PARTIAL_SIGNATURES and kwargs:
        args = list(node.args)
        for name in PARTIAL_SIGNATURES[node.target][len(args) :]:
            if name not in kwargs:
                break
            args.append(kwargs.pop(name))
        node.args, node.kwargs = tuple(args), kwargs
    if node.target is torch.permute and len(node.args) > 2:
        node.args = (node.args[0], tuple(node.args[1:]))
    elif node.target is torch.reshape and len(node.args) == 2:
        node.args = (node.args[0], tuple(node.args[1]) if isinstance(node.args[1], (list, tuple)) else node.args[1])
    elif node.target is torch.t:
        node.target, node.args = torch.transpose, (node.args[0], 0, 1) if _rank(node.args[0]) == 2 else node.args
        if len(node.args) == 1:
            node.target = torch.t


def _rank(value: Any) -> int:
    fake = tensor(value)
    return -1 if fake is None else fake.dim()


def _remove_identity(graph: Graph, node: Node) -> None:
    """Casts to the dtype at hand and inactive dropout give back their input itself."""
    if node.op == "call_method" and node.target == "to" and len(node.args) == 2:
        x, after = tensor(node.args[0]), tensor(node)
        same = bool(x is not None and after is not None and x.dtype == after.dtype == node.args[1] and x.device == after.device)
    else:
        same = is_call(node, F.dropout) and (node.args[2] is False or bool(node.args[1] == 0))
    if same:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def _out_of_place(graph: Graph, node: Node) -> None:
    """An in-place write becomes out of place where no one can tell: the value written is made in this graph, and everything
    that reads its memory afterwards reads it through the write's result."""
    if node.target not in OUT_OF_PLACE or not writes(node):
        return
    target = node.args[0]
    memory = storage(target)
    value, before = tensor(node), tensor(target)
    if memory is None or value is None or before is None or target.op == "placeholder":
        return
    order = {n: i for i, n in enumerate(graph.nodes)}
    for other in graph.nodes:
        if other is node or storage(other) != memory or order[other] > order[node]:
            continue
        if other.op in ("placeholder", "get_attr") or any(order[user] > order[node] for user in other.users):
            return
    new_target = OUT_OF_PLACE[node.target]
    old = (node.op, node.target)
    node.op, node.target = "call_function", new_target
    result = infer(node, fake_mode_of(graph))
    if result.dtype != before.dtype or result.shape != before.shape or result.stride() != before.stride():
        node.op, node.target = old
        return
    node.meta[EXAMPLE] = result
    _refresh_views(graph, node, memory, order)


def _refresh_views(graph: Graph, node: Node, memory: int, order: dict[Node, int]) -> None:
    """Views of the written value now are views of the new one: their fake values must say so."""
    fake_mode = fake_mode_of(graph)
    for other in graph.nodes:
        if order[other] > order[node] and storage(other) == memory and other.op in ("call_function", "call_method"):
            if other.op == "call_method":
                args, kwargs = torch.fx.node.map_arg((other.args, other.kwargs), lambda n: n.meta.get(EXAMPLE))
                with fake_mode, torch.no_grad():
                    other.meta[EXAMPLE] = getattr(args[0], other.target)(*args[1:], **kwargs)
            else:
                other.meta[EXAMPLE] = infer(other, fake_mode)
