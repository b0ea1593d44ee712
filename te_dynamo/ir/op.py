"""The single declaration of an operation: its definition, and everything that passes, specs, reports and providers need to know about it.

    @operation(kind="linear", fake=..., gemms=..., forward=("input", "weight"), gradient=("grad_output",))
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype) -> Tensor: ...

The function is the definition: ordinary torch in high precision, so that a graph that contains it still runs and can be
compared with the graph it came from. Tensors are passed by position, attributes by keyword. Passes ask `op_of(node)` and
do not name operations; only the rules that emit them do.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, get_type_hints

from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from te_dynamo.ir.graph import FAKES, example
from te_dynamo.recipe import Recipe

Function = TypeVar("Function", bound=Callable[..., Any])


class Gemm(NamedTuple):
    """A weight GEMM of a node: `x [..., K] @ weight [N, K].T + bias [N]`, the node's arguments. output: the index of its result among
    the node's, None if the node has a single result."""

    x: Node
    weight: Node
    bias: Node | None
    output: int | None = None


class ScaledTensor(NamedTuple):
    """An FP8 tensor with a scale, by its role in a member of the node (a GEMM, or the node itself if it has no GEMMs)."""

    member: int
    role: str


@dataclass(frozen=True)
class Roles:
    """The names of the FP8 tensors of each member of an operation, in the order of their scales.

    A node's scales are those of its first member, then those of its second, and so on: `place` gives the index.
    prefix: what precedes a role in the name of its saved state.
    """

    forward: tuple[str, ...] = ()
    gradient: tuple[str, ...] = ()
    prefix: str = ""

    def place(self, role: str, member: int = 0) -> int:
        """The index of a tensor's scale among the forward, or gradient, scales of its node."""
        roles = self.forward if role in self.forward else self.gradient
        return member * len(roles) + roles.index(role)

    @property
    def saved_forward(self) -> tuple[str, ...]:
        return tuple(self.prefix + role for role in self.forward)

    @property
    def saved_gradient(self) -> tuple[str, ...]:
        return tuple(self.prefix + role for role in self.gradient)


class Invariant(NamedTuple):
    """A condition on a node: `holds` is called with the fake values of its arguments by name, and `out`."""

    says: str
    holds: Callable[[types.SimpleNamespace], bool]


def _none(*_: Any, **__: Any) -> tuple[()]:
    return ()


def _zero(*_: Any, **__: Any) -> int:
    return 0


