"""Stage 2, `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`: opaque calls in Dynamo's graph, written out as linears,
which the rules for linears then find, and `ops.attention`.

A row that may attend to no key gives 0, as in PyTorch's own fused path; its path that also returns the weights
(need_weights=True) and its encoder layer in inference give NaN there.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from te_dynamo.ir.graph import EXAMPLE, emit, fake, fake_mode_of, is_call, is_method, tensor
from te_dynamo.passes.attention_site import Attention, Mask, Names, Operand, as_contiguous, emit_attention, emit_mask
from te_dynamo.passes.rules import Declined, Match, Rule
from te_dynamo.sites import module_path

SIGNATURE = inspect.signature(F.multi_head_attention_forward)
ENCODER_LAYER = (
    "x",
    "embed_dim",
    "num_heads",
    "in_weight",
    "in_bias",
    "out_weight",
    "out_bias",
    "use_gelu",
    "norm_first",
    "eps",
    "norm1_weight",
    "norm1_bias",
    "norm2_weight",
    "norm2_bias",
    "linear1_weight",
    "linear1_bias",
    "linear2_weight",
    "linear2_bias",
    "mask",
    "mask_type",
)
# The dimensions of the encoder layer's mask, by its mask_type.
ENCODER_MASKS: tuple[Names, ...] = (("i", "j"), ("b", "j"), ("b", "h", "i", "j"))


@dataclass(frozen=True)
class Projections:
    """The parameters of a multi-head attention. packed: q's, k's and v's weights, one after another; or separate."""

    packed: Any
    separate: tuple[Any, Any, Any]
    bias: Any
    out_weight: Any
    out_bias: Any
    heads: int


class MultiheadAttention(Rule):
    """`F.multi_head_attention_forward`, where its attention weights are not used."""

    kind = "attention"
    ends_at = frozenset({F.multi_head_attention_forward})

    def match(self, node: Node) -> Match | Declined | None:
        bound = SIGNATURE.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        a: dict[str, Any] = bound.arguments
        results = [user for user in node.users if is_call(user, operator.getitem)]
        outputs = [user for user in results if user.args[1] == 0]
        if len(results) != len(node.users) or len(outputs) != 1:
            return Declined("the results of the multi-head attention are not taken as `output, weights = ...`")
        if any(user.users for user in results if user.args[1] == 1):
            return Declined("the attention weights are used (need_weights=True): fused attention does not have them")
        fault = _fault(a)
        if fault is not None:
            return Declined(fault)
        # Batch-first modules transpose their inputs and their output: both transposes are dropped.
        output = outputs[0]
        inputs = tuple(_swapped(a[name]) for name in ("query", "key", "value"))
        batch_first = all(x is not None for x in inputs)
        if batch_first and (user := _only_user(output)) is not None and _swapped(user) is output:
            outputs.append(user)
        values = {"arguments": a, "inputs": inputs if batch_first else None}
        return Match(outputs[-1], [node, *results, *outputs[1:]], values)

    def rewrite(self, graph: Graph, match: Match) -> Node:
        a, like = match.values["arguments"], match.output
        batched = fake(a["query"]).dim() == 3
        batch_first = match.values["inputs"] is not None
        inputs = match.values["inputs"] or (a["query"], a["key"], a["value"])
        if not batched:
            unbatched = {x: emit(graph, torch.unsqueeze, (x, 1), like=like) for x in dict.fromkeys(inputs)}
            inputs = tuple(unbatched[x] for x in inputs)
        projections = Projections(
            packed=None if a["use_separate_proj_weight"] else a["in_proj_weight"],
            separate=(a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]),
            bias=a["in_proj_bias"],
            out_weight=a["out_proj_weight"],
            out_bias=a["out_proj_bias"],
            heads=a["num_heads"],
        )
        masks, causal = _masks(a, batched)
        dropout_p = float(a["dropout_p"]) if a["training"] else 0.0
        tokens: Names = ("b", "i") if batch_first else ("i", "b")
        out = _emit_multi_head(graph, like, inputs, tokens, projections, masks, causal=causal, dropout_p=dropout_p)
        if not batched:
            out = emit(graph, torch.squeeze, (out, 1), like=like)
        elif batch_first and _swapped(like) is None:
            out = emit(graph, torch.transpose, (out, 0, 1), like=like)
        return as_contiguous(graph, out, like)


