"""Stage 6: semantic operations become a provider's.

Every site that records puts its amaxes among the graph's last outputs; a sub-graph returns its own as a last output. In
inference the weights of the outermost graph come in quantized: they are inputs, made once by the caller.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from te_dynamo import ops
from te_dynamo.ir.graph import EXAMPLE, emit, erase_if_dead, fake_mode_of, is_call, tensor
from te_dynamo.lowering import functions
from te_dynamo.lowering.fp8_attention import FORWARD_SLOTS, GRADIENT_SLOTS
from te_dynamo.lowering.fp8_attention import attention as fp8_attention
from te_dynamo.lowering.linears import Layout
from te_dynamo.lowering.providers import provider_for, provider_named
from te_dynamo.lowering.te import attention as te_attention
from te_dynamo.passes.attach import SLOTS, Slots
from te_dynamo.passes.canonicalize import SDPA
from te_dynamo.passes.effects import storage, writes
from te_dynamo.passes.fuse import LAYOUT
from te_dynamo.passes.higher_order import calls
from te_dynamo.passes.plan import PLAN
from te_dynamo.passes.weights import WeightRef, weight_of


@dataclass(frozen=True)
class QuantizedAs:
    """How the weights of a site are joined and quantized."""

    layout: Layout
    provider: str
    recipe: str

    def arguments(self) -> tuple[Any, ...]:
        """What `functions.quantize_weights` takes after the weights."""
        return self.layout.merged, self.layout.interleave, self.provider, self.recipe


@dataclass(frozen=True)
class QuantizedWeights:
    """Weights that a graph takes in FP8: where they are among the inputs, how each is viewed, and how they are joined.

    trains: for both directions of training, else for inference.
    """

    arguments: tuple[int, ...]
    views: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
    form: QuantizedAs
    trains: bool = False

    def make(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The graph's inputs, in order, out of the parameters."""
        views = [view(t.detach()) for view, t in zip(self.views, tensors, strict=True)]
        of_gemm: Callable[..., Sequence[tuple[torch.Tensor, ...]]]
        of_gemm = functions.prepare_weights if self.trains else functions.quantize_weights
        return [part for parts in of_gemm(views, *self.form.arguments()) for part in parts]


@dataclass
class Lowered:
    """Of the outermost graph: whether and which quantized weights it takes, and whether its last output is the recorded amaxes."""

    keep_weights: bool = False
    weights: list[QuantizedWeights] = field(default_factory=list)
    records: bool = False


def lower(gm: GraphModule, *, first: bool, keep_weights: bool = False) -> Lowered:
    """Rewrites `gm` and its sub-graphs in place. first: unset scales are taken from the tensor itself, in the graph;
    keep_weights: where all scales are set, the outermost graph takes the weights that it trains in FP8 too."""
    lowered = Lowered(keep_weights)
    _lower(gm, {}, lowered, first=first, top=True)
    gm.graph.lint()
    gm.recompile()
    return lowered


def _lower(gm: GraphModule, done: dict[int, bool], lowered: Lowered, *, first: bool, top: bool) -> bool:
    """Whether the graph returns recorded amaxes as its last output."""
    graph = gm.graph
    bodies = {call.node: call.body for call in calls(gm)}
    amaxes: list[Node] = []
    for node in list(graph.nodes):
        if node in bodies:
            body = bodies[node]
            if id(body) not in done:
                done[id(body)] = _lower(body, done, lowered, first=first, top=False)
                body.recompile()
            if done[id(body)]:
                with graph.inserting_before(node.next):
                    amaxes.append(_output_of_call(graph, node, body))
        elif is_call(node, ops.linears, ops.norm_linears):
            amaxes += _lower_linears(gm, node, lowered, first, top)
        elif is_call(node, ops.attention):
            amaxes += _lower_attention(gm, node, first)
        elif is_call(node, ops.linear):
            raise AssertionError("a linear outside of a group reached the lowering")
    if amaxes:
        _return_amaxes(gm, amaxes)
    lowered.records = bool(amaxes)
    return bool(amaxes)


def _output_of_call(graph: Any, call: Node, body: GraphModule) -> Node:
    outputs = next(n for n in body.graph.nodes if n.op == "output").args[0]
    node = graph.call_function(operator.getitem, (call, len(outputs) - 1))
    node.meta[EXAMPLE] = tensor(outputs[-1])
    if isinstance(call.meta.get(EXAMPLE), (tuple, list)):
        call.meta[EXAMPLE] = (*call.meta[EXAMPLE], node.meta[EXAMPLE])
    return node


