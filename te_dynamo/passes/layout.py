"""The memory layout wanted for an attention: the graph tells what kind of attention it is, a table which layout that gets.

`te_dynamo.ir.layout` explains the names.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import SymInt
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from te_dynamo import ops
from te_dynamo.ir.graph import fake, is_call, is_method, same_size, tensor
from te_dynamo.ir.layout import Layout, Packing, in_memory
from te_dynamo.ir.meta import IN_MEMORY, LAYOUT, MASK, NOTES, QKV_LAYOUT, SAME_TOKENS
from te_dynamo.passes.canonicalize import LINEAR
from te_dynamo.passes.effects import storage
from te_dynamo.passes.memory import Structure, ValuesInMemory, described, first_copy
from te_dynamo.passes.weights import is_view


@dataclass(frozen=True)
class AttentionShape:
    """What the choice of a layout depends on.

    batch_first: whether q's linear orders tokens batch by batch ([B, S, ...]), or position by position ([S, B, ...]).
    self_attention: q, k and v come from linears of one input, with nothing in between (a cache, say) that adds to them.
    shared_kv: k and v come from linears of one input, with the same order of tokens.
    heads_q, heads_kv: number of heads; equal_head_sizes: of k and v.
    s_q, s_kv: lengths, a SymInt where they are symbolic.
    packed_by_user: how q, k and v, or k and v, are packed in the output of one linear by the user; "" if they are in an order that has
        no name, None if nothing is packed.
    """

    batch_first: bool
    self_attention: bool
    shared_kv: bool
    heads_q: int
    heads_kv: int
    s_q: int | SymInt
    s_kv: int | SymInt
    equal_head_sizes: bool = True
    packed_by_user: Packing | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table: which attention it is for, and the packing up to the short length and above it."""

    case: str
    applies: Callable[[AttentionShape], bool]
    short: Packing
    long: Packing


TABLE = (
    Row("decode: one query row, with a cache", lambda a: _is_one(a.s_q) and not _is_one(a.s_kv), "", ""),
    Row("the user packed q, k and v one after another", lambda a: a.packed_by_user == "3hd", "3hd", "3hd"),
    Row("the user packed q, k and v head by head", lambda a: a.packed_by_user == "h3d", "h3d", "h3d"),
    Row("the user packed k and v one after another", lambda a: a.packed_by_user == "2hd", "2hd", "2hd"),
    Row("the user packed k and v head by head", lambda a: a.packed_by_user == "h2d", "h2d", "h2d"),
    Row("the user packed in an order without a name", lambda a: a.packed_by_user == "", "", ""),
    Row("self-attention, equal heads", lambda a: a.self_attention and a.equal_head_sizes and a.heads_q == a.heads_kv, "3hd", "h3d"),
    Row("grouped heads, or cross-attention", lambda a: a.shared_kv and a.equal_head_sizes, "2hd", "h2d"),
    Row("q, k and v of different origins", lambda a: True, "", ""),
)


def choose_layout(site: AttentionShape, short_sequence: int) -> Layout:
    """The layout of an attention: packed where the longest sequence is at most `short_sequence`, else interleaved.

    Compares a length only if the choice depends on it: comparing a symbolic one sets a guard.
    """
    row = next(row for row in TABLE if row.applies(site))
    short = row.short == row.long or (bool(site.s_q <= short_sequence) and bool(site.s_kv <= short_sequence))
    return Layout("bshd" if site.batch_first else "sbhd", row.short if short else row.long)


def choose_layouts(graph: Graph, short_sequence: int, written_anew: Container[Node] = ()) -> None:
    """Gives each attention the layout that is wanted for it, in `meta[LAYOUT]`. written_anew: the attentions whose q, k and v are rewritten
    on the way, by a norm or RoPE, so that the user's packing makes no difference."""
    for node in graph.nodes:
        if is_call(node, ops.attention):
            shape = attention_shape(node)
            shape = replace(shape, packed_by_user=None) if node in written_anew else shape
            node.meta[LAYOUT] = choose_layout(shape, short_sequence)


