"""What the rules for attention share: operands and masks with named dimensions, traced back to where they are made,
and the building of `ops.attention` with the views around it.

Names: b batch, h heads, g batch and heads in one dimension, i query rows, j key rows, d head size of q and k, e of v.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._prims_common import is_contiguous_or_false
from torch.fx import Graph, Node

from te_dynamo import ops
from te_dynamo.ir.graph import emit, emit_contiguous, emit_permuted, fake, is_call, is_method, operands, same_shape, same_size, tensor
from te_dynamo.ir.meta import NOTES, PATH, UNIFORM_ROWS
from te_dynamo.passes.effects import storage

Names = tuple[str, ...]
ORDER = "gbhijde"


@dataclass(frozen=True)
class Operand:
    """A value, the names of its dimensions, and what was looked through to reach it: the product of the scalar factors, how
    often each head was repeated, the number of heads where `g` was split, and the nodes."""

    node: Any
    names: Names
    factor: float = 1.0
    repeats: int = 1
    heads: int | None = None
    nodes: tuple[Node, ...] = ()


def number(value: Any) -> float | None:
    """The number that `value` is, or that fills the constant tensor `value`; None where it is no constant."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if is_call(value, torch.full, torch.full_like) and len(value.args) > 1:
        return number(value.args[1])
    if is_call(value, torch.tensor, torch.scalar_tensor):
        return number(value.args[0])
    return None


def scaled(node: Any) -> tuple[Any, float] | None:
    """(x, factor) where `node` is x times or divided by a constant."""
    if not operands(node, torch.mul, torch.div):
        return None
    x, by = node.args
    constant = number(by)
    if constant is None or tensor(x) is None or fake(x).dtype != fake(node).dtype or (node.target is torch.div and constant == 0):
        return None
    if not same_shape(fake(x).shape, fake(node).shape):
        return None
    return x, constant if node.target is torch.mul else 1 / constant


def cast(node: Any) -> Any:
    """The argument of a cast from one floating-point dtype to another; None where `node` is no such cast."""
    if not is_method(node, "to", "type") or len(node.args) != 2 or not isinstance(node.args[1], torch.dtype):
        return None
    return node.args[0] if fake(node.args[0]).is_floating_point() and fake(node).is_floating_point() else None


def merged(node: Any) -> bool:
    """Whether `node` merges the first two of four dimensions."""
    if not is_call(node, torch.reshape, torch.flatten):
        return False
    before, after = fake(node.args[0]).shape, fake(node).shape
    return len(before) == 4 and len(after) == 3 and same_shape(before[2:], after[1:]) and isinstance(before[1], int)


def split(node: Any) -> bool:
    """Whether `node` splits the first of three dimensions in two."""
    if not is_call(node, torch.reshape, torch.unflatten):
        return False
    before, after = fake(node.args[0]).shape, fake(node).shape
    return len(before) == 3 and len(after) == 4 and same_shape(before[1:], after[2:]) and isinstance(after[1], int)


def repeated(node: Any) -> tuple[Node, int, int, tuple[Node, ...]] | None:
    """(x, dim, n, the nodes) where `node` is x with each entry of a dimension repeated n times, as `repeat_interleave` or
    `x[:, :, None].expand(..., n, ...).reshape(...)` does it."""
    if is_call(node, torch.repeat_interleave):
        x, *by = node.args
        repeats = len(by) == 2 and all(isinstance(n, int) for n in by)
        return (x, by[1] % fake(node).dim(), by[0], (node,)) if repeats else None
    expand = node.args[0] if is_call(node, torch.reshape) else None
    inserted = expand.args[0] if is_method(expand, "expand") or is_call(expand, torch.broadcast_to) else None
    dim = int(inserted.args[1]) % fake(inserted).dim() if is_call(inserted, torch.unsqueeze) else 0
    if expand is None or inserted is None or dim == 0:
        return None
    x, wide, out = fake(inserted.args[0]).shape, fake(expand).shape, fake(node).shape
    n = wide[dim]
    if not isinstance(n, int) or not same_shape(wide, (*x[:dim], n, *x[dim:])):
        return None
    if not same_shape(out, (*x[: dim - 1], x[dim - 1] * n, *x[dim:])):
        return None
    return inserted.args[0], dim - 1, n, (inserted, expand, node)