def _return_amaxes(gm: GraphModule, amaxes: Sequence[Node]) -> None:
    output = next(n for n in gm.graph.nodes if n.op == "output")
    results = output.args[0]
    if not isinstance(results, (tuple, list)):
        raise NotImplementedError("a graph that returns a single value, not a tuple")
    with gm.graph.inserting_before(output):
        packed = emit(gm.graph, functions.record, (list(amaxes),), like=amaxes[-1])
    output.args = ((*results, packed),)


def _lower_linears(gm: GraphModule, node: Node, lowered: Lowered, first: bool, top: bool) -> list[Node]:
    graph, plan, slots = gm.graph, node.meta[PLAN], node.meta.get(SLOTS)
    if node.target is ops.norm_linears:
        return _lower_norm_linears(gm, node, lowered, first, top)
    x, weights, biases = node.args
    refs = [weight_of(w) for w in weights]
    attributes = {"provider": plan.provider, "recipe": plan.recipe.key, "peers": plan.peers}
    attributes |= {"merged": node.kwargs["merged"], "interleave": node.kwargs["interleave"]}
    attributes |= {"out_dtype": node.kwargs["out_dtype"], "first": first}
    scale, grad_scale, sink = _state_nodes(gm, slots)
    packed = provider_named(plan.provider).opaque
    with graph.inserting_before(node):
        scales = _scales(scale, slots.f, 2 * len(refs), packed) if slots else None
        grad_scales = _scales(grad_scale, slots.g, len(refs), packed) if slots else None
        if not plan.trains and top and all(_replayable(r) for r in refs) and not _written(graph, refs):
            layout = Layout(tuple(int(tensor(w).shape[0]) for w in weights), attributes["merged"], attributes["interleave"])
            form = QuantizedAs(layout, plan.provider, plan.recipe.key)
            w8s, inverses = zip(*_weight_inputs(gm, refs, form, lowered, ("w8", "w_inv")), strict=True)
            inference_args = (x, list(w8s), list(inverses), biases, scales)
            new = emit(
                graph,
                functions.linears_inference,
                inference_args,
                attributes | {"sizes": list(layout.sizes)},
                like=node,
                value=node.meta[EXAMPLE],
            )
            amax = None
        else:
            ready = _ready(gm, node, refs, lowered, first, top)
            args = (x, weights, biases, scales, grad_scales, sink, ready)
            new = emit(graph, functions.linears, args, attributes, like=node, value=[*node.meta[EXAMPLE], _amax_of(node, 2 * len(refs))])
            amax = emit(graph, operator.getitem, (new, len(refs)), like=node) if slots and plan.trains else None
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    erase_if_dead(graph, [n for r in refs if r is not None for n in r.chain])
    return [] if amax is None else [amax]


def _state_nodes(gm: GraphModule, slots: Slots | None) -> tuple[Node | None, Node | None, Node | None]:
    """The packed scales, the gradients' packed scales and the piece of the sink of a site."""
    if slots is None:
        return None, None, None
    by_name = {n.name: n for n in gm.graph.nodes}
    return by_name[slots.scale], by_name.get(slots.grad_scale or ""), by_name.get(slots.sink or "")


def _scales(packed_node: Node | None, start: int, count: int, packed: bool) -> Any:
    """The scales of a site as its provider takes them (see `lowering.providers.Scales`)."""
    if packed_node is None:
        return None
    if packed:
        return (packed_node, start)
    lists = _unpacked(packed_node)
    graph = packed_node.graph
    return tuple([emit(graph, operator.getitem, (which, i), like=packed_node) for i in range(start, start + count)] for which in lists)


def _unpacked(packed: Node) -> tuple[Node, Node]:
    """The scales of a graph taken apart, once, at its top: the scalars and their reciprocals. Backward does it again."""
    for user in packed.users:
        if is_call(user, functions.unpack):
            values, inverses = list(user.users)
            return values, inverses
    graph = packed.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_before(last.next):
        both = emit(graph, functions.unpack, (packed,), like=last)
        values = emit(graph, operator.getitem, (both, 0), like=last)
        inverses = emit(graph, operator.getitem, (both, 1), like=last)
    both.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    return values, inverses