def note_layouts(graph: Graph) -> None:
    """Notes how q, k and v of each attention are laid out when it runs and, if another layout was wanted, why it is not that."""
    values = ValuesInMemory(graph)
    known: dict[Any, tuple[Layout | None, str]] = {}
    for node in graph.nodes:
        if not is_call(node, ops.attention):
            continue
        alike = Structure(node.args[:3]).key
        if alike not in known:
            operands = [values.of(x) for x in node.args[:3]]
            found = in_memory(*operands)
            known[alike] = (found, described(*operands) if found is None else found.name)
        (layout, node.meta[IN_MEMORY]), wanted = known[alike], node.meta[LAYOUT]
        if layout is not None:
            node.meta[QKV_LAYOUT] = layout.name
        if wanted != layout and wanted.packing:
            copies = {name: copy for name, x in zip("qkv", node.args, strict=False) if (copy := first_copy(x))}
            why = "; ".join(f"{copy} copies {name}" for name, copy in copies.items()) or "they come from different GEMMs"
            node.meta[NOTES] = {**node.meta.get(NOTES, {}), "layout": f"wanted {wanted.name}, but {why}"}


def _is_one(size: int | SymInt) -> bool:
    return isinstance(size, int) and size == 1  # Dynamo makes no 1 symbolic


def attention_shape(node: Node) -> AttentionShape:
    """What an `ops.attention` node is, from its arguments and the linears that they come from."""
    q, k, v = (fake(x) for x in node.args[:3])
    chains = [_chain(x) for x in node.args[:3]]
    batch_first = [_batch_first(chain) for chain in chains]
    linears = [None if chain is None else chain[0] for chain in chains]
    return AttentionShape(
        batch_first=batch_first[0],
        self_attention=_share_input(linears) and len(set(batch_first)) == 1,
        shared_kv=_share_input(linears[1:]) and batch_first[1] == batch_first[2],
        heads_q=int(q.shape[1]),
        heads_kv=_heads_made(linears, k),
        s_q=q.shape[2],
        s_kv=k.shape[2],
        equal_head_sizes=q.shape[3] == v.shape[3],
        packed_by_user=_packed_by_user(chains, k),
    )


def qkv_linears(node: Node) -> tuple[Node, Node, Node] | None:
    """The `ops.linear` nodes that q, k and v of an `ops.attention` come from: one node three times where the user packed
    them; None where one of the three does not come from a linear."""
    chains = [_chain(x) for x in node.args[:3]]
    q, k, v = (None if chain is None else chain[0] for chain in chains)
    return None if q is None or k is None or v is None else (q, k, v)


def follows_linears(node: Node) -> bool:
    """Whether q or k of an attention comes from an FP8 linear."""
    return any(_chain(x) is not None for x in node.args[:2])


# --- from q, k or v back to the linear that makes it

# What passes on the elements of its first argument, possibly changed, in the same dimensions (or in others: see `_before`).
PASSING: frozenset[Callable[..., Any]] = frozenset(
    {
        ops.norm,
        F.dropout,
        F.layer_norm,
        F.normalize,
        F.rms_norm,
        torch.clone,
        torch.neg,
        torch.repeat_interleave,
        torch.select,
        torch.unbind,
        torch.unflatten,
        torch.view_as_complex,
        torch.view_as_real,
    }
)
PASSING_METHODS = ("clone", "expand", "expand_as", "repeat_interleave", "select", "squeeze", "to", "unsqueeze")
FACTORS: frozenset[Callable[..., Any]] = frozenset({torch.mul, torch.div})
TERMS: frozenset[Callable[..., Any]] = frozenset({torch.add, torch.sub})
JOINS: frozenset[Callable[..., Any]] = frozenset({torch.cat, torch.concat, torch.stack})

Chain = list[Node]


def _chain(value: Any) -> Chain | None:
    """The nodes from a linear to `value`, if that is the linear's output except for views, norms, positions (RoPE) and scaling."""
    return _Chains().of(value)


class _Chains:
    """Chains back to linears; each node is visited once, although RoPE and the like read a value several times."""

    def __init__(self) -> None:
        self.known: dict[Node, Chain | None] = {}

    def of(self, value: Any) -> Chain | None:
        if not isinstance(value, Node):
            return None
        if value not in self.known:
            self.known[value] = [value] if is_call(value, ops.linear) else self._longer(value)
        return self.known[value]

    def _longer(self, node: Node) -> Chain | None:
        required, optional = _sources(node)
        chains = [self.of(source) for source in required]
        if any(chain is None for chain in chains):
            return None
        found = [chain for chain in (*chains, *map(self.of, optional)) if chain is not None]
        if len({chain[0] for chain in found}) != 1:
            return None
        return [*found[0], node]


