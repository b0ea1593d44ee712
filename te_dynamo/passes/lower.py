"""Stage 6: semantic operations become calls of `lowering.site`; those that nothing implements keep their definition.

Every site that records puts its amaxes among the graph's last outputs; a sub-graph returns its own as a last output. In inference, and
in training where they are kept, the outermost graph takes its weights already quantized: as inputs, which the caller makes whenever the
weights have changed.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from te_dynamo.fp8_weight import FP8Weight
from te_dynamo.ir import op_of
from te_dynamo.ir.graph import EXAMPLE, emit, erase_if_dead, example, fake, fake_like, fake_mode_of, is_call, tensor
from te_dynamo.ir.meta import PLAN, PRODUCER, SLOTS
from te_dynamo.ir.op import Gemm, SemanticOp
from te_dynamo.lowering import site
from te_dynamo.lowering.call import Call, spec_of
from te_dynamo.lowering.handed import CARRIERS, carriers
from te_dynamo.lowering.kernels.refresh import KeptGemm, readable
from te_dynamo.lowering.partition import asks_about_gemms
from te_dynamo.lowering.quantized import Quantized
from te_dynamo.lowering.registry import implementation_of, producer_of
from te_dynamo.passes.attach import Slots
from te_dynamo.passes.effects import storage, written_memory
from te_dynamo.passes.higher_order import calls
from te_dynamo.passes.plan import Plan
from te_dynamo.passes.weights import METHOD_VIEWS, WeightRef, is_frozen, is_view, weight_of_gemm

CHECKPOINT = "_checkpoint_context_fn"  # where Dynamo puts the contexts of a selective checkpoint


@dataclass(frozen=True)
class View:
    """The casts and views between a parameter and its use as a weight, applied outside of the graph: (target, arguments, keywords) of
    each."""

    steps: tuple[tuple[Callable[..., Any] | str, tuple[Any, ...], dict[str, Any]], ...]

    @classmethod
    def of(cls, ref: WeightRef) -> View:
        return cls(tuple((n.target, n.args[1:], dict(n.kwargs)) for n in ref.chain))

    def __call__(self, t: Any) -> torch.Tensor:
        for target, args, kwargs in self.steps:
            t = getattr(t, target)(*args, **kwargs) if isinstance(target, str) else target(t, *args, **kwargs)
        return t

    def without_casts(self) -> View:
        """Only the steps that move elements."""
        return View(tuple(step for step in self.steps if step[0] not in METHOD_VIEWS))


@dataclass(frozen=True)
class CachedWeights:
    """Weights that a graph takes quantized: their positions among its inputs, how each is viewed, and how they are quantized.

    made: for each GEMM, which fields of its `Quantized` exist. read: for each weight, whether the graph also reads it unquantized.
    """

    arguments: tuple[int, ...]
    views: tuple[View, ...]
    call: Call
    made: tuple[tuple[bool, ...], ...]
    read: tuple[bool, ...] = ()

    @property
    def key(self) -> str:
        """Equal for weights that are quantized in the same way."""
        return f"{self.call.key} {self.views}"

    @property
    def trains(self) -> bool:
        return self.call.cached == "training"

    def make(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The graph's inputs, in order, computed from the parameters."""
        made = implementation_of(self.call).quantize_weights(self.call, self.viewed(tensors))
        return [t for q in made for t in q if t is not None]

    def viewed(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        pairs = zip(self.views, tensors, strict=True)
        return [view.without_casts()(t.values()) if isinstance(t, FP8Weight) else view(t.detach()) for view, t in pairs]

    def quantized(self, copies: Iterable[torch.Tensor]) -> list[Quantized]:
        """The results of `make`, as one `Quantized` for each GEMM."""
        fields = iter(copies)
        return [Quantized(*[next(fields) if there else None for there in made]) for made in self.made]

    def made_again(self, tensors: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> list[KeptGemm]:
        """What a kernel can requantize, given the parameters and the results of `make` for them; empty if it cannot."""
        how, views = implementation_of(self.call).kept_as(self.call), [_as_matrix(view) for view in self.viewed(tensors)]
        if how is None or not all(map(readable, views, tensors)):
            return []
        quantized = self.quantized(map(_as_matrix, copies))
        return [KeptGemm(how, [views[i] for i in gemm], q) for gemm, q in zip(how.gemms, quantized, strict=True)]


def _as_matrix(t: torch.Tensor) -> torch.Tensor:
    """[E, N, K], the experts' matrices one after another, as one [E * N, K]; any other tensor as it is."""
    return t.view(-1, t.shape[-1]) if t.dim() == 3 and t.is_contiguous() else t


@dataclass
class Lowered:
    """Of the outermost graph: which quantized weights it takes, and whether its last output is the recorded amaxes."""

    weights: list[CachedWeights] = field(default_factory=list)
    records: bool = False


@dataclass(frozen=True)
class Unset:
    """The scales that were never set, by position among a graph's: a site that has one of them computes it from the tensor itself."""

    forward: frozenset[int] = frozenset()
    gradient: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.forward or self.gradient)

    def is_among(self, forward: range, gradient: range) -> bool:
        return not (self.forward.isdisjoint(forward) and self.gradient.isdisjoint(gradient))


class _Any(Unset):
    """Any scale may be unset."""

    def __bool__(self) -> bool:
        return True

    def is_among(self, forward: range, gradient: range) -> bool:
        return True


ANY_UNSET, NONE_UNSET = _Any(), Unset()


def lower(gm: GraphModule, *, unset: Unset, keep_weights: bool = False, compiled: bool = True) -> Lowered:
    """Rewrites `gm` and its sub-graphs in place.

    unset: which scales were never set; a sub-graph is lowered once for all its calls, so any of its scales may be unset if some are.
    keep_weights: where its scales are set, a site of the outermost graph also takes the weights that it trains quantized, not only the
    frozen ones. compiled: whether code is generated for `gm`; if not, operations that need generated code to be fast keep their
    definition.
    """
    lowering = _Lowering(unset, keep_weights, compiled)
    lowering.graph(gm, top=True)
    gm.graph.lint()
    gm.recompile()
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    weights = [replace(w, read=tuple(_is_read(placeholders[i]) for i in w.arguments)) for w in lowering.result.weights]
    return replace(lowering.result, weights=weights)


@dataclass(frozen=True)
class _Unit:
    """A graph that is lowered: `gm` itself (top) or one of its sub-graphs. What is asked about all its nodes is asked once."""

    gm: GraphModule
    top: bool

    @cached_property
    def by_name(self) -> dict[str, Node]:
        return {n.name: n for n in self.gm.graph.nodes}

    @cached_property
    def written(self) -> set[int | None]:
        """The memory that the graph itself writes."""
        return written_memory(self.gm.graph)

    @cached_property
    def returned(self) -> Counter[int | None]:
        """How many of the results that need gradients are in the same memory."""
        results = {n for n in tree_leaves(self.gm.graph.output_node().args[0]) if tensor(n) is not None} if self.top else set()
        return Counter(storage(n) for n in results if fake(n).requires_grad)

    def state_nodes(self, slots: Slots | None) -> tuple[Node | None, Node | None, Node | None]:
        """The packed scales, the gradients' packed scales and a site's slice of the sink."""
        if slots is None:
            return None, None, None
        return self.by_name[slots.scale], self.by_name.get(slots.grad_scale or ""), self.by_name.get(slots.sink or "")

    def takes_cached(self, refs: Sequence[WeightRef | None]) -> bool:
        """Whether weights may come in quantized: they can be made outside of the graph, which does not write them."""
        return self.top and bool(refs) and all(r is not None and _replayable(r) and storage(r.root) not in self.written for r in refs)


class _Lowering:
    def __init__(self, unset: Unset, keep_weights: bool, compiled: bool) -> None:
        self.unset, self.keep_weights, self.compiled = unset, keep_weights, compiled
        self.result = Lowered()
        self.handing: dict[str, tuple[Node, list[Node]]] = {}  # by the name of a group of linears: its gradient's scale, and its carriers
        self.done: dict[int, bool] = {}  # by the id of a sub-graph: whether it returns recorded amaxes

    def graph(self, gm: GraphModule, *, top: bool) -> bool:
        """Lowers a graph. Returns whether its last output is recorded amaxes."""
        unit, bodies = _Unit(gm, top), {call.node: call.body for call in calls(gm)}
        amaxes: list[Node] = []
        for node in list(gm.graph.nodes):
            if node in bodies:
                body = bodies[node]
                if id(body) not in self.done:
                    if (context_fn := body.meta.get(CHECKPOINT)) is not None:
                        body.meta[CHECKPOINT] = partial(asks_about_gemms, context_fn)
                    self.done[id(body)] = self.graph(body, top=False)
                    body.recompile()
                if self.done[id(body)]:
                    with gm.graph.inserting_before(node.next):
                        amaxes.append(_last_output_of_call(gm.graph, node, body))
            elif (op := op_of(node)) is not None and node.meta[PLAN].implemented:
                amaxes += self.site(unit, node, op)
        if amaxes:
            _return_amaxes(gm, amaxes)
        self.result.records = bool(amaxes)
        return bool(amaxes)

    def site(self, unit: _Unit, node: Node, op: SemanticOp) -> list[Node]:
        """Replaces a site by a call; returns its recorded amaxes, if it records."""
        graph, plan, slots = unit.gm.graph, node.meta[PLAN], node.meta.get(SLOTS)
        unset = self.is_unset(unit, op, op.gemms(node), slots)
        call = self.call(node, op, plan, slots, unset)
        if implementation_of(call).generated and not self.compiled:
            return []
        inputs: list[Any] = list(op.inputs(node).values())
        if call.producer is not None:
            inputs[0] = list(op_of(inputs[0]).inputs(inputs[0]).values())
        gemms = op.gemms(node)
        refs = [weight_of_gemm(g.weight) for g in gemms]
        cached: list[tuple[Any, ...]] = []
        if unit.takes_cached(refs) and (kind := self.cached(call, plan, refs, unset)):
            call = call.but(cached=kind)
            if kind == "inference":  # the weights themselves are not given
                weights = {g.weight for g in gemms}
                inputs = [_without(i, weights) for i in inputs]
                call = call.but(inputs=tuple(_without_dtypes(i, s) for i, s in zip(inputs, call.inputs, strict=True)))
            cached = self.cached_inputs(unit.gm, call, gemms, refs)
        opaque = implementation_of(call).opaque
        scale, grad_scale, sink = unit.state_nodes(slots)
        with graph.inserting_before(node):
            scales = _scales(scale, slots.start if slots else 0, _count(op, gemms, "forward"), opaque)
            grad_scales = _scales(grad_scale, slots.grad_start if slots else 0, _count(op, gemms, "gradient"), opaque)
            results = example(node)
            single = not isinstance(results, (list, tuple))
            values = [results] if single else list(results)
            if call.takes_gradient:
                values = [*values, *carriers(values[0], call.takes_gradient)]
            if call.records:
                values = [*values, fake_like(values[0], (_count(op, gemms, "forward"),), torch.float32)]
            handing = self.handing[plan.hands_gradient[0]] if plan.hands_gradient is not None and call.hands_gradient else None
            args = (call.key, inputs, scales, grad_scales, sink, cached, *([] if handing is None else [handing]))
            new = emit(graph, site.site, args, like=node, value=values)
            if call.takes_gradient:
                at = range(len(values) - call.records - CARRIERS, len(values) - call.records)
                carried = [emit(graph, operator.getitem, (new, i), like=node) for i in at]
                self.handing[node.name] = (grad_scales[0][op.roles.place("grad_output")], carried)
            amax = [emit(graph, operator.getitem, (new, len(values) - 1), like=node)] if call.records else []
            replacement = emit(graph, operator.getitem, (new, 0), like=node) if single else new
        node.replace_all_uses_with(replacement)
        for output in [replacement] if single else list(new.users):
            if unit.returned[storage(output)] > 1:
                _copy(graph, output)
        made_of = [n for n in node.all_input_nodes if n.name == node.meta.get(PRODUCER)]
        graph.erase_node(node)
        erase_if_dead(graph, [*(made_of if call.producer is not None else ()), *(n for r in refs if r is not None for n in r.chain)])
        return amax

    def is_unset(self, unit: _Unit, op: SemanticOp, gemms: Sequence[Gemm], slots: Slots | None) -> bool:
        """Whether a scale of a site may be unset."""
        if slots is None or not unit.top:
            return slots is not None and bool(self.unset)
        counts = (_count(op, gemms, "forward"), _count(op, gemms, "gradient"))
        return self.unset.is_among(*(range(at, at + count) for at, count in zip((slots.start, slots.grad_start), counts, strict=True)))

    def call(self, node: Node, op: SemanticOp, plan: Plan, slots: Slots | None, unset: bool) -> Call:
        made = Call(
            op=op.grouped or op.name,
            provider=plan.calibrator if unset else plan.provider,
            device=_device(node),
            inputs=spec_of(tuple(op.examples(node).values())),
            recipe="" if plan.recipe is None else plan.recipe.key,
            amax_group=plan.amax_group,
            records=slots is not None and plan.trains,
            keeps_fp8=plan.keeps_fp8,
            remakes=plan.remakes,
            producer=self.producer(node, op, plan, unset) if plan.produces else None,
            in_memory=() if unset else plan.in_memory,
            takes_gradient={} if unset else plan.takes_gradient,
            hands_gradient=self.hands(plan),
            attributes=op.all_attributes(node, plan.recipe),
        )
        return made.but(calibrating=slots is not None and (unset or implementation_of(made).opaque))

    def hands(self, plan: Plan) -> Mapping[str, Any]:
        """What a site hands over: nothing if the linears' scales are unset."""
        linears, described = plan.hands_gradient or ("", {})
        return described if linears in self.handing else {}

    def producer(self, node: Node, op: SemanticOp, plan: Plan, unset: bool) -> Call | None:
        maker = op.gemms(node)[0].x
        made_by = op_of(maker)
        assert made_by is not None and plan.recipe is not None
        call = Call(
            op=made_by.name,
            provider=plan.provider,
            device=_device(node),
            inputs=spec_of(tuple(made_by.examples(maker).values())),
            recipe=plan.recipe.key,
            keeps_fp8=plan.keeps_fp8,
            remakes=plan.remakes,
            attributes=made_by.all_attributes(maker, plan.recipe),
        )
        return call if producer_of(call).calibrates or not unset else None

    def cached(self, call: Call, plan: Plan, refs: Sequence[WeightRef | None], unset: bool) -> str:
        """How a site gets cached weights: for "training", for "inference", or "" if it quantizes them itself.

        In training it gets them if that was asked for, or if one of them is frozen: what does not change is quantized once.
        """
        kinds = implementation_of(call).cached
        if not plan.trains:
            return "inference" if "inference" in kinds else ""
        like_te = getattr(plan.recipe, "like_te", False)  # its copies have the slot's scale
        calibrates = plan.recipe is not None and plan.recipe.stateful and unset  # that happens once or twice, in a separate graph
        kept = self.keep_weights or any(r is not None and is_frozen(r.root) for r in refs)
        return "training" if kept and "training" in kinds and not like_te and not calibrates else ""

    def cached_inputs(self, gm: GraphModule, call: Call, gemms: Sequence[Gemm], refs: Sequence[WeightRef | None]) -> list[tuple[Any, ...]]:
        """New last inputs of the graph: for each GEMM, the fields of its quantized weight that exist."""
        graph = gm.graph
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        position = {n: i for i, n in enumerate(placeholders)}
        known = [r for r in refs if r is not None]
        weights = [tensor(g.weight) for g in gemms]
        with fake_mode_of(graph), torch.no_grad():
            quantized = implementation_of(call).quantize_weights(call, weights)
        made = tuple(tuple(t is not None for t in q) for q in quantized)
        arguments, views = tuple(position[r.root] for r in known), tuple(map(View.of, known))
        alone = [call.operation.alone(call.attributes, member) for member in range(len(known))]
        if None in alone:
            self.result.weights.append(CachedWeights(arguments, views, call, made))
        else:  # each by itself: training an adapter must not requantize the frozen weight of the same input
            parts = zip(arguments, views, alone, made, strict=True)
            self.result.weights += [CachedWeights((at,), (view,), call.but(attributes=own), (fields,)) for at, view, own, fields in parts]
        inputs = []
        for i, q in enumerate(quantized):
            fields: list[Node | None] = []
            for name, value in zip(q._fields, q, strict=True):
                fields.append(None)
                if value is None:
                    continue
                with graph.inserting_after(placeholders[-1]):
                    node = graph.placeholder(f"te_weight_{name}_{len(self.result.weights)}_{i}")
                node._dynamo_source = None
                # In training they are remade when the weights have changed: CUDA graphs cannot rely on their addresses.
                node.meta["tensor_dict"] = {} if call.cached == "training" else {"_dynamo_static_input_type": "unguarded"}
                node.meta[EXAMPLE] = value
                placeholders.append(node)
                fields[-1] = node
            inputs.append(tuple(fields))
        return inputs


def _copy(graph: Graph, output: Node) -> None:
    """Has a copy of a site's output read in its place. If it is returned together with a view of it, autograd must know of both: to
    AOTAutograd, what an autograd function returns may be a view of memory of its own, and then other views of this are no relatives."""
    with graph.inserting_after(output):
        copied = emit(graph, torch.clone, (output,), like=output, value=example(output))
    output.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not copied)


