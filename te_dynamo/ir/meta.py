"""What passes note on a node, in `node.meta`, each under the key of the pass that writes it."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from te_dynamo.sites import module_path

ORIGIN = "te_origin"  # raise: the name of the node, in Dynamo's graph, that a semantic op stands for
PATH = "te_path"  # raise: the path of the module that owns its weight
PARAMETER = "te_parameter"  # raise: whether a sub-graph's placeholder is a parameter
UNIFORM_ROWS = "te_uniform_rows"  # raise: its mask sets scores to a finite number: a row masked altogether is uniform, not 0
MASK = "te_mask"  # raise: what an attention's mask was proved to be
RECIPE = "te_recipe"  # select: the recipe that the options give a site
LAYOUT = "te_layout"  # fuse: the memory layout that is wanted for an attention
QKV_LAYOUT = "te_qkv_layout"  # fuse: the layout in which its q, k and v lie, where that has a name
IN_MEMORY = "te_in_memory"  # fuse: the same for a person to read, with or without a name
NOTES = "te_notes"  # fuse: what else a report is to say of the site
MEMBERS = "te_members"  # fuse: what was noted on each node that became a part of this one
PRODUCER = "te_producer"  # fuse: the name of the node that makes its operand and could be computed with it
READER = "te_reader"  # fuse: of linears, which operation alone reads what they give (see `passes.readers`)
PLAN, SITE = "te_plan", "te_site"  # plan
SLOTS = "te_slots"  # attach: where its scales stand


def origin_of(node: Node) -> str:
    """The name of the node that a semantic node stands for: its own where a rule wrote out more than one."""
    return node.meta.get(ORIGIN, node.name)


def site_path(node: Node) -> str:
    """The path of a semantic node's site: its weight's owner, else the module in whose forward it stands."""
    return node.meta.get(PATH) or module_path(node)


def members_of(node: Node) -> list[dict[str, Any]]:
    """What was noted on each node that became a part of this one: itself where it is no group."""
    return node.meta.get(MEMBERS) or [node.meta]
