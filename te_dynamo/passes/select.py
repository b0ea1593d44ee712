"""Which of the raised sites are taken; left are those that the user skips, the logits, and what no provider can do or would not pay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch.fx import GraphModule, Node

from te_dynamo import ops
from te_dynamo.config import Options
from te_dynamo.ir import op_of, site_of
from te_dynamo.ir.graph import is_call
from te_dynamo.ir.meta import RECIPE, UNIFORM_ROWS, origin_of, site_path
from te_dynamo.passes.heads import read_norms
from te_dynamo.passes.logits import find_logits
from te_dynamo.passes.regions import regions
from te_dynamo.passes.routers import find_routers

UNIFORM = (
    "a row of its mask may see nothing, and the mask is a finite number there: eager attention makes such a row uniform, and fused "
    "attention has no gradient for that. Remedy: mask with -inf"
)
LOGITS = "the logits stay in high precision (include_logits=False)"
ROUTER = "it chooses the experts: routers stay in high precision (include_routers=False)"
UNREAD = "no FP8 linear or attention reads it"
SKIPPED = "skip pattern "
Unsupported = Callable[[Node, bool, bool], "str | None"]


def skipped(path: str, patterns: tuple[str, ...]) -> str | None:
    """The first pattern that matches a site's path."""
    return next((p for p in patterns if fnmatchcase(path, p)), None)


def select(gm: GraphModule, options: Options, unsupported: Unsupported, grad_enabled: bool) -> dict[str, str]:
    """Which semantic nodes of the raised graph `gm` are not taken: the name of the node that each stands for, and why.

    The graph gains each site's recipe, in `meta[RECIPE]`. unsupported: why no implementation takes a site, in training or not, as a clause;
    its last argument is whether a site that is taken reads the same input, so that it is quantized anyway: k and v may pay where q does.
    """
    where = regions(gm.graph, grad_enabled)
    kept = {} if options.include_routers else dict.fromkeys(find_routers(gm), ROUTER)
    kept |= {} if options.include_logits else dict.fromkeys(find_logits(gm), LOGITS)
    sites = [node for node in gm.graph.nodes if site_of(node) is not None]
    for node in sites:
        node.meta[RECIPE] = options.recipe_of(site_path(node))

    def reason(node: Node, shares_input: bool) -> str | None:
        return _reason(node, kept.get(node), options, partial(unsupported, node, where[node][1], shares_input))

    reasons = {node: reason(node, False) for node in sites}
    quantized = {_operand(node, where) for node in sites if reasons[node] is None} - {None}
    reasons |= {node: reason(node, True) for node in sites if reasons[node] is not None and _operand(node, where) in quantized}
    taken = {node for node, reason in reasons.items() if reason is None}
    excluded = {origin_of(node): why for node, why in reasons.items() if why is not None}
    of_heads = set(read_norms(gm.graph))
    for node in gm.graph.nodes:
        op = op_of(node)
        if op is None or op.is_site or node in of_heads or any(user in taken and op_of(user).gemms(user) for user in node.users):
            continue
        excluded[origin_of(node)] = UNREAD
    return excluded


def masks_uniform_rows(gm: GraphModule, options: Options) -> dict[str, str]:
    """The attentions for which a fused kernel would give wrong gradients, in the form of `select`'s result; to be called after masks are
    simplified."""
    return {origin_of(n): UNIFORM for n in gm.graph.nodes if UNIFORM_ROWS in n.meta and _has_mask(n) and not wants_fp8(n, options)}


def _has_mask(node: Node) -> bool:
    op = op_of(node)
    return op is not None and op.inputs(node).get("mask") is not None


def wants_fp8(node: Node, options: Options) -> bool:
    """Whether a site should be computed in FP8, if it can be. A site without weights has an option named after its kind."""
    recipe, op = node.meta[RECIPE], site_of(node)
    if recipe is None or op is None or op.gemms(node):
        return recipe is not None
    chosen = getattr(options, op.kind, "fp8")
    return chosen in ("fp8", "fp8_both") or (chosen == "auto" and recipe.fp8_attention)


def _operand(node: Node, where: Mapping[Node, tuple[int, bool]]) -> tuple[Any, ...] | None:
    """What is equal for linears that `fuse` makes one group of, whose input has one scale and is quantized once; None for other sites."""
    return (node.args[0], node.kwargs["out_dtype"], node.meta[RECIPE], where[node]) if is_call(node, ops.linear) else None


def _reason(node: Node, kept: str | None, options: Options, unsupported: Callable[[], str | None]) -> str | None:
    op = site_of(node)
    assert op is not None
    pattern = skipped(site_path(node), options.skip)
    skips = None if pattern is None else f"{SKIPPED}{pattern!r}"
    gemms = op.gemms(node)
    if not gemms:
        return skips or (f"{op.kind}='off'" if getattr(options, op.kind, "") == "off" else None)
    if kept is not None:
        return kept
    if node.meta[RECIPE] is None:
        return "its recipe is None: high precision"
    return skips or unsupported()


def against_wishes(reason: str | None) -> bool:
    """Whether a site that was left for this reason was wanted in FP8: a norm by itself never is, nor is what a pattern skips."""
    return reason != UNREAD and not (reason or "").startswith(SKIPPED)


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
