"""Stage 3: linears that share an input are grouped, so that it is quantized once; those that can be one GEMM become one; and the producer
of each operand is noted.

Every linear becomes part of a group: the linears that read the same value in the same region. The q, k and v of an attention become one
GEMM that writes the attention's layout. The graph still runs in high precision, with the same results.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from te_dynamo import ops
from te_dynamo.ir import op_of, site_of
from te_dynamo.ir.graph import EXAMPLE, emit, fake, is_call, is_method, tensor
from te_dynamo.ir.layout import Layout
from te_dynamo.ir.meta import LAYOUT, MEMBERS, PRODUCER, RECIPE
from te_dynamo.passes.effects import storage, written_between, written_memory
from te_dynamo.passes.heads import emit_in_place, emit_qkv, kernels_write_gradients, read_heads
from te_dynamo.passes.layout import choose_layouts, note_layouts, note_same_tokens, qkv_linears
from te_dynamo.passes.permutations import use_permutations
from te_dynamo.passes.readers import note_readers, reads_a_gemm_alone
from te_dynamo.passes.regions import regions
from te_dynamo.passes.weights import is_view


@dataclass(frozen=True)
class Merge:
    """How the q, k and v of an attention form one GEMM: interleave is the head size if q, k and v of a head are side by side."""

    interleave: int


def fuse(gm: GraphModule, *, grad_enabled: bool, short_sequence: int, skip_padding: bool = False) -> None:
    """Groups the linears of `gm`, in place. skip_padding: whether attentions may skip padding, where that is proved to be right."""
    if skip_padding:
        note_same_tokens(gm.graph)
    heads = {n: found for n in gm.graph.nodes if is_call(n, ops.attention) and (found := read_heads(n)) is not None}
    choose_layouts(gm.graph, short_sequence, set(heads))
    where = regions(gm.graph, grad_enabled)
    merges = _merges(gm.graph, heads)
    for attention, prepared in heads.items():
        emit_qkv(gm.graph, attention, prepared)
    written = written_memory(gm.graph) - {None}
    for group in _groups(gm.graph, where, _reached_by_gradients(gm.graph, where)):
        _group(gm.graph, group, merges, written)
    where = regions(gm.graph, grad_enabled)
    use_permutations(gm.graph, where)
    for attention in [n for n in gm.graph.nodes if is_call(n, ops.attention) and n not in heads]:
        if kernels_write_gradients(attention) and where[attention][1] and reads_a_gemm_alone(attention, 3, where):
            emit_in_place(gm.graph, attention)
    where = regions(gm.graph, grad_enabled)
    _note_producers(gm.graph, where)
    note_readers(gm.graph, where)
    note_layouts(gm.graph)
    gm.graph.lint()
    gm.recompile()


def _merges(graph: Graph, heads: Container[Node]) -> dict[tuple[Node, Node, Node], Merge]:
    """The q, k, v linears that become one GEMM, by attention. heads: the attentions whose q, k and v are rewritten on the way."""
    result = {}
    for node in graph.nodes:
        trio = qkv_linears(node) if is_call(node, ops.attention) else None
        if trio is None or len(set(trio)) != 3 or len({(n.args[0], n.kwargs["out_dtype"], n.meta[RECIPE]) for n in trio}) != 1:
            continue
        layout: Layout = node.meta[LAYOUT]
        head = tensor(node.args[0]).shape[-1]
        interleaved = node not in heads and _is_interleaved(layout) and all(_heads_only(n, head) for n in trio)
        equal = len({tensor(n).shape[-1] for n in trio}) == 1
        result[trio] = Merge(int(head) if interleaved and equal else 0)
    return result


def _is_interleaved(layout: Layout) -> bool:
    return layout.packing == "h3d"


def _heads_only(linear: Node, head: Any) -> bool:
    """Whether every user of a linear views it as [..., heads, head size]: then its heads need not be adjacent in memory."""
    return bool(linear.users) and all(_splits_heads(user, linear, head) for user in linear.users)


def _splits_heads(user: Node, linear: Node, head: Any) -> bool:
    shape, out = tensor(linear), tensor(user)
    reshapes = is_call(user, torch.reshape, torch.unflatten) or is_method(user, "unflatten")
    if not reshapes or user.args[0] is not linear or shape is None or out is None:
        return False
    return out.dim() == shape.dim() + 1 and out.shape[-1] == head and tuple(out.shape[:-2]) == tuple(shape.shape[:-1])


def _reached_by_gradients(graph: Graph, where: dict[Node, tuple[int, bool]]) -> set[Node]:
    """The nodes from which a path without a detach leads to a result of the graph."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        detached = is_method(node, "detach") or is_call(node, torch.detach) or not where.get(node, (0, True))[1]
        if node.op == "output" or (node in found and not detached):
            found.update(node.all_input_nodes)
    return found


def _groups(graph: Graph, where: dict[Node, tuple[int, bool]], reached: Container[Node]) -> list[list[Node]]:
    """The linears of each input, output dtype, recipe and region, in the graph's order. Linears that no gradient reaches are kept separate:
    their gradient is None, which a group's would not be."""
    found: dict[Any, list[Node]] = {}
    for node in graph.nodes:
        if is_call(node, ops.linear):
            key = (node.args[0], node.kwargs["out_dtype"], node.meta[RECIPE], where[node], not where[node][1] or node in reached)
            found.setdefault(key, []).append(node)
    return list(found.values())