def _fault(a: dict[str, Any]) -> str | None:
    if a["bias_k"] is not None or a["bias_v"] is not None:
        return "a learned key and value are added (add_bias_kv)"
    if a["add_zero_attn"]:
        return "a zero key and value are added (add_zero_attn)"
    if a["static_k"] is not None or a["static_v"] is not None:
        return "keys or values are given (static_k, static_v)"
    if any(getattr(fake(a[name]), "is_nested", False) for name in ("query", "key", "value")):
        return "nested tensors"
    return None


def _masks(a: dict[str, Any], batched: bool) -> tuple[tuple[Mask, ...], bool]:
    """What masks the scores, and whether they are causal, as `F.multi_head_attention_forward` decides it."""
    mask, padding = a["attn_mask"], a["key_padding_mask"]
    causal = a["is_causal"] and padding is None and not a["need_weights"]  # then the mask is not looked at
    masks = []
    if mask is not None and not causal:
        masks.append(_mask(mask, ("g", "i", "j") if fake(mask).dim() == 3 else ("i", "j")))
    if padding is not None:
        masks.append(_mask(padding, ("b", "j") if batched else ("j",)))
    return tuple(masks), bool(causal)


def _mask(node: Any, names: Names) -> Mask:
    """A mask of `nn.MultiheadAttention`: bool (True is masked), even if the module has made it float, or one that is added."""
    excluded = _excluded(node)
    return Mask(node, names) if excluded is None else Mask(excluded, names, fill=-math.inf)


def _excluded(node: Any) -> Any:
    """A bool mask: `node` itself, or the one behind `zeros_like(mask).masked_fill(mask, -inf)`."""
    if fake(node).dtype == torch.bool:
        return node
    if not (is_call(node, torch.masked_fill) or is_method(node, "masked_fill_")) or node.args[2] != -math.inf:
        return None
    zeros, mask = node.args[:2]
    same = is_call(zeros, torch.zeros_like) and zeros.args[0] is mask and fake(mask).dtype == torch.bool
    return mask if same else None


def _swapped(node: Any) -> Any:
    """The argument of `node`, if that swaps the first two of three dimensions; else None."""
    is_swap = is_call(node, torch.transpose) and fake(node).dim() == 3 and {int(d) % 3 for d in node.args[1:3]} == {0, 1}
    return node.args[0] if is_swap else None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


class EncoderLayer(Rule):
    """`nn.TransformerEncoderLayer` in inference, one call: its norms, linears, attention and activation."""

    kind = "attention"
    ends_at = frozenset({torch._transformer_encoder_layer_fwd})

    def match(self, node: Node) -> Match | Declined | None:
        a = dict.fromkeys(ENCODER_LAYER) | dict(zip(ENCODER_LAYER, node.args, strict=False))
        if node.kwargs:
            return Declined(f"unknown arguments of the encoder layer: {', '.join(node.kwargs)}")
        if getattr(fake(a["x"]), "is_nested", False) or fake(a["x"]).dim() != 3:
            return Declined("a nested or unbatched input")
        if a["mask"] is not None and a["mask_type"] not in range(len(ENCODER_MASKS)):
            return Declined("a mask without its type")
        return Match(node, [node], a)

    def rewrite(self, graph: Graph, match: Match) -> Node:
        a, like = match.values, match.output
        dtype = fake(like).dtype
        names = (a["embed_dim"],)

        def norm(x: Any, which: str) -> Node:
            return emit(graph, F.layer_norm, (x, names, a[f"{which}_weight"], a[f"{which}_bias"], a["eps"]), like=like)

        def attend(x: Any) -> Node:
            weights = Projections(a["in_weight"], (None,) * 3, a["in_bias"], a["out_weight"], a["out_bias"], a["num_heads"])
            path = f"{module_path(like)}.self_attn".lstrip(".")
            return _emit_multi_head(graph, like, (x, x, x), ("b", "i"), weights, _encoder_masks(graph, a, like), path=path)

        def feed_forward(x: Any) -> Node:
            inner = _emit_linear(graph, like, x, a["linear1_weight"], a["linear1_bias"], dtype)
            activation: Callable[..., Any] = torch._C._nn.gelu if a["use_gelu"] else F.relu
            return _emit_linear(graph, like, emit(graph, activation, (inner,), like=like), a["linear2_weight"], a["linear2_bias"], dtype)

        x = a["x"]
        for part, which in ((attend, "norm1"), (feed_forward, "norm2")):
            if a["norm_first"]:
                x = emit(graph, torch.add, (x, part(norm(x, which))), like=like)
            else:
                x = norm(emit(graph, torch.add, (x, part(x)), like=like), which)
        return x