def _lower_norm_linears(gm: GraphModule, node: Node, lowered: Lowered, first: bool, top: bool) -> list[Node]:
    """A norm, left to Inductor, and the linears; or the provider's own kernel for the norm, which wants its scale set."""
    graph, k = gm.graph, node.kwargs
    x, norm_weight, norm_bias, weights, biases = node.args
    if node.meta[PLAN].norm_kernel and not first:
        return _lower_to_norm_kernel(gm, node, lowered, top)
    norm_attributes = {name: k[name] for name in ("kind", "eps", "zero_centered", "round_before_weight")} | {"out_dtype": k["norm_dtype"]}
    with graph.inserting_before(node):
        h = emit(graph, ops.norm, (x, norm_weight, norm_bias), norm_attributes, like=node)
        group_attributes = {name: k[name] for name in ("out_dtype", "merged", "interleave")}
        group = emit(graph, ops.linears, (h, weights, biases), group_attributes, like=node)
    for key in (PLAN, SLOTS):
        if key in node.meta:
            group.meta[key] = node.meta[key]
    for output in list(node.users):  # all are getitem
        if output.args[1] == 0:
            output.replace_all_uses_with(h)
            graph.erase_node(output)
        else:
            output.args = (group, output.args[1] - 1)
    graph.erase_node(node)
    return _lower_linears(gm, group, lowered, first, top)


def _lower_to_norm_kernel(gm: GraphModule, node: Node, lowered: Lowered, top: bool) -> list[Node]:
    graph, plan, slots, k = gm.graph, node.meta[PLAN], node.meta[SLOTS], node.kwargs
    n = len(node.args[3])
    names = ("merged", "interleave", "out_dtype", "kind", "eps", "zero_centered")
    attributes = {"provider": plan.provider, "recipe": plan.recipe.key} | {name: k[name] for name in names}
    scale, grad_scale, sink = _state_nodes(gm, slots)
    with graph.inserting_before(node):
        ready = _ready(gm, node, [weight_of(w) for w in node.args[3]], lowered, False, top)
        args = (*node.args, _scales(scale, slots.f, 2 * n, False), _scales(grad_scale, slots.g, n, False), sink, ready)
        value = [*node.meta[EXAMPLE][1:], _amax_of(node, 2 * n)]
        new = emit(graph, functions.norm_linears, args, attributes, like=node, value=value)
        amax = emit(graph, operator.getitem, (new, n), like=node)
    for output in list(node.users):  # all are getitem; that of the norm itself has no users
        if output.args[1] == 0:
            graph.erase_node(output)
        else:
            output.args = (new, output.args[1] - 1)
    graph.erase_node(node)
    erase_if_dead(graph, [n for w in node.args[3] if (r := weight_of(w)) is not None for n in r.chain])
    return [amax]


def _lower_attention(gm: GraphModule, node: Node, first: bool) -> list[Node]:
    """High-precision attention stays what it is, on the layout that its producers write; FP8 attention has its own kernels."""
    graph, plan, slots = gm.graph, node.meta[PLAN], node.meta.get(SLOTS)
    q, k, v, mask = (*node.args, None)[:4]
    if plan.lies_as and (plan.recipe is None or (slots is not None and not first)):
        return _lower_to_te_attention(gm, node)
    if plan.recipe is None:
        given = node.kwargs
        args = (q, k, v, mask, given.get("dropout_p", 0.0), given.get("causal", False))
        node.target, node.args = SDPA, args
        node.kwargs = {"scale": given.get("scale"), "enable_gqa": given.get("enable_gqa", False)}
        return []
    scale, grad_scale, sink = _state_nodes(gm, slots)
    fp8_args = (q, k, v, mask, scale, sink, grad_scale)
    attributes = {"causal": node.kwargs.get("causal", False), "softmax_scale": node.kwargs.get("scale")}
    attributes |= {"enable_gqa": node.kwargs.get("enable_gqa", False), "f": slots.f if slots else 0, "g": slots.g if slots else 0}
    attributes |= {"form": node.meta[LAYOUT].form, "recipe": plan.recipe.key, "peers": plan.peers}
    attributes |= dict.fromkeys(("quantize_output", "quantize_gradients"), plan.recipe.fp8_mha)
    with graph.inserting_before(node):
        both = emit(graph, fp8_attention, fp8_args, attributes, like=node)
        out = emit(graph, operator.getitem, (both, 0), like=node)
        amax = emit(graph, operator.getitem, (both, 1), like=node) if slots and plan.trains else None
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    return [] if amax is None else [amax]


def _lower_to_te_attention(gm: GraphModule, node: Node) -> list[Node]:
    """TE's kernels; those in FP8 want their scales set."""
    graph, plan, slots = gm.graph, node.meta[PLAN], node.meta.get(SLOTS)
    attributes = {"layout": plan.lies_as, "causal": node.kwargs.get("causal", False), "softmax_scale": node.kwargs.get("scale")}
    if plan.recipe is None:
        with graph.inserting_before(node):
            out = emit(graph, te_attention.attention, node.args[:3], attributes, like=node, value=node.meta[EXAMPLE])
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        return []
    scale, grad_scale, sink = _state_nodes(gm, slots)
    forward, backward = len(FORWARD_SLOTS), len(GRADIENT_SLOTS)
    with graph.inserting_before(node):
        scales, grad_scales = _scales(scale, slots.f, forward, False), _scales(grad_scale, slots.g, backward, False)
        args = (*node.args[:3], scales, grad_scales, sink)
        value = (node.meta[EXAMPLE], _amax_of(node, forward))
        both = emit(graph, te_attention.fp8_attention, args, attributes | {"recipe": plan.recipe.key}, like=node, value=value)
        out = emit(graph, operator.getitem, (both, 0), like=node)
        amax = emit(graph, operator.getitem, (both, 1), like=node) if plan.trains else None
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    return [] if amax is None else [amax]