def look_through(operand: Operand, dtype: torch.dtype, steps: Collection[str]) -> Operand:
    """The operand before `steps`, which `ops.attention` can express itself; among nodes that differ only by transposes, the one whose
    dimensions are in the order of `ORDER`.

    steps: which to look through: "factor" (times a constant), "cast" (a widening from `dtype`), "merge" (of batch and heads into one),
    "repeat" (of each head for a group of queries). Transposes in between are looked through too.
    """
    reached = [operand]
    significant = 0
    while (following := _before(reached[-1], dtype, steps)) is not None:
        reached.append(following[0])
        if following[1]:
            significant = len(reached) - 1
    candidates = reached[significant:]
    return next((c for c in candidates if list(c.names) == sorted(c.names, key=ORDER.index)), candidates[0])


def _before(o: Operand, dtype: torch.dtype, steps: Collection[str]) -> tuple[Operand, bool] | None:
    """The operand one node further back, and whether that node is one of `steps`; None where none can be looked through."""
    node, names = o.node, o.names
    if not isinstance(node, Node) or tensor(node) is None:
        return None

    def further(source: Any, *, names: Names = names, nodes: tuple[Node, ...] = (node,), **changes: Any) -> Operand:
        return replace(o, node=source, names=names, nodes=(*o.nodes, *nodes), **changes)

    if (before := reordered(node, names)) is not None:
        return further(node.args[0], names=before), False
    if is_method(node, "contiguous"):
        return further(node.args[0]), False
    if "factor" in steps and (found := scaled(node)) is not None:
        return further(found[0], factor=o.factor * found[1]), True
    if "cast" in steps and (source := cast(node)) is not None and fake(source).dtype == dtype != fake(node).dtype:
        return further(source), True
    if "merge" in steps and names[:1] == ("g",) and merged(node):
        return further(node.args[0], names=("b", "h", *names[1:]), heads=fake(node.args[0]).shape[1]), True
    if "repeat" in steps and "h" in names and (repeat := repeated(node)) is not None and names[repeat[1]] == "h":
        return further(repeat[0], nodes=repeat[3], repeats=o.repeats * repeat[2]), True
    return None


def transposed(node: Any, names: Names) -> Names | None:
    """The names of the argument of a transpose whose result has `names`; None where `node` is no transpose."""
    if not is_call(node, torch.transpose, torch.t) or len(names) < 2:
        return None
    a, b = (0, 1) if node.target is torch.t else (int(d) % len(names) for d in node.args[1:3])
    swapped = list(names)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return tuple(swapped)


def reordered(node: Any, names: Names) -> Names | None:
    """The names of the argument of a transpose or permutation whose result has `names`; None where `node` is neither."""
    if not is_call(node, torch.permute) or len(node.args) != 2:
        return transposed(node, names)
    order = [d % len(names) for d in node.args[1]]
    return tuple(names[order.index(i)] for i in range(len(names)))


def size_of(operand: Operand, *names: str) -> Any:
    """The product of the sizes of dimensions; 1 for a dimension that the operand lacks and is broadcast along."""
    shape = fake(operand.node).shape
    return math.prod(shape[operand.names.index(name)] for name in names if name in operand.names)


def broadcast(scores: Operand, q: Operand, k: Operand, v: Operand) -> str | None:
    """q, k and v must have the batch of the scores (or of the result); but one head of k and v may serve all heads of q."""
    if k.repeats != v.repeats:
        return "k and v have different numbers of heads"
    whole = size_of(scores, "g", "b", "h")
    for operand in (q, k, v):
        heads = size_of(q, "h") if operand is not q and one_head(q, k, v) else operand.repeats
        if not same_size(size_of(operand, "g", "b", "h") * heads, whole):
            return "q, k and v are broadcast against one another"
    return None


