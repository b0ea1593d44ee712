"""Undoing rewrites: a site that is not taken after all becomes what the user wrote again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from te_dynamo.ir import op_of
from te_dynamo.ir.graph import erase_if_dead
from te_dynamo.sites import Sites


@dataclass(frozen=True)
class Rewrite:
    """A pattern and what it became. output: the node that was replaced, called name; new: its replacement; added: all new nodes; quiet:
    whether restoring it records no declined site."""

    kind: str
    output: Node
    name: str
    new: Node
    added: Sequence[Node]
    quiet: bool = False


@dataclass(frozen=True)
class _Snapshot:
    """What a node was before it was erased."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    meta: dict[str, Any]


class Rewrites:
    """What was rewritten in one graph, so that some of it can be put back."""

    def __init__(self) -> None:
        self.log: list[Rewrite] = []
        self.by_output: dict[Node, Rewrite] = {}
        self.by_new: dict[Node, Rewrite] = {}
        self.snapshots: dict[Node, _Snapshot] = {}

    def record(self, rewrite: Rewrite, pattern: Sequence[Node]) -> None:
        """To be called before the pattern's nodes are erased."""
        self.log.append(rewrite)
        self.by_output[rewrite.output] = self.by_new[rewrite.new] = rewrite
        for n in (*pattern, rewrite.output):
            self.snapshots[n] = _Snapshot(n.op, n.target, n.args, dict(n.kwargs), n.name, dict(n.meta))

    def restore(self, graph: Graph, reasons: Mapping[str, str], sites: Sites) -> None:
        """Puts back the patterns whose outputs have the names in `reasons`, and records them as declined sites.

        reasons: why each is not taken. Raises AssertionError for a name that is no site's.
        """
        chosen = sorted((r for r in self.log if r.name in reasons and not r.new._erased), key=lambda r: r.new)
        if unknown := reasons.keys() - {r.name for r in chosen}:
            raise AssertionError(f"sites were declined that no rule had raised: {', '.join(sorted(unknown))}")
        gone = {r.new for r in chosen}
        made: dict[Node, Node] = {}

        def original(node: Node) -> Node:
            """`node` as it was: itself, a replacement that is still in place, or a copy."""
            if node in made:
                return made[node]
            if not node._erased and node not in gone:
                return node
            now = self.by_output.get(node)
            if now is not None and not now.new._erased and now.new not in gone:
                return now.new
            if node in self.by_new:
                return original(self.by_new[node].output)
            was = self.snapshots[node]
            args, kwargs = map_arg((was.args, was.kwargs), original)
            copy = graph.create_node(was.op, was.target, args, kwargs)
            copy.name, copy.meta = was.name, was.meta
            made[node] = copy
            return copy

        for rewrite in chosen:
            with graph.inserting_before(rewrite.new):
                copy = original(rewrite.output)
            rewrite.new.replace_all_uses_with(copy)
            if not rewrite.quiet:
                sites.declined(copy, rewrite.kind, reasons[rewrite.name])
        for rewrite in chosen:
            erase_if_dead(graph, [*rewrite.added, rewrite.new])
        # Sites inside what was put back, such as the linears of a multi-head attention.
        erase_if_dead(graph, [n for n in graph.nodes if op_of(n) is not None])
        for rewrite in chosen:
            erase_if_dead(graph, rewrite.added)