def _sources(node: Node) -> tuple[Sequence[Any], Sequence[Any]]:
    """The arguments that a node's elements come from: those that must come from a linear; those that may."""
    if is_view(node) or is_call(node, *PASSING) or is_method(node, *PASSING_METHODS):
        return node.args[:1], ()
    if is_call(node, *JOINS):
        return (node.args[0] if isinstance(node.args[0], (list, tuple)) else ()), ()
    if is_call(node, *FACTORS):
        return (), node.args[:2]
    if is_call(node, *TERMS):  # a term as large as the sum is part of it; a smaller one is a bias or a position
        size = _product(fake(node).shape)
        whole = [x for x in node.args[:2] if (value := tensor(x)) is not None and _product(value.shape) == size]
        return whole, ()
    return (), ()


def _share_input(linears: Sequence[Node | None]) -> bool:
    """Whether all these linears read one value, ignoring casts and reshapes."""
    if any(linear is None for linear in linears):
        return False
    return len({_input(linear) for linear in linears if linear is not None}) == 1


def _input(linear: Node) -> Any:
    value: Any = linear.args[0]
    while is_method(value, "to", "contiguous") or is_call(value, torch.reshape):
        value = value.args[0]
    return value


def _heads_made(linears: Sequence[Node | None], k: torch.Tensor) -> int:
    """The number of heads that k's linear makes: fewer than k has if the graph repeats them for the queries."""
    _, linear, other = linears
    heads = int(k.shape[1])
    return heads if linear is None or linear is other else min(heads, int(fake(linear).shape[-1] // k.shape[3]))


# --- which of batch and sequence is the outer dimension where a linear makes q


def _batch_first(chain: Chain | None) -> bool:
    """Whether the batch is outside the sequence in the output of the linear at the beginning of `chain`.

    Follows the dimensions 0 (batch) and 2 (sequence) of the last node back to it. True where they cannot be followed.
    """
    batch, sequence = 0, 2
    nodes = list(reversed(chain or ()))
    for node, source in pairwise(nodes):
        outer, inner = _before(node, source, batch), _before(node, source, sequence)
        if outer is None or inner is None or outer == inner:
            break
        batch, sequence = outer, inner
    return batch < sequence


def _before(node: Node, source: Node, dim: int) -> int | None:
    """Where dimension `dim` of `node` is in `source`, the argument that it is made from; None if that is unknown."""
    args: Any = node.args
    if is_call(node, operator.getitem) and tensor(source) is None:
        return dim  # one of the results of `source`: the step from there to its own argument tells
    if is_call(node, torch.transpose):
        i, j = (d % fake(node).dim() for d in args[1:3])
        return {i: j, j: i}.get(dim, dim)
    if is_call(node, torch.t):
        return 1 - dim
    if is_call(node, torch.permute):
        return args[1][dim] % fake(node).dim()
    if is_call(node, torch.unbind, torch.select) or is_method(node, "unbind", "select"):
        removed: Any = (*args, node.kwargs.get("dim", 0))[1]
        removed %= fake(source).dim()
        return dim if dim < removed else dim + 1
    if is_call(node, operator.getitem):
        return _indexed(args[1], fake(source).dim(), dim)
    value, first = tensor(node), tensor(source)
    if value is None or first is None or (value.dim() == first.dim() and not is_call(node, torch.reshape)):
        return dim
    return _reshaped(first.shape, value.shape, dim)


def _indexed(index: Any, rank: int, dim: int) -> int | None:
    """Where dimension `dim` of x[index] is in x, of `rank` dimensions: an int takes one away, None adds one, a list reorders."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis not in parts:
        parts.append(Ellipsis)
    at = parts.index(Ellipsis)
    parts[at : at + 1] = [slice(None)] * (rank - sum(part is not None for part in parts) + 1)
    dims: list[int | None] = []
    position = 0
    for part in parts:
        if part is None or isinstance(part, (slice, list)):
            dims.append(position if isinstance(part, slice) else None)
        position += part is not None
    return dims[dim]


def _reshaped(before: Sequence[Any], after: Sequence[Any], dim: int) -> int | None:
    """Where dimension `dim` of a reshape's result begins in its argument: at the same product of the sizes outside it."""
    outside = [_product(before[:i]) for i in range(len(before))]
    wanted = _product(after[:dim])
    candidates = [i for i, size in enumerate(outside) if size == wanted]
    if not candidates:
        return None
    return candidates[0] if _is_one(after[dim]) else candidates[-1]


def _product(sizes: Sequence[Any]) -> Any:
    """A product of sizes as an expression, which is compared without a guard."""
    product: Any = 1
    for size in sizes:
        product = product * _expression(size)
    return product


def _expression(size: int | SymInt) -> Any:
    return size.node.expr if isinstance(size, SymInt) else size


# --- whether rows and keys are the same tokens


NEAR = 40  # how many nodes before an attention what q and k have in common is searched for


def note_same_tokens(graph: Graph) -> None:
    """Notes for each attention that reads a mask whether its row i and key i are proved to be made from the same token, for every i."""
    for node in graph.nodes:
        if is_call(node, ops.attention) and MASK in node.meta:
            tokens = _Tokens(node)
            q, k = (tokens.makes(x, 0, 2, NEAR) for x in node.args[:2])
            node.meta[SAME_TOKENS] = not q.isdisjoint(k)


class _Tokens:
    """The values that q or k of an attention is made from token by token, each with its dimensions of the batch and the sequence, which may
    be one."""

    def __init__(self, attention: Node) -> None:
        q = fake(attention.args[0])
        self.batch, self.sequence = q.shape[0], q.shape[2]
        self.known: dict[tuple[Any, int, int], frozenset[tuple[Node, int, int]]] = {}

    def makes(self, value: Any, batch: int, sequence: int, near: int) -> frozenset[tuple[Node, int, int]]:
        """Whatever `value` is made from, all of it: a part of its features, or a term of a sum, may come from elsewhere."""
        at = (value, batch, sequence)
        if at not in self.known:
            self.known[at] = self._makes(*at, near - 1)
        return self.known[at]

    def _makes(self, value: Any, batch: int, sequence: int, near: int) -> frozenset[tuple[Node, int, int]]:
        if not isinstance(value, Node) or not near:
            return frozenset()
        made, together = tensor(value), self.batch * self.sequence
        wanted = (self.batch, self.sequence) if batch != sequence else (together, together)
        if made is not None and not all(map(same_size, (made.shape[batch], made.shape[sequence]), wanted)):
            return frozenset()  # only some tokens, or others too
        found = []
        for source in _whole(value):
            outer, inner = (_before(value, source, dim) for dim in (batch, sequence))
            inner = outer if inner is None else inner  # if the source has as many there, batch by batch
            found.append(frozenset() if outer is None or inner is None else self.makes(source, outer, inner, near))
        return (frozenset.intersection(*found) if found else frozenset()) | {(value, batch, sequence)}


def _whole(node: Node) -> list[Any]:
    """The arguments that a node's elements come from: all of them, or those as large as the result."""
    if is_call(node, ops.linear, LINEAR) or (is_call(node, operator.getitem) and not _is_indexed_by_tensors(node)):
        return [node.args[0]]
    required, optional = _sources(node)
    size = None if (value := tensor(node)) is None else _product(value.shape)
    whole = [x for x in optional if (t := tensor(x)) is not None and _product(t.shape) == size]
    return [*(x for x in required if not _is_empty(x)), *whole]


def _is_indexed_by_tensors(node: Node) -> bool:
    return any(isinstance(part, Node) and tensor(part) is not None for part in tree_leaves(node.args[1]))


def _is_empty(x: Any) -> bool:
    """Whether it adds nothing to what it is concatenated with: a cache at the beginning."""
    value = tensor(x) if isinstance(x, Node) else None
    return value is not None and any(isinstance(n, int) and n == 0 for n in value.shape)


# --- in which order the user packed


def _packed_by_user(chains: Sequence[Chain | None], k: torch.Tensor) -> Packing | None:
    """How q, k and v, or k and v, are packed in the output of the one linear they come from, according to the offsets of their views."""
    q_linear, k_linear, v_linear = (None if chain is None else chain[0] for chain in chains)
    if k_linear is None or k_linear is not v_linear:
        return None if q_linear is None or q_linear not in (k_linear, v_linear) else ""
    three = q_linear is k_linear
    begins = [_begin(chain) for chain in (chains if three else chains[1:]) if chain is not None]
    steps = {_expression(after - before) for before, after in pairwise(begins)}
    if steps == {k.shape[1] * k.shape[3]}:
        return "3hd" if three else "2hd"
    if steps == {k.shape[3]}:
        return "h3d" if three else "h2d"
    return ""


def _begin(chain: Chain) -> Any:
    """The offset of the last view in the chain that is still in the memory of the linear's output."""
    memory, offset = storage(chain[0]), 0
    for node in chain:
        value = tensor(node)
        if value is not None and storage(node) != memory:
            break
        offset = offset if value is None else value.storage_offset()  # type: ignore[assignment]
    return offset