@dataclass(frozen=True, eq=False)
class SemanticOp:
    """An operation.

    definition: the function that a graph calls; kind: what reports call its sites.
    fake: computes the fake result, with the definition's dtype, shape and strides, without running the definition.
    roles: the FP8 tensors of a member. An operation without roles is never computed in FP8 by itself, but may compute the
        operand of one that is: it is then the *producer* of that one.
    gemms: the weight GEMMs of a node, its members. An operation with roles and no GEMM has one member, the node, and its
        scale state is kept with the nearest weight.
    shared: which tensors share one scale, as groups of `ScaledTensor`, given a node's attributes and its number of members.
    alone: the attributes that one member would have by itself, given the node's; None if the members are one GEMM.
    attributes_of: what an implementation must know about a node under a recipe, besides its keywords; by name.
    outputs: the node's results, from the tensors that an implementation computed (one for each GEMM that it ran).
    activation_flops: FLOPs of products of activations, from the shapes of a node's arguments.
    forward_only: the operation that it becomes if its backward is in high precision, with the same inputs and no gradient roles.
    skipping: the operation that it becomes where padding is skipped, with the same inputs.
    grouped: the operation that it becomes before it is planned, and whose implementations it uses.
    noted: what a node's `meta` must contain before it is planned: the type of each entry, by key.
    reads: how many of its first inputs are activations: if these are one GEMM's whole output, it could hand the GEMM's gradient over.
    by_rows: whether, with these attributes, each row [..., :] of the result depends only on the same rows of the inputs, so that it
        could be computed together with the GEMM that reads it.
    invariants: what must hold between a node's arguments and result.
    in_aten: the ATen operators that would run if the model were not rewritten, each with tensors like its arguments, given the
        tensor inputs: a checkpoint policy is asked about them.
    """

    definition: Callable[..., Any]
    kind: str
    fake: Callable[..., Any]
    roles: Roles = Roles()
    gemms: Callable[[Node], Sequence[Gemm]] = _none
    shared: Callable[[Mapping[str, Any], int], Sequence[Sequence[ScaledTensor]]] = _none
    alone: Callable[[Mapping[str, Any], int], Mapping[str, Any] | None] = lambda attributes, member: None
    attributes_of: Callable[[Node, Recipe | None], Mapping[str, Any]] = lambda node, recipe: {}
    outputs: Callable[[Mapping[str, Any], list[Any]], list[Any]] = lambda attributes, computed: computed
    activation_flops: Callable[..., int] = _zero
    forward_only: str = ""
    skipping: str = ""
    grouped: str = ""
    noted: Mapping[str, type] = field(default_factory=dict)
    reads: int = 0
    by_rows: Callable[[Mapping[str, Any]], bool] = lambda attributes: True
    invariants: tuple[Invariant, ...] = ()
    in_aten: Callable[..., Sequence[tuple[OpOverload, tuple[Any, ...]]]] = _none

    @property
    def name(self) -> str:
        return self.definition.__name__

    @property
    def owns_gemms(self) -> bool:
        """Whether its nodes have weight GEMMs, which are then their members."""
        return self.gemms is not _none

    @property
    def is_site(self) -> bool:
        """Whether it is computed in FP8 by itself, with scales of its own."""
        return bool(self.roles.forward)

    @cached_property
    def parameters(self) -> tuple[dict[str, tuple[inspect.Parameter, Any]], dict[str, tuple[inspect.Parameter, Any]]]:
        """(tensors, attributes): name -> (parameter, type)."""
        hints = get_type_hints(self.definition)
        tensors: dict[str, tuple[inspect.Parameter, Any]] = {}
        attributes: dict[str, tuple[inspect.Parameter, Any]] = {}
        for name, parameter in inspect.signature(self.definition).parameters.items():
            table = attributes if parameter.kind is inspect.Parameter.KEYWORD_ONLY else tensors
            table[name] = (parameter, hints[name])
        return tensors, attributes

    def inputs(self, node: Node) -> dict[str, Any]:
        """A node's tensor arguments by name, including defaults."""
        tensors, _ = self.parameters
        given = (*node.args, *(p.default for p, _ in list(tensors.values())[len(node.args) :]))
        return dict(zip(tensors, given, strict=True))

    def examples(self, node: Node) -> dict[str, Any]:
        """The fake values of a node's tensor arguments by name."""
        return {name: map_arg(given, example) for name, given in self.inputs(node).items()}

    def attributes(self, node: Node) -> dict[str, Any]:
        """A node's attributes by name, including defaults."""
        _, attributes = self.parameters
        return {name: node.kwargs.get(name, parameter.default) for name, (parameter, _) in attributes.items()}

    def all_attributes(self, node: Node, recipe: Recipe | None) -> dict[str, Any]:
        """What an implementation is told about a node: its attributes, and those of `attributes_of`."""
        return self.attributes(node) | dict(self.attributes_of(node, recipe))

    def broken_invariants(self, node: Node) -> Iterator[str]:
        """The invariants that a node breaks; its arguments must have the right types."""
        arguments = types.SimpleNamespace(**self.examples(node), **self.attributes(node), out=example(node))
        yield from (i.says for i in self.invariants if not i.holds(arguments))


_OPS: dict[Any, SemanticOp] = {}
_BY_NAME: dict[str, SemanticOp] = {}


def operation(
    *, kind: str, fake: Callable[..., Any], forward: tuple[str, ...] = (), gradient: tuple[str, ...] = (), prefix: str = "", **facts: Any
) -> Callable[[Function], Function]:
    """Declares a function to be the definition of an operation; the keywords are those of `SemanticOp` and `Roles`."""
    if ambiguous := set(forward) & set(gradient):
        raise ValueError(f"te_fp8: a role is either forward or gradient; {kind!r} has both of {', '.join(sorted(ambiguous))}")

    def declare(definition: Function) -> Function:
        op = SemanticOp(definition, kind, fake, Roles(forward, gradient, prefix), **facts)
        _OPS[definition] = _BY_NAME[op.name] = op
        FAKES[definition] = fake
        return definition

    return declare


def op_of(node: Any) -> SemanticOp | None:
    """The operation of a node, or of a function; None if it is not one."""
    target = node.target if isinstance(node, Node) else node
    return _OPS.get(target) if callable(target) else None


def op_named(name: str) -> SemanticOp:
    """Raises KeyError if there is none."""
    return _BY_NAME[name]


def all_ops() -> list[SemanticOp]:
    return list(_BY_NAME.values())


def site_of(node: Any) -> SemanticOp | None:
    """The operation of a node that is computed in FP8 with scales of its own; None for any other node."""
    op = op_of(node)
    return op if op is not None and op.is_site else None