def one_head(q: Operand, k: Operand, v: Operand) -> bool:
    """Whether k and v have one head, and q has several."""
    if "h" not in q.names or same_size(size_of(q, "h"), 1):
        return False
    return all("g" not in o.names and same_size(size_of(o, "h"), 1) for o in (k, v))


# --- Building


def emit_cast(graph: Graph, x: Any, dtype: torch.dtype, like: Node) -> Any:
    """`x` in `dtype`, as the canonical form spells it."""
    return x if fake(x).dtype == dtype else emit(graph, "to", (x, dtype), like=like)


def arrange(graph: Graph, x: Any, names: Names, wanted: Names, heads: int | None, like: Node) -> Any:
    """`x` with the dimensions `wanted`: `g` split into `b` and `h` (one head where `heads` is None), missing ones of size 1."""
    if "g" in names:
        at = names.index("g")
        is_one = same_size(fake(x).shape[at], 1)  # a mask that is the same for all
        if heads is None or is_one:
            x = emit(graph, torch.unsqueeze, (x, at + 1), like=like)
        else:
            x = emit(graph, torch.unflatten, (x, at, (-1, heads)), like=like)
        names = (*names[:at], "b", "h", *names[at + 1 :])
    for name in wanted:
        if name not in names:
            x, names = emit(graph, torch.unsqueeze, (x, 0), like=like), (name, *names)
    return emit_permuted(graph, x, [names.index(name) for name in wanted], like)


def arrange_mask(graph: Graph, mask: Any, names: Names, heads: int | None, like: Node) -> Any:
    """A mask of scores that have the dimensions `names`, as one of [i, j] or [b, h, i, j]."""
    own = names[len(names) - fake(mask).dim() :]
    return arrange(graph, mask, own, ("i", "j") if set(own) <= {"i", "j"} else ("b", "h", "i", "j"), heads, like)


@dataclass(frozen=True)
class Attention:
    """How an attention was read. out, dtype: the names of the result's dimensions, and its dtype; heads: how many `g` is split into; sinks:
    of H elements; path: the module's, if the pattern is in another module's forward."""

    q: Operand
    k: Operand
    v: Operand
    out: Names
    dtype: torch.dtype
    scale: float | None
    heads: int | None = None
    dropout_p: float = 0.0
    causal: bool = False
    enable_gqa: bool = False
    softcap: float = 0.0
    sinks: Node | None = None
    path: str = ""


def emit_attention(graph: Graph, site: Attention, mask: Any, like: Node, uniform_rows: bool = False) -> Node:
    """The attention node, and views around it that give the result of `like`. uniform_rows: see `UNIFORM_ROWS`."""
    qkv = []
    for operand, wanted in ((site.q, ("b", "h", "i", "d")), (site.k, ("b", "h", "j", "d")), (site.v, ("b", "h", "j", "e"))):
        x = arrange(graph, operand.node, operand.names, wanted, site.heads, like)
        qkv.append(emit_cast(graph, x, site.dtype, like))  # explicit, as autocast would do it
    attributes = {"causal": site.causal, "scale": site.scale, "dropout_p": site.dropout_p, "enable_gqa": site.enable_gqa}
    sinks: tuple[Node, ...] = ()
    if site.softcap:
        attributes["softcap"] = site.softcap
    if site.sinks is not None:
        sinks = (emit(graph, torch.flatten, (site.sinks,), like=like),)
    node = emit(graph, ops.attention, (*qkv, mask, *sinks), attributes, like=like)
    if said := _scores_of(site):
        node.meta[NOTES] = {"scores": said}
    if uniform_rows:
        node.meta[UNIFORM_ROWS] = True
    if site.path:
        node.meta[PATH] = site.path
    if site.out == ("b", "h", "i", "e"):
        return as_contiguous(graph, node, like)
    names: Names = ("b", "h", "i", "e")
    if "b" not in site.out:
        merging = 2 if "g" not in site.out else 1
        node = emit(graph, torch.flatten, (node, 0, merging), like=like)
        names = ("g", "i", "e") if merging == 1 else ("i", "e")
    return as_contiguous(graph, emit_permuted(graph, node, [names.index(name) for name in site.out], like), like)