def _is_read(weight: Node) -> bool:
    """Whether anything reads a weight, except sites that take it quantized."""
    return any(_is_read(user) if is_view(user) else not (is_call(user, site.site) and user.args[5]) for user in weight.users)


def _device(node: Node) -> str:
    value = example(node)
    return (value[0] if isinstance(value, (list, tuple)) else value).device.type


def _count(op: SemanticOp, gemms: Sequence[Gemm], direction: str) -> int:
    """How many scales a site has in a direction."""
    return len(getattr(op.roles, direction)) * max(1, len(gemms))


def _without(given: Any, weights: Container[Node]) -> Any:
    """An input without the weights: an empty list of them, or nothing."""
    if isinstance(given, (list, tuple)):
        return [] if any(g in weights for g in given if isinstance(g, Node)) else given
    return None if given in weights else given


def _without_dtypes(given: Any, spec: Any) -> Any:
    return () if given == [] else None if given is None else spec


def _last_output_of_call(graph: Graph, call: Node, body: GraphModule) -> Node:
    outputs = body.graph.output_node().args[0]
    node = graph.call_function(operator.getitem, (call, len(outputs) - 1))
    node.meta[EXAMPLE] = tensor(outputs[-1])
    if isinstance(call.meta.get(EXAMPLE), (tuple, list)):
        call.meta[EXAMPLE] = (*call.meta[EXAMPLE], node.meta[EXAMPLE])
    return node


