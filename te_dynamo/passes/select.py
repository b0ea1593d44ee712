"""Which of the raised sites are taken: what the user skips, the logits, what no provider can do, what would not pay."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch.fx import GraphModule, Node

from te_dynamo import ops
from te_dynamo.config import Options
from te_dynamo.ir.graph import is_call, tensor
from te_dynamo.lowering.cost import not_worth_it
from te_dynamo.passes.attention_site import UNIFORM_ROWS
from te_dynamo.passes.logits import find_logits
from te_dynamo.passes.rules import ORIGIN
from te_dynamo.sites import module_path

RECIPE = "te_recipe"
BLIND = "a row of its mask may see nothing, and is uniform: fused attention has other gradients for it"
UnsupportedLinear = Callable[[Node], "str | None"]


def origin_of(node: Node) -> str:
    """The name of the node that a semantic node stands for: its own where a rule wrote out more than one."""
    return node.meta.get(ORIGIN, node.name)


def site_path(node: Node) -> str:
    """The path of a semantic node's site: its weight's owner, else the module in whose forward it stands."""
    return node.meta.get("te_path") or module_path(node)


def skipped(path: str, patterns: tuple[str, ...]) -> str | None:
    """The first pattern that matches a site's path."""
    return next((p for p in patterns if fnmatchcase(path, p)), None)


def select(gm: GraphModule, options: Options, unsupported: UnsupportedLinear, grad_enabled: bool) -> dict[str, str]:
    """Which semantic nodes of the raised graph `gm` are not taken: the name of the node that each stands for, and why.

    The graph gains each site's recipe, in `meta["te_recipe"]`.
    """
    logits = set() if options.include_logits else find_logits(gm)
    excluded: dict[str, str] = {}
    for node in gm.graph.nodes:
        reason = None
        if is_call(node, ops.linear, ops.attention):
            node.meta[RECIPE] = options.recipe_of(site_path(node))
        if is_call(node, ops.linear):
            reason = _linear_reason(node, node in logits, options, unsupported, grad_enabled)
        elif is_call(node, ops.attention):
            reason = _skip_reason(node, options) or ("attention='off'" if options.attention == "off" else None)
        if reason is not None:
            excluded[origin_of(node)] = reason
    taken = {n for n in gm.graph.nodes if is_call(n, ops.linear) and origin_of(n) not in excluded}
    for node in gm.graph.nodes:
        if is_call(node, ops.norm) and not any(user in taken for user in node.users):
            excluded[origin_of(node)] = "no FP8 linear reads it"
    return excluded


def blind(gm: GraphModule, options: Options) -> dict[str, str]:
    """The attentions that a fused kernel would give wrong gradients, as `select` gives them; to be asked when masks are simplified."""
    return {origin_of(n): BLIND for n in gm.graph.nodes if UNIFORM_ROWS in n.meta and _has_mask(n) and not wants_fp8(n, options)}


def _has_mask(attention: Node) -> bool:
    return len(attention.args) > 3 and attention.args[3] is not None


def wants_fp8(attention: Node, options: Options) -> bool:
    """Whether an attention is to be computed in FP8, if it can be."""
    recipe = attention.meta[RECIPE]
    return recipe is not None and (options.attention == "fp8" or (options.attention == "auto" and recipe.fp8_attention))


def _skip_reason(node: Node, options: Options) -> str | None:
    pattern = skipped(site_path(node), options.skip)
    return None if pattern is None else f"skip pattern {pattern!r}"


def _linear_reason(node: Node, is_logits: bool, options: Options, unsupported: UnsupportedLinear, grad_enabled: bool) -> str | None:
    if is_logits:
        return "the logits stay in high precision (include_logits=False)"
    if node.meta[RECIPE] is None:
        return "its recipe is None: high precision"
    return _skip_reason(node, options) or unsupported(node) or not_worth_it(node, training=grad_enabled)


def linear_sizes(node: Node) -> tuple[int, int]:
    """(K, N) of a linear, as numbers: weights have static sizes."""
    weight = tensor(node.args[1])
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[1]), int(weight.shape[0])


def unmatched_absolute_patterns(patterns: tuple[str, ...], paths: list[str]) -> list[tuple[str, str]]:
    """The patterns that match no path, although their end does, each with that path: they were meant for another root."""
    found = []
    for pattern in patterns:
        if any(fnmatchcase(path, pattern) for path in paths):
            continue
        parts = pattern.split(".")
        ends = [".".join(parts[i:]) for i in range(1, len(parts))]
        path = next((p for p in paths for end in ends if end.strip("*.") and fnmatchcase(p, end)), None)
        if path is not None:
            found.append((pattern, path))
    return found