def _scores_of(site: Attention) -> str:
    """What is done to scores, for a report."""
    said = [f"soft-capped at {site.softcap:g} (tanh)"] if site.softcap else []
    return ", ".join([*said, *(["with attention sinks"] if site.sinks is not None else [])])


def as_contiguous(graph: Graph, node: Node, like: Node) -> Node:
    """`node`, made contiguous if the graph returns the result of `like` and that was contiguous: the caller may rely on it."""
    output = graph.output_node()
    returned = {storage(n) for n in output.all_input_nodes}
    if storage(like) not in returned or not is_contiguous_or_false(fake(like)):
        return node
    return emit_contiguous(graph, node, like)


# --- Building the mask


@dataclass(frozen=True)
class Mask:
    """One masking of the scores. node: the mask; names: the dimensions of the scores; fill: what scores are set to where the
    mask is True (with keeps: where it is False), None where the mask is added to the scores, times factor."""

    node: Any
    names: Names
    factor: float = 1.0
    fill: float | None = None
    keeps: bool = False


def emit_mask(graph: Graph, masks: tuple[Mask, ...], site: Attention, like: Node) -> Node | None:
    """One mask that does what all of them do: bool where all of them set scores to -inf, else float."""
    result: Any = None
    for mask in masks:
        if mask.fill is None:
            result = _added(graph, result, _term(graph, mask, site, like), like)
        else:
            result = _filled(graph, result, _kept(graph, mask, site, like), mask.fill, site.dtype, like)
    return result


def _term(graph: Graph, mask: Mask, site: Attention, like: Node) -> Any:
    """A mask to add, in a dtype that attention takes: float32, or q's."""
    term = arrange_mask(graph, mask.node, mask.names, site.heads, like)
    if mask.factor != 1:
        term = emit(graph, torch.mul, (term, mask.factor), like=like)
    return term if fake(term).dtype in (torch.float32, site.dtype) else emit_cast(graph, term, torch.float32, like)


def _kept(graph: Graph, mask: Mask, site: Attention, like: Node) -> Any:
    """A bool mask, True where scores are not filled."""
    node, kept = mask.node, mask.keeps
    if not kept and is_call(node, torch.bitwise_not, torch.logical_not):
        node, kept = node.args[0], True
    node = arrange_mask(graph, node, mask.names, site.heads, like)
    return node if kept else emit(graph, torch.bitwise_not, (node,), like=like)


def _added(graph: Graph, before: Any, term: Any, like: Node) -> Any:
    if before is None:
        return term
    if fake(before).dtype == torch.bool:
        return emit(graph, torch.where, (before, term, -math.inf), like=like)
    return emit(graph, torch.add, (before, term), like=like)


def _filled(graph: Graph, before: Any, kept: Any, fill: float, dtype: torch.dtype, like: Node) -> Any:
    """A mask that also sets scores to `fill` where `kept` is False. -inf needs only a bool mask. A finite fill becomes the
    lowest number of the dtype, which absorbs any score added to it, so that a fully masked row stays uniform; float16 has
    no such number, so its mask is float32."""
    if fill == -math.inf:
        if before is None:
            return kept
        if fake(before).dtype == torch.bool:
            return emit(graph, torch.bitwise_and, (before, kept), like=like)
        return emit(graph, torch.where, (kept, before, fill), like=like)
    if before is None or fake(before).dtype == torch.bool:
        wide = torch.float32 if dtype == torch.float16 else dtype
        zero = emit(graph, torch.zeros, ((),), {"dtype": wide, "device": fake(like).device}, like=like)
        before = zero if before is None else emit(graph, torch.where, (before, zero, -math.inf), like=like)
    return emit(graph, torch.where, (kept, before, torch.finfo(fake(before).dtype).min), like=like)
