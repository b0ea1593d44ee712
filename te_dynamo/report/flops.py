"""Which GEMMs ran, and which of them in FP8: read from the planned graphs, and observed outside of graphs.

A weight GEMM multiplies an activation with a parameter, or with a value computed from parameters only. Its backward is one
GEMM of the same size for each operand that needs a gradient. Outer products (no dimension is summed over), convolutions,
products of two parameters and recomputation under activation checkpointing do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from te_dynamo.ir import op_of, site_of
from te_dynamo.ir.graph import example, fake, fake_mode_of, is_call, submodules, tensor
from te_dynamo.ir.meta import ORIGIN, PATH, PLAN, members_of
from te_dynamo.ir.sizes import number
from te_dynamo.lowering.cost import flops_of_gemm
from te_dynamo.passes.higher_order import OPERANDS
from te_dynamo.passes.regions import regions
from te_dynamo.passes.weights import is_owned, source_of
from te_dynamo.report.isolation import Memory
from te_dynamo.sites import module_path

aten = torch.ops.aten
# The position of the first of the two matrices among the arguments.
GEMMS = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::mv": 0,
    "aten::linear": 0,
    "aten::addmm": 1,
    "aten::baddbmm": 1,
    "aten::addmv": 1,
    "aten::_grouped_mm": 0,
    "transformers::grouped_mm_fallback": 0,  # by name: it only exists once a mixture of experts does
}
# Functions of several tensors that are never matrix products: not worth running.
ELEMENTWISE = frozenset({torch.add, torch.sub, torch.mul, torch.div, torch.where, torch.cat, torch.stack})


@dataclass(frozen=True)
class CountedGemm:
    """node, path: the name of its node and the module that contains it; weight: whether it is a weight GEMM; argument: which input of
    the outermost graph is its weight (None if it multiplies activations, or no input is the weight); forward, backward: FLOPs of one
    call; fp8, fp8_backward: whether these are in FP8."""

    node: str
    path: str
    weight: bool
    argument: int | None
    forward: int
    backward: int
    fp8: bool
    fp8_backward: bool


@dataclass(frozen=True)
class Visit:
    """One run through a graph, or through a sub-graph of it.

    unit: the graph; places: the path of the site, for the name of each node that a site may refer to; gemms: what runs in the graph
    itself, not in its sub-graphs; within: the operator whose sub-graph it is, "" if te_fp8 rewrites that operator's sub-graphs too;
    uncounted: the names of operations with a parameter that cannot run by themselves, as inside a transform of torch.func.
    """

    unit: GraphModule
    places: dict[str, str]
    gemms: list[CountedGemm]
    within: str = ""
    uncounted: tuple[str, ...] = ()


class Origin(Enum):
    """What a value is computed from: parameters (and constants) only, constants (and buffers) only, or activations."""

    WEIGHT = "weight"
    CONSTANT = "constant"
    ACTIVATION = "activation"


@dataclass(frozen=True)
class Value:
    """learns: whether it needs a gradient; argument: the position of the parameter that it comes from."""

    origin: Origin
    learns: bool
    argument: int | None = None


UNKNOWN = Value(Origin.ACTIVATION, learns=True)


def visits_of(gm: GraphModule, grad_enabled: bool) -> list[Visit]:
    """What runs in a call of a planned graph (or of one that was left as Dynamo made it): sub-graphs first, once for each of
    their calls, the graph itself last."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return list(_visit(gm, [_input(node, i) for i, node in enumerate(placeholders)], grad_enabled))


