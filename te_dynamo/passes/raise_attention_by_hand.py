"""Stage 2, attention written out by hand becomes `ops.attention`.

It is read backwards from its last product:

    out           = probabilities @ v
    probabilities = softmax(scores) over the keys, with casts and dropout
    scores        = q @ k.T | baddbmm | scores times a constant | c tanh(scores / c) | scores + mask | masked_fill | where
                    | cat(scores, sinks), the last column of whose probabilities is dropped

A product is any of `matmul`, `bmm`, `mm`, `einsum`, ...: read as a contraction, its labels give each dimension a name,
so that the order in which q, k and v are stored does not matter. q and k may be scaled, cast up or have batch and heads
in one dimension before their product; the heads of k and v may be repeated for groups of queries.

Rounding: scores and probabilities are no longer rounded to the dtype of the model, and a constant before the product is
applied after it.

Fully masked rows: where the mask sets scores to -inf, PyTorch's fused attention gives 0, and the softmax by hand gave NaN.
Where it sets them to a very negative number, the row's softmax is uniform. PyTorch's fused backward recomputes it from the
logarithm of the row's sum, which is lost next to 3e38, so its gradients are wrong: such a site stays as written (see
`select.masks_uniform_rows`) unless its mask is proved to leave a key in every row, or it is computed in FP8.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from te_dynamo.ir import masked
from te_dynamo.ir.graph import fake, is_call, is_method, operands, same_shape, tensor
from te_dynamo.passes.attention_site import (
    Attention,
    Mask,
    Names,
    Operand,
    broadcast,
    cast,
    emit_attention,
    emit_mask,
    look_through,
    merged,
    number,
    one_head,
    scaled,
    split,
    transposed,
)
from te_dynamo.passes.raise_linear import SPELLINGS, Contraction
from te_dynamo.passes.rules import Declined, Match, Rule
from te_dynamo.passes.weights import is_owned, weight_of

BATCH: dict[int, Names] = {0: (), 1: ("g",), 2: ("b", "h")}
STEPS = frozenset({"factor", "cast", "merge", "repeat"})
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
MAX_DEPTH = 12  # nodes from the softmax back to the product
# What fused attention cannot do between its product and its softmax (a product with a constant it can).
UNSUPPORTED = {
    torch.mul: "the scores are multiplied by a tensor",
    torch.div: "the scores are divided by a tensor",
}


@dataclass(frozen=True)
class Scores:
    """product: the node that multiplies q and k; names: its dimensions; softcap: c where scores become c tanh(scores / c); masks: what is
    applied after that, in order; heads: their number, if a reshape of the scores shows it; nodes: from the product to the scores."""

    product: Node
    names: Names
    scale: float
    softcap: float = 0.0
    masks: tuple[Mask, ...] = ()
    heads: int | None = None
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Probabilities:
    """What multiplies v. names: the dimensions of the softmax; nodes: from the softmax to the product with v; without_last: whether the
    last column of the softmax is dropped."""

    softmax: Node
    names: Names
    dropout_p: float
    heads: int | None
    nodes: tuple[Node, ...]
    without_last: bool = False


class ByHand(Rule):
    """softmax(q @ k.T * scale + mask) @ v, in whatever spelling."""

    kind = "attention"
    ends_at = frozenset(SPELLINGS)

    def match(self, node: Node) -> Match | Declined | None:
        for contraction, side in _orders(node):
            named = _name_last_product(contraction, side)
            if named is None:
                continue
            names, v, out = named
            probabilities = _probabilities(contraction.operands[side], names)
            if probabilities is not None:
                return _attention(node, probabilities, v, out) or _between_products(contraction.operands[side])
        return _between_products(node.args[0])

    def rewrite(self, graph: Graph, match: Match) -> Node:
        site, masks = match.values["site"], match.values["masks"]
        mask = emit_mask(graph, masks, site, match.output)
        fused = not site.softcap and site.sinks is None  # else its definition is the math as written
        uniform = fused and any(m.fill not in (None, -math.inf) for m in masks)
        return emit_attention(graph, site, mask, match.output, uniform_rows=uniform)


def _attention(node: Node, p: Probabilities, v: Operand, out: Names) -> Match | Declined | None:
    """The attention whose last product is `node`, of these probabilities and v."""
    sinks = _sinks(p) if p.without_last else Sinks(p.softmax.args[0])
    if sinks is None:
        return None
    scores = _scores(sinks.scores, p.names, 1.0)
    if scores is None or isinstance(scores, Declined):
        return scores
    operands = _name_first_product(scores)
    if operands is None:
        return None
    dtype = fake(node).dtype
    q, k, v = _looked_through(*operands, v, dtype)
    if _is_weight(k.node):
        return None  # a linear
    heads = {o.heads for o in (q, k, v, scores, p) if o.heads is not None}
    output = node
    if out == ("g", "i", "e") and heads and (four := _split_afterwards(node, heads)) is not None:
        output, out = four, ("b", "h", "i", "e")
    interior = (*scores.nodes, *sinks.nodes, p.softmax, *p.nodes)
    fault = (
        _shared({*interior, node}, output, {p.softmax, *p.nodes})
        or _softmax_fault(p)
        or _low_precision(interior, dtype)
        or _dtype_fault(scores.product, q, k, dtype)
        or next(filter(None, map(_mask_fault, scores.masks)), None)
        or ("batch and heads are split in different ways" if len(heads) > 1 else None)
        or broadcast(Operand(scores.product, scores.names), q, k, v)
    )
    if fault is not None:
        return Declined(fault)
    site = Attention(
        q,
        k,
        v,
        out=out,
        dtype=dtype,
        scale=scores.scale * q.factor * k.factor,
        heads=next(iter(heads), None),
        dropout_p=p.dropout_p,
        softcap=scores.softcap,
        sinks=sinks.value,
        enable_gqa=k.repeats > 1 or one_head(q, k, v),
    )
    nodes = [*q.nodes, *k.nodes, *v.nodes, *interior, node, output]
    return Match(output, nodes, {"site": site, "masks": scores.masks})


def _is_weight(node: Any) -> bool:
    ref = weight_of(node)
    return ref is not None and is_owned(ref.root)


def _split_afterwards(node: Node, heads: set[int]) -> Node | None:
    """The only user of `node`, if it splits batch and heads again."""
    user = next(iter(node.users), None)
    return user if user is not None and len(node.users) == 1 and split(user) and {fake(user).shape[1]} == heads else None


# --- Reading the two products


def _contraction(node: Any) -> Contraction | None:
    if is_call(node, torch.baddbmm):
        a, b = node.args[1:3]
        return Contraction((a, b), (("g", "m", "k"), ("g", "k", "n")), ("g", "m", "n"))
    return SPELLINGS[node.target](node) if is_call(node, *SPELLINGS) else None


def _orders(node: Node) -> Iterator[tuple[Contraction, int]]:
    """The product, and which of its operands may be the probabilities."""
    contraction = _contraction(node)
    if contraction is not None and all(tensor(o) is not None for o in (*contraction.operands, node)):
        yield contraction, 0
        yield contraction, 1


def _name_last_product(c: Contraction, side: int) -> tuple[Names, Operand, Names] | None:
    """The names of the probabilities, v, and the names of the result, if operand `side` is the probabilities."""
    left, right = c.labels[side], c.labels[1 - side]
    summed = [x for x in left if x in right and x not in c.out]
    own = [x for x in left if x not in right and x in c.out]
    value = [x for x in right if x not in left]
    if len(summed) != 1 or not own or len(value) != 1 or value[0] not in c.out:
        return None
    row = own[-1]  # any other dimension that v lacks is broadcast: the heads
    batch = [x for x in left if x not in (summed[0], row)]
    if len(batch) not in BATCH or any(x not in c.out for x in batch) or len(set(left)) != len(left):
        return None
    name = {summed[0]: "j", row: "i", value[0]: "e", **dict(zip(batch, BATCH[len(batch)], strict=True))}
    if any(x not in name for x in (*right, *c.out)):
        return None
    names, other, out = (tuple(name[x] for x in labels) for labels in (left, right, c.out))
    return names, Operand(c.operands[1 - side], other), out


def _name_first_product(scores: Scores) -> tuple[Operand, Operand] | None:
    """q and k of the product that makes the scores."""
    c = _contraction(scores.product)
    if c is None or len(c.out) != len(scores.names):
        return None
    name = dict(zip(c.out, scores.names, strict=True))
    summed = {x for x in c.labels[0] if x in c.labels[1] and x not in name}
    if len(summed) != 1:
        return None
    name[summed.pop()] = "d"
    read = []
    for node, labels in zip(c.operands, c.labels, strict=True):
        if any(x not in name for x in labels) or len(set(labels)) != len(labels):
            return None
        read.append(Operand(node, tuple(name[x] for x in labels)))
    q, k = read if "i" in read[0].names else reversed(read)
    if not ({"i", "d"} <= set(q.names) and {"j", "d"} <= set(k.names)) or "j" in q.names or "i" in k.names:
        return None
    return q, k


def _looked_through(q: Operand, k: Operand, v: Operand, dtype: torch.dtype) -> tuple[Operand, Operand, Operand]:
    """q, k and v before the steps that were looked through; repeated heads are found in both k and v, or in neither."""
    q = look_through(q, dtype, STEPS - {"repeat"})
    for steps in (STEPS, STEPS - {"repeat"}):
        made_k, made_v = look_through(k, dtype, steps), look_through(v, dtype, steps - {"factor", "cast"})
        if made_k.repeats == made_v.repeats:
            break
    return q, made_k, made_v


# --- Reading what is between them


def _probabilities(node: Any, names: Names) -> Probabilities | None:
    dropout_p, heads = 0.0, None
    nodes: list[Node] = []
    without_last = False
    while tensor(node) is not None:
        if is_call(node, torch.softmax):
            return Probabilities(node, names, dropout_p, heads, tuple(nodes), without_last)
        nodes.append(node)
        if is_call(node, operator.getitem) and not without_last and names[-1:] == ("j",) and _all_but_last(node.args[1]):
            without_last, node = True, node.args[0]
            continue
        if is_call(node, F.dropout) and not dropout_p and isinstance(node.args[1], (int, float)) and not node.args[3]:
            dropout_p = float(node.args[1])
        elif (moved := _moved(node, names)) is not None:
            names, heads = moved[0], moved[1] or heads
        else:
            return None
        node = node.args[0]
    return None


def _all_but_last(index: Any) -> bool:
    """Whether an index takes all of a tensor but the last entry of its last dimension."""
    whole, (*_, last) = slice(None), index if isinstance(index, tuple) else (index,)
    return (
        isinstance(index, tuple)
        and last in (slice(None, -1), slice(0, -1), slice(None, -1, 1))
        and all(i in (..., whole) for i in index[:-1])
    )


@dataclass(frozen=True)
class Sinks:
    """scores: the input of the softmax, without its extra column; value: that column, one element for each head: a node of H elements, None
    if there is none; nodes: from the scores to the softmax."""

    scores: Any
    value: Node | None = None
    nodes: tuple[Node, ...] = ()


def _sinks(p: Probabilities) -> Sinks | None:
    """The sinks next to the scores; a row maximum that was subtracted from both is looked through."""
    node: Any = p.softmax.args[0]
    nodes: list[Node] = []
    if is_call(node, torch.sub) and len(node.args) == 2 and (largest := _largest_of(*node.args)):
        nodes, node = [node, *largest], node.args[0]
    if not is_call(node, torch.cat) or len(node.args[0]) != 2 or p.names != ("b", "h", "i", "j"):
        return None
    dim: Any = (*node.args, node.kwargs.get("dim", 0))[1]
    (scores, value), spread = node.args[0], []
    while is_method(value, "expand", "to", "contiguous") or is_call(value, torch.broadcast_to):
        spread.append(value)
        value = value.args[0]
    if dim % 4 != 3 or tensor(value) is None or not same_shape(fake(value).shape, (1, fake(scores).shape[1], 1, 1)):
        return None
    return Sinks(scores, value, (*nodes, node, *spread))


def _largest_of(x: Any, largest: Any) -> tuple[Node, ...]:
    """The nodes that compute the maximum over the last dimension of `x`, if `largest` is that; else none."""
    nodes = (largest, largest.args[0]) if is_call(largest, operator.getitem) and largest.args[1] == 0 else (largest,)
    made = nodes[-1]
    if not (is_call(made, torch.max, torch.amax) or is_method(made, "max", "amax")) or made.args[0] is not x:
        return ()
    dim: Any = (*made.args, made.kwargs.get("dim"))[1]
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    last = fake(x).dim() - 1
    kept = isinstance(dim, int) and dim % (last + 1) == last and same_shape(fake(largest).shape, (*fake(x).shape[:-1], 1))
    return nodes if kept else ()


def _moved(node: Node, names: Names) -> tuple[Names, int | None] | None:
    """The names of the dimensions before a cast or view of scores, and the number of heads if it shows that."""
    if cast(node) is not None or is_method(node, "contiguous"):
        return names, None
    if names == ("g", "i", "j") and merged(node):
        return ("b", "h", "i", "j"), fake(node.args[0]).shape[1]
    if names == ("b", "h", "i", "j") and split(node):
        return ("g", "i", "j"), fake(node).shape[1]
    if is_call(node, torch.reshape) and same_shape(fake(node).shape, fake(node.args[0]).shape):
        return names, None
    swapped = transposed(node, names)
    return None if swapped is None else (swapped, None)


def _scores(node: Any, names: Names, factor: float, depth: int = 0) -> Scores | Declined | None:
    """`node`, times `factor`, as scores with the dimensions `names`."""
    if tensor(node) is None or depth > MAX_DEPTH:
        return None
    if is_call(node, torch.baddbmm):
        return _baddbmm(node, names, factor)
    if is_call(node, *SPELLINGS):
        return Scores(node, names, factor, nodes=(node,))

    def before(x: Any, names: Names = names, factor: float = factor) -> Scores | Declined | None:
        return _scores(x, names, factor, depth + 1)

    if is_call(node, torch.add, torch.sub) and _is_shift(node.args[1]):
        return _and_node(before(node.args[0]), node)
    if (found := scaled(node)) is not None:
        return _and_node(before(found[0], factor=factor * found[1]), node)
    if is_call(node, torch.tanh):
        return _capped(before(node.args[0], factor=1.0), node, factor)
    if (moved := _moved(node, names)) is not None:
        return _and_node(before(node.args[0], names=moved[0]), node, **({"heads": moved[1]} if moved[1] else {}))
    if is_call(node, *UNSUPPORTED):
        constant = is_call(node, torch.mul, torch.div) and tensor(node.args[1]) is None
        reason = "the scale of the scores is computed in the graph" if constant else UNSUPPORTED[node.target]
        return Declined(reason) if any(map(before, node.args)) else None
    declined = None
    for x, mask in _maskings(node, names, factor):
        scores = before(x)
        if isinstance(scores, Scores):
            if not same_shape(fake(x).shape, fake(node).shape):
                return Declined("a mask makes the scores larger")
            return _and_node(scores, node, masks=(*scores.masks, mask))
        declined = declined or scores
    return declined


def _capped(scores: Scores | Declined | None, node: Node, factor: float) -> Scores | Declined | None:
    """factor * tanh(scores), `node` being the tanh."""
    if not isinstance(scores, Scores):
        return scores
    if scores.masks or scores.softcap or factor <= 0:
        return Declined("the scores are soft-capped (tanh) more than once, by a negative number, or after they were masked")
    return replace(scores, softcap=factor, scale=scores.scale * factor, nodes=(*scores.nodes, node))


def _is_shift(value: Any) -> bool:
    """Whether `value` is a number, which the softmax cancels when it is added to all scores."""
    return isinstance(value, (int, float)) and abs(value) < 1e3


def _baddbmm(node: Node, names: Names, factor: float) -> Scores | Declined:
    beta, alpha = (number(node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
    if alpha is None or beta is None:
        return Declined("the scale of baddbmm is computed in the graph")
    masks = (Mask(node.args[0], names, factor * beta),) if beta else ()  # beta 0: what is added is not even read
    return Scores(node, names, factor * alpha, masks=masks, nodes=(node,))


def _and_node(scores: Scores | Declined | None, node: Node, **changes: Any) -> Scores | Declined | None:
    return replace(scores, nodes=(*scores.nodes, node), **changes) if isinstance(scores, Scores) else scores


def _maskings(node: Node, names: Names, factor: float) -> Iterator[tuple[Any, Mask]]:
    """What `node` may mask, and the mask."""
    args: Any = node.args
    if pairs := operands(node, torch.add) or operands(node, torch.sub)[:1]:
        for x, mask in pairs:
            yield x, Mask(mask, names, factor if node.target is torch.add else -factor)
    elif is_call(node, torch.masked_fill) and len(args) == 3:
        yield args[0], Mask(args[1], names, fill=_times(args[2], factor))
    elif is_call(node, torch.where) and len(args) == 3:
        yield args[1], Mask(args[0], names, fill=_times(args[2], factor), keeps=True)
        yield args[2], Mask(args[0], names, fill=_times(args[1], factor))


def _times(value: Any, factor: float) -> float:
    constant = number(value)
    return math.nan if constant is None else constant * factor


def _between_products(node: Any) -> Declined | None:
    """Why `node` was not read as probabilities although it is made of a softmax of a product: what is between them."""
    between: list[str] = []
    softmax = False
    for _ in range(2 * MAX_DEPTH):
        if not isinstance(node, Node) or tensor(node) is None or not node.args:
            return None
        if softmax and (product := _contraction(node)) is not None:
            if any(map(_is_weight, product.operands)):
                return None
            return Declined(f"fused attention cannot do what is between its products ({', '.join(reversed(between))})")
        softmax = softmax or is_call(node, torch.softmax)
        between.append(str(getattr(node.target, "__name__", node.target)))
        node = node.args[0][0] if isinstance(node.args[0], (list, tuple)) and node.args[0] else node.args[0]
    return None


# --- What forbids it


def _shared(interior: set[Node], output: Node, late: set[Node]) -> str | None:
    for node in interior - {output}:
        for user in node.users:
            if user not in interior and user is not output:
                what = "probabilities" if node in late else "scores"
                where = "returned" if user.op == "output" else f"used elsewhere too, by {user.name}"
                return f"the attention {what} are {where}: fused attention does not have them"
    return None


def _softmax_fault(p: Probabilities) -> str | None:
    dim: Any = p.softmax.args[1]
    return None if dim % len(p.names) == p.names.index("j") else f"the softmax is over dimension {dim}, not over the keys"


def _low_precision(interior: tuple[Node, ...], dtype: torch.dtype) -> str | None:
    for node in interior:
        if tensor(node) is not None and torch.promote_types(fake(node).dtype, dtype) != fake(node).dtype:
            what = "softmax is" if is_call(node, torch.softmax) else "scores are"
            return f"the {what} computed in {_spelled(fake(node).dtype)}, and the result is {_spelled(dtype)}"
    return None


def _dtype_fault(product: Node, q: Operand, k: Operand, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"the dtype {_spelled(dtype)} has no fused attention"
    # The last product has v's dtype, and the first has q's and k's, unless autocast gives them its own.
    made = [fake(x.node).dtype for x in (q, k)]
    if made == [dtype, dtype] or fake(product).dtype == dtype:
        return None
    return f"q and k are multiplied in another dtype ({', '.join(map(_spelled, made))}) than that of the result ({_spelled(dtype)})"


def _mask_fault(mask: Mask) -> str | None:
    value = tensor(mask.node)
    if value is None or value.dim() == 0:
        return "a number is added to the scores"
    if value.dim() > len(mask.names):
        return "the mask has more dimensions than the scores"
    if mask.fill is None:
        return None if value.is_floating_point() else f"a tensor of dtype {_spelled(value.dtype)} is added to the scores"
    if value.dtype != torch.bool:
        return f"the scores are filled where a tensor of dtype {_spelled(value.dtype)} says so"
    return None if mask.fill <= masked.FILL else f"scores are set to {mask.fill}, which does not mask them"


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
