"""What is allowed in the graph after each stage: which targets, with which arguments and which metadata.

A spec is a table. `check` reads a graph against it and gives every violation as a sentence that names the node, its
target, what is wrong and the remedy. The tests check each stage's output, and so does the option `verify`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from te_dynamo import ops
from te_dynamo.ir import all_ops, op_of
from te_dynamo.ir.graph import EXAMPLE, example, is_call, is_method, tensor
from te_dynamo.ir.meta import MEMBERS, PLAN, SITE, SLOTS
from te_dynamo.ir.op import SemanticOp
from te_dynamo.ir.state_inputs import StateInput
from te_dynamo.passes import canonicalize as canonical
from te_dynamo.passes.attach import Slots
from te_dynamo.passes.higher_order import rewritable_units
from te_dynamo.passes.plan import Plan
from te_dynamo.passes.regions import AUTOCAST, transformed
from te_dynamo.sites import Site


class SpecError(AssertionError):
    """A graph is not what a stage must leave: a mistake in te_dynamo. `.violations` has one sentence for each."""

    def __init__(self, stage: str, violations: Sequence[str]) -> None:
        self.violations = list(violations)
        shown = "\n".join(f"  {v}" for v in self.violations[:20])
        more = f"\n  and {len(self.violations) - 20} more" if len(self.violations) > 20 else ""
        super().__init__(f"te_fp8: the graph after stage {stage!r} breaks its spec:\n{shown}{more}")


class Ban(NamedTuple):
    """A target that is not allowed where `when` holds for the node, and what to write instead."""

    remedy: str
    when: Callable[[Node], bool] = lambda node: True


class Problem(NamedTuple):
    wrong: str
    remedy: str


Check = Callable[[Node], Iterable[Problem]]
GraphCheck = Callable[[GraphModule], Iterable[tuple[Node, Problem]]]


@dataclass(frozen=True)
class Spec:
    """What a stage's output must be.

    semantic: whether a semantic op is allowed in it, and why the others are not; functions, methods: targets that are not allowed;
    metadata: the keys that semantic ops must carry, and the type of each; node_checks, graph_checks: what a table cannot express.
    """

    name: str
    semantic: Callable[[SemanticOp], bool] = lambda op: False
    no_other_semantic: str = ""
    functions: Mapping[Callable[..., Any], Ban] = field(default_factory=dict)
    methods: Mapping[str, Ban] = field(default_factory=dict)
    metadata: Callable[[SemanticOp], Mapping[str, type]] = lambda op: {}
    node_checks: tuple[Check, ...] = ()
    graph_checks: tuple[GraphCheck, ...] = ()


def check(gm: GraphModule, spec: Spec) -> list[str]:
    """The violations of `spec` in `gm` and in its sub-graphs that are rewritten; empty where there are none."""
    return [
        f"{node.name} ({target_name(node)}): {problem.wrong}. Remedy: {problem.remedy}."
        for unit in rewritable_units(gm)
        for node, problem in _problems(unit, spec)
    ]


def require(gm: GraphModule, spec: Spec) -> None:
    """Raises SpecError where `gm` violates `spec`."""
    violations = check(gm, spec)
    if violations:
        raise SpecError(spec.name, violations)


def _problems(gm: GraphModule, spec: Spec) -> Iterator[tuple[Node, Problem]]:
    inside = transformed(gm.graph)
    for node in gm.graph.nodes:
        if node in inside:  # no stage rewrites it
            continue
        for node_check in (*TABLE_CHECKS, *(_unbound(c) for c in spec.node_checks)):
            for problem in node_check(spec, node):
                yield node, problem
    for graph_check in spec.graph_checks:
        yield from graph_check(gm)


def _unbound(node_check: Check) -> Callable[[Spec, Node], Iterable[Problem]]:
    return lambda spec, node: node_check(node)


def target_name(node: Node) -> str:
    """A node's target as a person would write it."""
    if not callable(node.target):
        return f".{node.target}" if node.op == "call_method" else f"{node.op} {node.target}"
    return torch.fx.node._get_qualified_name(node.target) if node.op == "call_function" else str(node.target)


# ---- what the tables say


def _semantic(spec: Spec, node: Node) -> Iterator[Problem]:
    op = op_of(node)
    if op is None:
        return
    if not spec.semantic(op):
        yield Problem("this semantic op may not stand here", spec.no_other_semantic)
    else:
        yield from _arguments(op, node)