def _return_amaxes(gm: GraphModule, amaxes: Sequence[Node]) -> None:
    output = gm.graph.output_node()
    results = output.args[0]
    if not isinstance(results, (tuple, list)):
        raise NotImplementedError("a graph that returns a single value, not a tuple")
    with gm.graph.inserting_before(output):
        first, count = fake(amaxes[0]), sum(fake(a).shape[0] for a in amaxes)
        packed = emit(gm.graph, site.record, (list(amaxes),), like=amaxes[-1], value=fake_like(first, (count,), first.dtype))
    output.args = ((*results, packed),)


def _scales(packed: Node | None, start: int, count: int, opaque: bool) -> Any:
    """The scales of a site, as `lowering.site.SiteScales` has them."""
    if packed is None:
        return None
    if opaque:
        return (packed, start)
    lists, graph = _unpacked(packed), packed.graph
    return tuple([emit(graph, operator.getitem, (which, i), like=packed) for i in range(start, start + count)] for which in lists)


def _unpacked(packed: Node) -> tuple[Node, Node]:
    """The scales of a graph, unpacked once, at its top: the scalars and their reciprocals. Backward unpacks them again."""
    for user in packed.users:
        if is_call(user, site.unpack):
            values, inverses = list(user.users)
            return values, inverses
    graph = packed.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_before(last.next):
        both = emit(graph, site.unpack, (packed,), like=last)
        values = emit(graph, operator.getitem, (both, 0), like=last)
        inverses = emit(graph, operator.getitem, (both, 1), like=last)
    both.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    return values, inverses


def _replayable(ref: WeightRef) -> bool:
    """Whether the view of a weight can be computed outside of the graph: it depends only on the weight."""
    return not ref.computed and all(n.all_input_nodes == [p] for n, p in zip(ref.chain, (ref.root, *ref.chain), strict=False))