def _encoder_masks(graph: Graph, a: dict[str, Any], like: Node) -> tuple[Mask, ...]:
    """The mask of the native call, which masks whatever is not 0."""
    node = a["mask"]
    if node is None:
        return ()
    names = ENCODER_MASKS[a["mask_type"]]
    if (excluded := _excluded(node)) is not None:
        return (Mask(excluded, names, fill=-math.inf),)
    return (Mask(emit(graph, torch.eq, (node, 0), like=like), names, fill=-math.inf, keeps=True),)


def _emit_multi_head(
    graph: Graph,
    like: Node,
    inputs: tuple[Any, Any, Any],
    tokens: Names,
    p: Projections,
    masks: tuple[Mask, ...],
    *,
    causal: bool = False,
    dropout_p: float = 0.0,
    path: str = "",
) -> Node:
    """An attention, and the linears around it. inputs: of three dimensions, the first two of which are `tokens`, in q's names."""
    dtype = fake(like).dtype if tensor(like) is not None else fake(inputs[0]).dtype
    q, k, v = _emit_projections(graph, like, inputs, p, dtype)
    keys = tuple("j" if name == "i" else name for name in tokens)
    site = Attention(
        Operand(q, (*tokens, "h", "d")),
        Operand(k, (*keys, "h", "d")),
        Operand(v, (*keys, "h", "e")),
        out=(*tokens, "h", "e"),
        dtype=dtype,
        scale=None,
        heads=p.heads,
        dropout_p=dropout_p,
        causal=causal,
        path=path,
    )
    attended = emit_attention(graph, site, emit_mask(graph, masks, site, like), like)
    return _emit_linear(graph, like, emit(graph, torch.flatten, (attended, 2), like=like), p.out_weight, p.out_bias, dtype)


def _emit_projections(graph: Graph, like: Node, inputs: tuple[Any, Any, Any], p: Projections, dtype: torch.dtype) -> list[Node]:
    """q, k and v as [tokens, tokens, heads, head size]: one linear for packed projections that share an input."""
    embed = fake(inputs[0]).shape[-1]
    if p.packed is None:
        runs = [(x, weight, i, 1) for i, (x, weight) in enumerate(zip(inputs, p.separate, strict=True))]
    else:
        starts = [i for i in range(3) if i == 0 or inputs[i] is not inputs[i - 1]]
        ends = [*starts[1:], 3]
        runs = [(inputs[i], _rows(graph, like, p.packed, i, end - i, embed), i, end - i) for i, end in zip(starts, ends, strict=True)]
    made: list[Node] = []
    for x, weight, first, count in runs:
        bias = None if p.bias is None else _rows(graph, like, p.bias, first, count, embed)
        projected = _emit_linear(graph, like, x, weight, bias, dtype)
        if count == 1:
            made.append(emit(graph, torch.unflatten, (projected, -1, (p.heads, embed // p.heads)), like=like))
            continue
        parts = emit(graph, torch.unflatten, (projected, -1, (count, p.heads, embed // p.heads)), like=like)
        made += [emit(graph, torch.select, (parts, 2, i), like=like) for i in range(count)]
    return made


def _rows(graph: Graph, like: Node, packed: Any, first: int, count: int, embed: int) -> Any:
    """The parameters of `count` projections out of packed ones, from `first` on."""
    return packed if count == 3 else emit(graph, torch.narrow, (packed, 0, first * embed, count * embed), like=like)


def _emit_linear(graph: Graph, like: Node, x: Any, weight: Any, bias: Any, dtype: torch.dtype) -> Node:
    """A linear with a result of `dtype`, as under autocast, which `emit` turns off."""
    node = emit(graph, torch._C._nn.linear, (x, weight, bias), like=like)
    with fake_mode_of(graph):
        node.meta[EXAMPLE] = fake(node).to(dtype)
    return node
