"""Which linears are logits: they stay in high precision unless the user includes them.

A linear is logits if its weight is an embedding's (tied), or if it has one output for each row of the token embedding and
nothing but the graph's outputs or a loss comes after it. A graph without an embedding (a layer compiled by itself, the
rest of a model after a graph break) has none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from te_dynamo.ir import op_of
from te_dynamo.ir.graph import is_call, is_method, submodules, tensor, upstream
from te_dynamo.passes.effects import writes
from te_dynamo.passes.weights import is_buffer, is_parameter, weight_of

EMBEDDINGS = (F.embedding, F.embedding_bag)
# Operations that move or select an index's integers, and compute no new ones.
INDEX_MOVES: tuple[Callable[..., Any], ...] = (
    operator.getitem,
    torch.cat,
    torch.chunk,
    torch.clamp,
    torch.clone,
    torch.flatten,
    torch.masked_fill,
    torch.permute,
    torch.reshape,
    torch.roll,
    torch.split,
    torch.squeeze,
    torch.stack,
    torch.t,
    torch.transpose,
    torch.unsqueeze,
    torch.where,
)
INDEX_MOVE_METHODS = (
    "clamp_min", "clamp_max", "clone", "contiguous", "expand", "int", "long", "masked_fill_", "new_full", "new_zeros",
    "repeat", "roll", "to", "type", "unfold",
)  # fmt: skip
# What hidden states go through, besides semantic ops; nothing computed from logits does.
HIDDEN_STATE_OPS: frozenset[Any] = frozenset(
    {
        torch._C._nn.linear,
        torch._C._nn.scaled_dot_product_attention,
        torch.addbmm,
        torch.addmm,
        torch.baddbmm,
        torch.bmm,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.einsum,
        torch.matmul,
        torch.mm,
        F.batch_norm,
        F.bilinear,
        F.group_norm,
        F.instance_norm,
        F.layer_norm,
        F.multi_head_attention_forward,
        F.rms_norm,
    }
)


def find_logits(gm: GraphModule) -> set[Node]:
    """The nodes of a raised graph whose weight GEMM gives logits."""
    embeddings = [node for node in gm.graph.nodes if is_call(node, *EMBEDDINGS)]
    tables = {ref.root for node in embeddings if (ref := weight_of(_table(node))) is not None}
    vocabulary = _vocabulary(embeddings)
    subgraphs = {node: inner for node, _, inner in submodules(gm)}
    found = set()
    for node in gm.graph.nodes:
        op = op_of(node)
        for gemm in op.gemms(node) if op is not None else ():
            ref = weight_of(gemm.weight)
            tied = ref is not None and ref.root in tables
            if tied or (_rows(gemm.weight) == vocabulary and not _reaches_hidden_state(node, subgraphs)):
                found.add(node)
    return found


def _table(embedding: Node) -> Any:
    return embedding.args[1] if len(embedding.args) > 1 else embedding.kwargs.get("weight")


def _rows(weight: Any) -> int | None:
    value = tensor(weight)
    return value.shape[0] if value is not None and isinstance(value.shape[0], int) else None


def _vocabulary(embeddings: list[Node]) -> int | None:
    """The number of rows of the token embedding; None where there is none.

    It is the largest of the tables that an integer input of the graph indexes: token types, and positions where the user
    passes them, are inputs as well, but their tables are smaller. Positions made in the graph (`arange`, `cumsum` of a
    mask) index their table with computed values, and do not count however large it is.
    """
    rows = [_rows(_table(node)) for node in embeddings if _is_given(node.args[0] if node.args else node.kwargs["input"])]
    return max((n for n in rows if n is not None), default=None)


def _is_given(index: Any) -> bool:
    """Whether an index holds integers that are inputs of the graph, moved, selected, clamped or filled but not computed."""
    return any(_is_integer_input(node) for node in upstream(index, inputs=_moved))


def _is_integer_input(node: Node) -> bool:
    value = tensor(node)
    if node.op != "placeholder" or value is None or value.is_floating_point() or value.dtype == torch.bool:
        return False
    return not is_parameter(node) and not is_buffer(node)


def _moved(node: Node) -> list[Node]:
    """The values that `node` moves, or that are written into it: `ids = x.new_zeros(...); ids[:, 1:] = x[:, :-1]`."""
    if not is_call(node, *INDEX_MOVES) and not is_method(node, *INDEX_MOVE_METHODS):
        return []
    written = [n for user in node.users if node in writes(user) for n in user.all_input_nodes if n is not node]
    return node.all_input_nodes + written


def _reaches_hidden_state(linear: Node, subgraphs: dict[Node, GraphModule]) -> bool:
    """Whether anything after `linear` multiplies, attends to or normalizes what depends on its result. Integers made from it
    (a sampled token, an index) are not followed: no gradient comes back through them."""
    seen, stack = {linear}, [linear]
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if _is_hidden(user) or any(_computes(subgraphs[n]) for n in user.all_input_nodes if n in subgraphs):
                return True
            value = tensor(user)
            if value is None or value.is_floating_point():
                stack.append(user)
    return False


def _is_hidden(node: Node) -> bool:
    return op_of(node) is not None or node.target in HIDDEN_STATE_OPS


def _computes(gm: GraphModule) -> bool:
    return any(map(_is_hidden, gm.graph.nodes)) or any(_computes(inner) for _, _, inner in submodules(gm))
