"""How a rewrite rule is declared, and the engine that applies a family of them.

A rule names the operations at which its pattern ends, matches backwards from there, and builds the replacement. It
gives None where the pattern is not there, `Declined` with a reason where it may not be rewritten, and else a `Match`.
A rule that raises is undone and reported; with the option `strict` the exception is raised to the user.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.fx import Graph, GraphModule, Node

from te_dynamo.ir import op_of
from te_dynamo.ir.graph import EXAMPLE, erase_if_dead
from te_dynamo.ir.meta import ORIGIN
from te_dynamo.passes.canonicalize import LINEAR, SDPA
from te_dynamo.passes.effects import written_between
from te_dynamo.passes.regions import transformed
from te_dynamo.passes.undo import Rewrite, Rewrites
from te_dynamo.sites import Sites

log = logging.getLogger(__name__)

TRANSFORMED = (
    "it is inside a transform of torch.func (vmap, grad, jvp, ...), whose derivatives FP8 has none of. Remedy: compile the model "
    "itself, and call it where nothing is transformed"
)


@dataclass(frozen=True)
class Declined:
    """A pattern was found that may not be rewritten, and why."""

    reason: str


@dataclass(frozen=True)
class Match:
    """output: the node whose value the replacement gives; nodes: every pure node of the pattern, the output among them;
    values: what the rule needs to build the replacement."""

    output: Node
    nodes: Sequence[Node]
    values: dict[str, Any] = field(default_factory=dict)


class Rule(ABC):
    """One pattern and what it becomes.

    kind: the kind of site it makes ("linear", "norm", "attention"), for reports; ends_at: the functions at which the
    pattern ends (its last node is a `call_function` of one of them). quiet: what is not taken is not worth a line in a report.
    """

    kind: ClassVar[str]
    quiet: ClassVar[bool] = False
    ends_at: ClassVar[frozenset[Callable[..., Any]]]

    def may_end_at(self, target: Any) -> bool:
        """Whether the pattern may end at a call of `target`."""
        return target in self.ends_at

    @abstractmethod
    def match(self, node: Node) -> Match | Declined | None:
        """The pattern that ends at `node`."""

    @abstractmethod
    def rewrite(self, graph: Graph, match: Match) -> Node:
        """The replacement of `match.output`, built with `emit` at the graph's insertion point (before the output)."""


def apply(rules: Sequence[Rule], gm: GraphModule, sites: Sites, done: Rewrites | None = None) -> None:
    """Applies each rule wherever it matches, in the graph's order; the first rule that matches a node wins.

    done: gets what was rewritten.
    """
    graph = gm.graph
    inside = transformed(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node._erased:
            continue
        if node in inside:
            for rule in rules if node.target in (LINEAR, SDPA) else ():
                if rule.may_end_at(node.target):
                    sites.declined(node, rule.kind, TRANSFORMED)
            continue
        for rule in rules:
            if rule.may_end_at(node.target) and _try(rule, graph, node, sites, done):
                break


def _try(rule: Rule, graph: Graph, node: Node, sites: Sites, done: Rewrites | None) -> bool:
    last: Node | None = None  # the node before those that the rule adds
    try:
        match = rule.match(node)
        if match is None:
            return False
        if isinstance(match, Declined):
            sites.declined(node, rule.kind, match.reason)
            return False
        writer = written_between(match.nodes)
        if writer is not None:
            sites.declined(node, rule.kind, f"{writer.name} ({writer.target}) writes in place to memory that the pattern uses")
            return False
        last = match.output.prev
        with graph.inserting_before(match.output):
            new = rule.rewrite(graph, match)
    except Exception as error:
        if sites.strict:
            raise
        for added in reversed(_between(last, match.output) if last is not None else []):
            graph.erase_node(added)
        log.warning("te_dynamo: %s failed on %s and was undone: %s", type(rule).__name__, node.name, error)
        sites.declined(node, rule.kind, f"the rule {type(rule).__name__} failed: {type(error).__name__}: {error}")
        return False
    # Later views in the graph alias the old output's fake value: the new node takes it over.
    new.meta[EXAMPLE] = match.output.meta.get(EXAMPLE, new.meta.get(EXAMPLE))
    for added in _between(last, match.output):
        if added is new or op_of(added) is not None:
            added.meta[ORIGIN] = match.output.name
    new.meta[ORIGIN] = match.output.name
    if done is not None:
        done.record(Rewrite(rule.kind, match.output, match.output.name, new, _between(last, match.output), rule.quiet), match.nodes)
    match.output.replace_all_uses_with(new)
    erase_if_dead(graph, match.nodes)
    return True


def _between(first: Node, last: Node) -> list[Node]:
    """The nodes between two nodes of a graph, in order."""
    found = []
    while (last := last.prev) is not first:
        found.append(last)
    return found[::-1]