def _forbidden(spec: Spec, node: Node) -> Iterator[Problem]:
    tables: dict[str, Mapping[Any, Ban]] = {"call_function": spec.functions, "call_method": spec.methods}
    ban = tables.get(node.op, {}).get(node.target)
    if ban is not None and ban.when(node):
        yield Problem("not the canonical spelling", ban.remedy)


def _metadata(spec: Spec, node: Node) -> Iterator[Problem]:
    op = op_of(node)
    for key, kind in spec.metadata(op).items() if op is not None else ():
        if not isinstance(node.meta.get(key), kind):
            found = type(node.meta[key]).__name__ if key in node.meta else "nothing"
            yield Problem(f"meta[{key!r}] is {found}, not a {kind.__name__}", "the stage that makes the node puts it there")


TABLE_CHECKS = (_semantic, _forbidden, _metadata)


# ---- the arguments of semantic ops, read off their signatures


def _arguments(op: SemanticOp, node: Node) -> Iterator[Problem]:
    tensors, attributes = op.parameters
    required = [name for name, (p, _) in tensors.items() if p.default is p.empty]
    if not len(required) <= len(node.args) <= len(tensors):
        yield Problem(f"{len(node.args)} positional arguments", f"tensors go by position: {', '.join(tensors)}")
        return
    for name in node.kwargs.keys() - attributes.keys():
        yield Problem(f"the keyword {name!r}", f"attributes go by keyword: {', '.join(attributes)}; tensors by position")
    for name, (parameter, _) in attributes.items():
        if parameter.default is parameter.empty and name not in node.kwargs:
            yield Problem(f"the attribute {name!r} is missing", f"give {name}= in the rule that makes the node")
    given = [(name, value, tensors[name][1]) for name, value in zip(tensors, node.args, strict=False)]
    given += [(name, node.kwargs[name], kind) for name, (_, kind) in attributes.items() if name in node.kwargs]
    misfits = [(name, value, kind) for name, value, kind in given if not fits(value, kind)]
    for name, value, kind in misfits:
        yield Problem(f"{name}={value!r} is not {_spelled(kind)}", "see the docstring of the op")
    if not misfits and example(node) is not None:  # `_has_value` reports a missing value
        for broken in op.broken_invariants(node):
            yield Problem(f"invariant violated: {broken}", "the rule that makes the node must see to it, or decline")