def _visit(gm: GraphModule, arguments: Sequence[Value], grad_enabled: bool, within: str = "") -> Iterator[Visit]:
    where = regions(gm.graph, grad_enabled)
    bodies = {node: body for node, _, body in submodules(gm)}
    inputs = iter(arguments)
    values: dict[Node, Value] = {}
    places: dict[str, str] = {}
    gemms: list[CountedGemm] = []
    uncounted: list[str] = []
    for node in gm.graph.nodes:
        grad = where[node][1]
        values[node] = (
            next(inputs, UNKNOWN) if node.op == "placeholder" else _computed(node, [values[n] for n in node.all_input_nodes], grad)
        )
        places |= _places(node)
        called = [bodies[n] for n in node.all_input_nodes if n in bodies]
        for body in called:
            operands = [values[n] for n in tree_leaves((node.args, node.kwargs)) if isinstance(n, Node) and n not in bodies]
            count = sum(n.op == "placeholder" for n in body.graph.nodes)
            operator = within if node.target in OPERANDS else getattr(node.target, "__name__", str(node.target))
            yield from _visit(body, operands[-count:] if count <= len(operands) else [], grad, operator)
        if not called:
            try:
                gemms += _gemms_at(node, values, grad)
            except _CannotRun:
                if any(values[n].origin is Origin.WEIGHT for n in node.all_input_nodes):
                    uncounted.append(node.name)
    yield Visit(gm, places, gemms, within, tuple(uncounted))


def _input(placeholder: Node, position: int) -> Value:
    value = tensor(placeholder)
    if is_owned(placeholder):
        origin = Origin.WEIGHT
    else:
        origin = Origin.CONSTANT if value is None or "._buffers['" in source_of(placeholder) else Origin.ACTIVATION
    return Value(origin, value is not None and value.requires_grad, position)


def _computed(node: Node, inputs: Sequence[Value], grad: bool) -> Value:
    origins = {v.origin for v in inputs}
    if Origin.ACTIVATION in origins or is_call(node, torch.nn.functional.embedding):
        origin = Origin.ACTIVATION
    else:
        origin = Origin.WEIGHT if Origin.WEIGHT in origins else Origin.CONSTANT
    value = tensor(node)
    differentiable = value is None or value.is_floating_point()
    detached = node.op == "call_method" and node.target == "detach"
    return Value(origin, grad and differentiable and not detached and any(v.learns for v in inputs), _argument(inputs))


def _argument(values: Iterable[Value]) -> int | None:
    return next((v.argument for v in values if v.origin is Origin.WEIGHT), None)


def _places(node: Node) -> dict[str, str]:
    """The names of Dynamo's nodes that a node stands for, each with the path of its site."""
    if site_of(node) is None:
        return {node.name: module_path(node)}
    return {member.get(ORIGIN, node.name): member.get(PATH, "") or module_path(node) for member in members_of(node)}


def _gemms_at(node: Node, values: dict[Node, Value], grad: bool) -> Iterator[CountedGemm]:
    places = list(_places(node).items())

    def gemm(weights: Sequence[Value], forward: int, learning: int, fp8: bool, member: int = 0) -> CountedGemm:
        return CountedGemm(
            *places[member], bool(weights), _argument(weights), forward, forward * learning * grad, fp8, fp8 and backward_too
        )

    op = op_of(node)
    in_fp8 = PLAN in node.meta and node.meta[PLAN].recipe is not None
    backward_too = op is None or bool(op.roles.gradient)
    if op is not None and op.gemms(node):
        for member, (x, weight, *_) in enumerate(op.gemms(node)):
            learning = values[x].learns + values[weight].learns
            yield gemm([values[weight]], flops_of_gemm(fake(x), fake(weight)), learning, in_fp8, member)
    elif _may_multiply(node):
        inputs = [(n, values[n]) for n in node.all_input_nodes]
        owned, others = ([(n, v) for n, v in inputs if (v.origin is Origin.WEIGHT) == is_weight] for is_weight in (True, False))
        factors = [(n, v) for n, v in owned if (t := tensor(n)) is None or t.dim() > 1] or owned  # a bias is added: its gradient is no GEMM
        owned_learns, other_learns = (any(v.learns for _, v in group) for group in (factors, others))
        for is_weight, forward in _executed(node, values):
            yield gemm(
                [v for _, v in owned] if is_weight else [], forward, owned_learns + other_learns if is_weight else 2 * other_learns, in_fp8
            )


