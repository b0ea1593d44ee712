"""The keys under which passes keep notes in `node.meta`, each with the pass that writes it."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from te_dynamo.sites import module_path

ORIGIN = "te_origin"  # raise: the name of the node in Dynamo's graph that a semantic op stands for
PATH = "te_path"  # raise: the path of the module that owns its weight
PARAMETER = "te_parameter"  # raise: whether a sub-graph's placeholder is a parameter
UNIFORM_ROWS = "te_uniform_rows"  # raise: its mask sets scores to a finite number: a fully masked row is uniform, not 0
MASK = "te_mask"  # raise: what an attention's mask was proved to be
RECIPE = "te_recipe"  # select: the recipe that the options give a site
LAYOUT = "te_layout"  # fuse: the memory layout wanted for an attention
SAME_TOKENS = "te_same_tokens"  # fuse: whether its row i and key i are proved to be made from the same token
QKV_LAYOUT = "te_qkv_layout"  # fuse: the layout of its q, k and v in memory, if that has a name
IN_MEMORY = "te_in_memory"  # fuse: that layout as readable text, with or without a name
NOTES = "te_notes"  # fuse: further notes on the site for the report
MEMBERS = "te_members"  # fuse: the notes on each node that was merged into this one
PRODUCER = "te_producer"  # fuse: the name of the node that computes its operand, if the two could be computed together
READER = "te_reader"  # fuse: the only operation that reads the output of these linears (see `passes.readers`)
PLAN, SITE = "te_plan", "te_site"  # plan
SLOTS = "te_slots"  # attach: the positions of its scales


def origin_of(node: Node) -> str:
    """The name of the node that a semantic node stands for: its own name if a rule emitted several nodes."""
    return node.meta.get(ORIGIN, node.name)


def site_path(node: Node) -> str:
    """The path of a semantic node's site: its weight's owner, else the module whose forward contains it."""
    return node.meta.get(PATH) or module_path(node)


def members_of(node: Node) -> list[dict[str, Any]]:
    """The notes on each node that was merged into this one; its own `meta` if it is not a group."""
    return node.meta.get(MEMBERS) or [node.meta]