def fits(value: Any, hint: Any) -> bool:
    """Whether an argument of a node is of a parameter's type; numbers may be symbolic."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, h) for h in inner)
    if origin is Literal:
        return value in inner
    if origin is not None:  # Sequence[...]
        return isinstance(value, (list, tuple)) and all(fits(v, inner[0]) for v in value)
    if hint is Tensor:
        return tensor(value) is not None
    found = example(value)
    if hint is float:
        return isinstance(found, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(found, bool)
    if hint is int:
        return isinstance(found, (int, torch.SymInt)) and not isinstance(found, bool)
    return found is None if hint is type(None) else isinstance(found, hint)


def _spelled(hint: Any) -> str:
    return getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("torch._tensor.", "")  # type: ignore[return-value]


# ---- what tables cannot say


def _has_value(node: Node) -> Iterator[Problem]:
    """Every value that something reads has its fake value."""
    silent = node.op in ("output", "get_attr") or not node.users or is_call(node, *AUTOCAST)
    if EXAMPLE not in node.meta and not silent:
        yield Problem(f"no meta[{EXAMPLE!r}]", "make nodes with ir.graph.emit")


def _canonical_arguments(node: Node) -> Iterator[Problem]:
    signature = canonical.SIGNATURES.get(node.target) if node.op == "call_function" else None
    if signature is not None and len(node.args) != len(signature):
        yield Problem(f"{len(node.args)} positional arguments", f"all by position: {', '.join(name for name, _ in signature)}")
    defaults: Mapping[Any, Mapping[str, Any]] = canonical.KEYWORD_DEFAULTS
    expected = defaults.get(node.target, {}) if signature is not None else ()
    if missing := [key for key in expected if key not in node.kwargs]:
        yield Problem(f"the keywords {', '.join(missing)} are missing", "give them")


def _canonical_cast(node: Node) -> Iterator[Problem]:
    if not is_method(node, "to", "type_as", *canonical.CASTS):
        return
    before, after = tensor(node.args[0]), tensor(node)
    if before is None or after is None or before.device != after.device or node.kwargs.get("copy") or node.kwargs.get("memory_format"):
        return
    if any(a is True for a in node.args[1:]):  # non_blocking or copy by position
        return
    if node.target != "to" or node.args[1:] != (after.dtype,) or node.kwargs:
        yield Problem("a cast that is not in canonical form", "call_method 'to' (x, dtype)")
    elif before.dtype == after.dtype:
        yield Problem("a cast to the tensor's own dtype", "use its input itself")


def _canonical_shape(node: Node) -> Iterator[Problem]:
    """A shape is a tuple of numbers, or of integer tensors that hold one, or one node that is a size."""
    if is_call(node, torch.reshape, torch.permute) and len(node.args) > 1 and isinstance(node.args[1], (tuple, list)):
        for size in node.args[1]:
            held = tensor(size)
            if not fits(size, int) and (held is None or held.dim() or held.is_floating_point()):
                yield Problem(f"{size!r} in a shape", "a tuple of numbers, or a node that is a size by itself")


def _state_inputs_last(gm: GraphModule) -> Iterator[tuple[Node, Problem]]:
    """The state's inputs come after the user's, in their order, and are what AOTAutograd and Dynamo expect."""
    reached = -1
    for node in (n for n in gm.graph.nodes if n.op == "placeholder"):
        rank = _rank(node)
        if rank < reached:
            yield node, Problem("stands after an input of the state", f"the inputs go last, in the order {', '.join(STATE_INPUTS)}")
        reached = max(rank, reached)
        if rank >= 0:
            yield from ((node, problem) for problem in _state_input(node))


STATE_INPUTS = (*(i.placeholder for i in StateInput), "te_weight")


def _rank(node: Node) -> int:
    """The place of a placeholder among the state's inputs, -1 for one of the user's."""
    if getattr(node, "_dynamo_source", None) is not None or not str(node.target).startswith("te_"):
        return -1
    return next((i for i, name in reversed(list(enumerate(STATE_INPUTS))) if str(node.target).startswith(name)), -1)


def _state_input(node: Node) -> Iterator[Problem]:
    value, name = tensor(node), str(node.target)
    kept = name.startswith("te_weight") and not node.meta.get("tensor_dict")  # training's weights: remade when they have changed
    if not kept and node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") != "unguarded":
        yield Problem("not marked as a static input", 'meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}')
    if value is None:
        yield Problem("no fake tensor", f"meta[{EXAMPLE!r}], a tensor made in the graph's fake mode")
    elif not name.startswith("te_weight"):
        if value.dtype != torch.float32 or value.dim() != 1 or not isinstance(value.shape[0], int):
            yield Problem(f"{value.dtype}{list(value.shape)}", "the state is one float32 vector of a fixed size")
        if value.requires_grad != name.startswith(StateInput.SINK.placeholder):
            yield Problem(f"requires_grad is {value.requires_grad}", "only the sink, which carries the gradients' amaxes, has a gradient")


def _slots_exist(gm: GraphModule) -> Iterator[tuple[Node, Problem]]:
    names = {n.name for n in gm.graph.nodes}
    for node in gm.graph.nodes:
        slots = node.meta.get(SLOTS)
        if slots is None:
            continue
        if not isinstance(slots, Slots):
            yield node, Problem(f"meta[{SLOTS!r}] is a {type(slots).__name__}", "it is a Slots")
            continue
        for name in (slots.scale, slots.grad_scale, slots.sink):
            if name is not None and name not in names:
                yield node, Problem(f"its slots are in {name!r}, which is not in the graph", "a copy of the graph must keep names")


def _members(node: Node) -> Iterator[Problem]:
    op, members = op_of(node), node.meta.get(MEMBERS)
    if op is not None and isinstance(members, list) and len(members) != len(op.gemms(node)):
        yield Problem(f"{len(members)} members for {len(op.gemms(node))} weights", "one for each weight, in order")


def _recipe_has_slots(node: Node) -> Iterator[Problem]:
    """Slots hold scales of earlier steps, which only a stateful recipe reads."""
    plan = node.meta.get(PLAN)
    if op_of(node) is not None and isinstance(plan, Plan) and plan.recipe is not None and not plan.recipe.stateful and SLOTS in node.meta:
        yield Problem(f"{plan.recipe.name} scaling with slots", "only delayed scaling has state")


def _not_lowered(node: Node) -> Iterator[Problem]:
    plan = node.meta.get(PLAN)
    if op_of(node) is not None and isinstance(plan, Plan) and plan.implemented:
        yield Problem("an op that an implementation computes", "the lowering replaces it")


def _lowered_target(node: Node) -> Iterator[Problem]:
    if node.op == "call_module":
        yield Problem("a call of a module", "Dynamo inlines modules; a pass must not add one")
    module = getattr(node.target, "__module__", None) or ""
    if node.op != "call_function" or not module.startswith("te_dynamo.") or module.startswith("te_dynamo.lowering"):
        return
    if op_of(node) is None and node.target is not ops.permute:  # it is its own implementation
        yield Problem(f"a function of {module}", "after lowering only te_dynamo.lowering and torch compute")


def _first_is_tensor(node: Node) -> bool:
    return bool(node.args) and tensor(node.args[0]) is not None


def _both(first: Callable[[Node], bool], second: Callable[[Node], bool]) -> Callable[[Node], bool]:
    return lambda node: first(node) and second(node)


def _reshapes(node: Node) -> bool:
    """Whether a `view` or `reshape` has the canonical spelling: not one with a dtype, which reinterprets bits, or with another tensor's
    whole size."""
    return _first_is_tensor(node) and canonical.reshaped(node) is not None


def _spelled_as(table: Mapping[Any, Any], when: Callable[[Node], bool]) -> dict[Any, Ban]:
    """The bans of a table of canonicalize: what each function is written as."""
    return {old: Ban(torch.fx.node._get_qualified_name(new), when) for old, new in table.items()}


# ---- the specs, one a stage

CANONICAL = Spec(
    name="canonicalize",
    no_other_semantic="semantic ops are made by the stage `raise`",
    functions={
        **_spelled_as(canonical.BINARY, _both(_first_is_tensor, lambda n: len(n.args) == 2)),
        **_spelled_as(canonical.UNARY, _first_is_tensor),
        **_spelled_as({old: new for old, new in canonical.ALIASES.items() if old is not new}, lambda n: True),
        F.softmax: Ban("torch.softmax(x, dim)", lambda n: (n.args[1:2] or (n.kwargs.get("dim"),))[0] is not None),
    },
    methods={
        **{m: Ban(f"torch.{m}", _first_is_tensor) for m in canonical.METHODS},
        "view": Ban("torch.reshape(x, shape)", _reshapes),
        "reshape": Ban("torch.reshape(x, shape)", _reshapes),
        "permute": Ban("torch.permute(x, dims)", _first_is_tensor),
    },
    node_checks=(_has_value, _canonical_arguments, _canonical_shape, _canonical_cast),
)


def _stands_alone(op: SemanticOp) -> bool:
    """Whether it is an op that a rule makes, not a group."""
    return op.name not in {other.grouped for other in all_ops()}


RAISED = replace(
    CANONICAL,
    name="raise",
    semantic=_stands_alone,
    no_other_semantic="groups are made by the stage `fuse`",
    node_checks=(_has_value, _canonical_arguments, _canonical_shape),
)
FUSED = replace(
    RAISED,
    name="fuse",
    semantic=lambda op: not op.grouped,
    no_other_semantic="every linear is a group, if only of one",
    metadata=lambda op: op.noted,
    node_checks=(*RAISED.node_checks, _members),
)
PLANNED = replace(FUSED, name="plan", metadata=lambda op: {**op.noted, SITE: Site, PLAN: Plan})
STATEFUL = replace(
    PLANNED,
    name="state",
    node_checks=(*PLANNED.node_checks, _recipe_has_slots),
    graph_checks=(_state_inputs_last, _slots_exist),
)
LOWERED = Spec(
    name="lower",
    semantic=lambda op: not op.owns_gemms,  # what nothing implements is computed by its definition: Inductor fuses it
    no_other_semantic="the provider's lowering replaces it",
    node_checks=(_has_value, _lowered_target, _not_lowered),
    graph_checks=(_state_inputs_last,),
)
SPECS: dict[str, Spec] = {spec.name: spec for spec in (CANONICAL, RAISED, FUSED, PLANNED, STATEFUL, LOWERED)}
