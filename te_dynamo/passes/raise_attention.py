"""Stage 2, attention: `scaled_dot_product_attention`, attention written out by hand, and `nn.MultiheadAttention` become
`ops.attention`.

This file has the first of them, and the rules of all.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Graph, Node

from te_dynamo.ir.graph import fake, same_size
from te_dynamo.passes.attention_site import (
    Attention,
    Names,
    Operand,
    arrange_mask,
    broadcast,
    emit_attention,
    look_through,
    one_head,
    size_of,
)
from te_dynamo.passes.raise_attention_by_hand import ByHand
from te_dynamo.passes.raise_mha import EncoderLayer, MultiheadAttention
from te_dynamo.passes.rules import Declined, Match, Rule

# The names of the dimensions before the last two, by how many there are.
LEADING: dict[int, Names] = {0: (), 1: ("g",), 2: ("b", "h")}


class ScaledDotProductAttention(Rule):
    """`scaled_dot_product_attention`; heads of k and v that the graph repeats are left to `enable_gqa`."""

    kind = "attention"
    ends_at = frozenset({torch._C._nn.scaled_dot_product_attention})

    def match(self, node: Node) -> Match | Declined | None:
        q, k, v, mask, dropout_p, causal = node.args
        scale, enable_gqa = node.kwargs["scale"], node.kwargs["enable_gqa"]
        leading = LEADING.get(fake(q).dim() - 2)
        if leading is None or not fake(q).dim() == fake(k).dim() == fake(v).dim():
            ranks = ", ".join(str(fake(x).dim()) for x in (q, k, v))
            return Declined(f"q, k and v have {ranks} dimensions; fused attention takes [batch, heads, sequence, head size]")
        if mask is not None and fake(mask).dim() > fake(q).dim():
            return Declined("the mask has more dimensions than q")
        if isinstance(scale, Node) or isinstance(dropout_p, Node):
            return Declined("the scale or the dropout probability is computed in the graph")
        queries, keys = Operand(q, (*leading, "i", "d")), Operand(k, (*leading, "j", "d"))
        values = Operand(v, (*leading, "j", "e"))
        keys, values, grouped = *(_ungrouped(queries, keys, values) or (keys, values)), bool(enable_gqa)
        if grouped:
            keys, values = (replace(o, repeats=size_of(queries, "h") // size_of(o, "h")) for o in (keys, values))
        if fault := broadcast(Operand(node, (*leading, "i", "e")), queries, keys, values):
            return Declined(fault)
        site = Attention(
            queries,
            keys,
            values,
            out=(*leading, "i", "e"),
            dtype=fake(node).dtype,
            scale=None if scale is None else float(scale),
            dropout_p=float(dropout_p),
            causal=bool(causal),
            enable_gqa=grouped or keys.repeats > 1 or one_head(queries, keys, values),
        )
        return Match(node, [*site.k.nodes, *site.v.nodes, node], {"site": site, "mask": mask, "names": (*leading, "i", "j")})

    def rewrite(self, graph: Graph, match: Match) -> Node:
        node, v = match.output, match.values
        mask = None if v["mask"] is None else arrange_mask(graph, v["mask"], v["names"], None, node)
        return emit_attention(graph, v["site"], mask, node)


def _ungrouped(q: Operand, k: Operand, v: Operand) -> tuple[Operand, Operand] | None:
    """k and v before their heads were repeated; None where they were not, or not equally often."""
    k, v = (look_through(o, fake(o.node).dtype, {"repeat"}) for o in (k, v))
    if k.repeats == 1 or k.repeats != v.repeats:
        return None
    return (k, v) if all(same_size(size_of(o, "h") * o.repeats, size_of(q, "h")) for o in (k, v)) else None


ATTENTION_RULES: tuple[Rule, ...] = (ScaledDotProductAttention(), ByHand(), MultiheadAttention(), EncoderLayer())