def _may_multiply(node: Node) -> bool:
    if node.op not in ("call_function", "call_method") or node.target in ELEMENTWISE or _makes_no_product(node):
        return False
    floating = [t for n in node.all_input_nodes if (t := tensor(n)) is not None and t.is_floating_point() and t.dim() > 0]
    return len(floating) > 1 and _first(example(node)) is not None


def _makes_no_product(node: Node) -> bool:
    """Whether it is one of our operations without a matrix product, such as a norm."""
    op = op_of(node)
    return op is not None and not op.is_site


def _first(value: Any) -> Tensor | None:
    """The first tensor of an operation's result."""
    return next((t for t in tree_leaves(value) if isinstance(t, Tensor)), None)


class _CannotRun(Exception):
    """An operation cannot run by itself."""


def _executed(node: Node, values: dict[Node, Value]) -> list[tuple[bool, int]]:
    """(whether it is a weight GEMM, its FLOPs) for each GEMM in an operation, observed by running it on its fake values."""
    weights = [t for n in node.all_input_nodes if values[n].origin is Origin.WEIGHT and (t := tensor(n)) is not None]
    observer = GemmObserver((t, "") for t in weights)
    args, kwargs = map_arg((node.args, node.kwargs), example)
    result = _first(example(node))
    assert result is not None
    lower = result.dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast(result.device.type, result.dtype) if lower else nullcontext()
    try:
        with fake_mode_of(node.graph), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), autocast, observer:
            if node.op == "call_method":
                getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.target(*args, **kwargs)
    except Exception as error:
        raise _CannotRun from error
    return [(seen.weight, seen.forward) for seen in observer.seen]


@dataclass(frozen=True)
class Seen:
    """A GEMM that ran. path: the weight's, as given to `GemmObserver`."""

    path: str
    weight: bool
    forward: int
    backward: int


class GemmObserver(TorchDispatchMode):
    """Records the GEMMs that run while it is on, and tells `memory` of writes. It does not affect compilation."""

    supports_higher_order_operators = True

    def __init__(self, weights: Iterable[tuple[Tensor, str]], memory: Memory | None = None) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.memory = memory
        self.resting = False
        self.owned = WeakTensorKeyDictionary()
        for weight, path in weights:
            self.owned[weight] = path

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @contextmanager
    def rest(self) -> Iterator[None]:
        """While open, nothing is recorded."""
        before, self.resting = self.resting, True
        try:
            yield
        finally:
            self.resting = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.resting or not isinstance(func, torch._ops.OpOverload) or func.namespace == "prim":
            return func(*args, **kwargs)
        operation, name = func._overloadpacket, func._schema.name
        if name not in GEMMS:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if self.memory is not None and func._schema.is_mutable:
            self._tell_writes(func, args, kwargs)
        result = func(*args, **kwargs)
        if name in GEMMS:
            self._note(name, args)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if inputs and operation is not aten.embedding and all(t in self.owned for t in inputs):
            for t in tree_leaves(result):
                if isinstance(t, Tensor):
                    self.owned[t] = self.owned[inputs[0]]
        return result

    def _note(self, name: str, args: Any) -> None:
        first = GEMMS[name]
        a, b = args[first : first + 2]
        weights = [t for t in (a, b) if t in self.owned]
        if len(weights) == 2 or number(a.shape[-1]) == 1:
            return
        columns = b.shape[:-1] if name == "aten::linear" else b.shape[1:] if b.dim() == 2 else b.shape[2:]
        forward = 2 * prod(number(s) for s in (*a.shape, *columns))
        backward = forward * (a.requires_grad + b.requires_grad) * torch.is_grad_enabled()
        self.seen.append(Seen(self.owned[weights[0]] if weights else "", bool(weights), forward, backward))

    def _tell_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[i] if i < len(args) else kwargs.get(argument.name)
                for t in tree_leaves(written):
                    if isinstance(t, Tensor):
                        self.memory.about_to_write(t)