def _group(graph: Graph, members: list[Node], merges: dict[tuple[Node, Node, Node], Merge], written: Container[Any]) -> None:
    """Turns the linears of one input into groups: first the q, k, v of each attention, then the rest.

    Linears that share a GEMM share a scale, which TE's do not: under `like_te` they are not merged. And their results are views of one
    buffer, which nothing outside of the graph should see. written: the memory that the graph writes.
    """
    may_merge = not getattr(members[0].meta[RECIPE], "like_te", False) and not any(_is_returned(m) for m in members)
    for trio, merge in merges.items() if may_merge else ():
        if all(n in members for n in trio) and _movable(list(trio)):
            _emit_group(graph, list(trio), written, merged=True, interleave=merge.interleave)
            members = [n for n in members if n not in trio]
    if len(members) > 1 and not _movable(members):
        for member in members:
            _emit_group(graph, [member], written)
    elif members:
        _emit_group(graph, members, written, merged=len(members) > 1 and may_merge and _learn_alike(members))


def _learn_alike(members: list[Node]) -> bool:
    """Whether all weights are trained, or none: merged with an adapter, a frozen weight would be requantized whenever the adapter
    changes."""
    return len({fake(m.args[1]).requires_grad for m in members}) == 1


def _is_returned(node: Node) -> bool:
    """Whether the graph returns the memory of a node."""
    output = node.graph.output_node()
    return storage(node) in {storage(n) for n in output.all_input_nodes} - {None}


def _movable(members: list[Node]) -> bool:
    """Whether the members may all be computed where the first result is needed."""
    if written_between(members) is not None:
        return False
    place = _first_use(members)
    return all(_can_precede(dependency, place) for m in members for dependency in m.all_input_nodes)


def _first_use(members: Iterable[Node]) -> Node:
    """Where a group goes: before the first use of any member, and no later than its last member, so in their region."""
    return min([max(members), *(user for m in members for user in m.users)])


def _can_precede(node: Node, place: Node) -> bool:
    """Whether a node is before `place`, or depends only on nodes that are and can be moved there (views of weights)."""
    if node < place:
        return True
    return is_view(node) and all(_can_precede(n, place) for n in node.all_input_nodes)


def _emit_group(graph: Graph, members: list[Node], written: Container[Any], *, merged: bool = False, interleave: int = 0) -> None:
    place = _first_use(members)
    for member in members:
        for dependency in member.all_input_nodes:
            _hoist(dependency, place)
    x, dtype = members[0].args[0], members[0].kwargs["out_dtype"]
    weights, biases = [m.args[1] for m in members], [m.args[2] if len(m.args) > 2 else None for m in members]
    with graph.inserting_before(place):
        kwargs = {"out_dtype": dtype, "merged": merged, "interleave": interleave}
        group = emit(graph, ops.linears, (x, weights, biases), kwargs, like=members[0])
        outputs = [emit(graph, operator.getitem, (group, i), like=m) for i, m in enumerate(members)]
        # A site's result may be a view, which autograd does not let be written in place.
        outputs = [emit(graph, torch.clone, (y,), like=m) if storage(m) in written else y for y, m in zip(outputs, members, strict=True)]
    group.meta[RECIPE] = members[0].meta[RECIPE]
    group.meta[MEMBERS] = [_site_meta(m) for m in members]
    for member, output in zip(members, outputs, strict=True):
        _replace(graph, member, output, interleave)


def _site_meta(member: Node) -> dict[str, Any]:
    return {k: v for k, v in member.meta.items() if k.startswith("te_")}


def _replace(graph: Graph, member: Node, output: Node, interleave: int) -> None:
    if interleave:  # the output already has its heads: its users' reshapes are done
        for user in list(member.users):
            user.replace_all_uses_with(output)
            graph.erase_node(user)
    else:
        output.meta[EXAMPLE] = member.meta[EXAMPLE]
        member.replace_all_uses_with(output)
    graph.erase_node(member)


def _hoist(node: Node, place: Node) -> None:
    if place < node:
        for dependency in node.all_input_nodes:
            _hoist(dependency, place)
        place.prepend(node)


def _note_producers(graph: Graph, where: dict[Node, tuple[int, bool]]) -> None:
    """Notes the node that makes the operand of each site, if the two could be computed together: an operation that computes each row of its
    result from the same rows of its inputs, in the same region, and whose first reader is the site."""
    for node in graph.nodes:
        op = site_of(node)
        gemms = op.gemms(node) if op is not None else ()
        maker = gemms[0].x if gemms else None
        made_by = op_of(maker)
        if maker is None or made_by is None or made_by.is_site or not made_by.by_rows(made_by.attributes(maker)):
            continue
        first = min(maker.users) is node
        if first and where[maker] == where[node] and written_between([maker, node]) is None:
            node.meta[PRODUCER] = maker.name