def _amax_of(node: Node, count: int) -> torch.Tensor:
    """The fake value of a site's amaxes."""
    value = node.meta[EXAMPLE]
    y = value if isinstance(value, torch.Tensor) else value[0]
    with fake_mode_of(node.graph):
        return torch.empty(count, device=y.device)


def _replayable(ref: WeightRef | None) -> bool:
    """Whether the view of a weight can be made outside of the graph: it depends on nothing but the weight."""
    return ref is not None and all(n.all_input_nodes == [p] for n, p in zip(ref.chain, (ref.root, *ref.chain), strict=False))


def _written(graph: Graph, refs: Sequence[WeightRef | None]) -> bool:
    """Whether the graph itself writes one of these weights: then what it was before is not what is multiplied."""
    memory = {storage(r.root) for r in refs if r is not None}
    return any(storage(w) in memory for n in graph.nodes for w in writes(n))


def _replay(ref: WeightRef) -> Callable[[torch.Tensor], torch.Tensor]:
    steps = [(n.op, n.target, n.args[1:], dict(n.kwargs)) for n in ref.chain]

    def view(t: Any) -> torch.Tensor:
        for op, target, rest, kwargs in steps:
            t = target(t, *rest, **kwargs) if op == "call_function" else getattr(t, target)(*rest, **kwargs)
        return t

    return view


def _ready(
    gm: GraphModule, node: Node, refs: Sequence[WeightRef | None], lowered: Lowered, first: bool, top: bool
) -> list[tuple[Node, ...]]:
    """The inputs that a site's weights come in by, in FP8, where they are kept from call to call; none where it makes them itself."""
    plan = node.meta[PLAN]
    able = lowered.keep_weights and plan.trains and top and provider_for(plan.provider, plan.recipe.key).keeps_weights
    like_te = getattr(plan.recipe, "like_te", False)  # whose copies have the slot's scale
    starts = plan.recipe.stateful and first  # a call or two, in a graph of its own
    if not able or like_te or starts or not all(_replayable(r) for r in refs) or _written(gm.graph, refs):
        return []
    sizes = tuple(int(tensor(r.chain[-1] if r.chain else r.root).shape[0]) for r in refs)
    layout = Layout(sizes, node.kwargs["merged"], node.kwargs["interleave"])
    form = QuantizedAs(layout, plan.provider, plan.recipe.key)
    return _weight_inputs(gm, refs, form, lowered, ("w8", "w8t", "w_scale", "w_inv", "w_amax"), trains=True)


def _weight_inputs(
    gm: GraphModule,
    refs: Sequence[WeightRef],
    form: QuantizedAs,
    lowered: Lowered,
    names: tuple[str, ...],
    trains: bool = False,
) -> list[tuple[Node, ...]]:
    """New last inputs of the graph, so many for each GEMM: the FP8 weight, its scale_inv and what training wants beside them."""
    graph = gm.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    position = {n: i for i, n in enumerate(placeholders)}
    arguments, views = tuple(position[r.root] for r in refs), tuple(_replay(r) for r in refs)
    lowered.weights.append(QuantizedWeights(arguments, views, form, trains))
    nodes = [r.chain[-1] if r.chain else r.root for r in refs]
    of_gemm = functions.prepare_weights if trains else functions.quantize_weights
    made = emit(graph, of_gemm, (nodes, *form.arguments()), like=placeholders[-1])
    inputs: list[tuple[Node, ...]] = []
    for i, parts in enumerate(made.meta[EXAMPLE]):
        added = []
        for name, value in zip(names, parts, strict=True):
            with graph.inserting_after(placeholders[-1]):
                node = graph.placeholder(f"te_{name}_{len(lowered.weights)}_{i}")
            node._dynamo_source = None
            # In training they are made anew when the weights have changed: no address that CUDA graphs could rely on.
            node.meta["tensor_dict"] = {} if trains else {"_dynamo_static_input_type": "unguarded"}
            node.meta[EXAMPLE] = value
            placeholders.append(node)
            added.append(node)
        inputs.append(tuple(added))
    graph.erase_node(made)
    return inputs
