"""The record of what was found in a graph: each site, taken or not, and why not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, Node

# class name -> the attribute under which a wrapper holds what it wraps. By name: some are private, and importing all is slow.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
}
WRAPPED = frozenset(WRAPPERS.values())


def clean_path(name: str) -> str:
    """A module path as `named_modules()` spells it, from the way Dynamo spells it.

    >>> clean_path("L['self']._modules['model']._modules['layers']._modules['0']._parameters['weight']")
    'model.layers.0.weight'
    >>> clean_path("L['args'][0].model.layers[3].mlp")
    'model.layers.3.mlp'
    >>> clean_path("L['self']._modules['0'].__dict__['_modules']['_checkpoint_wrapped_module']._modules['up']")
    '0.up'
    """
    name = re.sub(r"^[LG]\['[^']*'\](\[\d+\])?", "", name)
    name = re.sub(r"\.__dict__\['(_modules|_parameters|_buffers)'\]", r".\1", name)
    name = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", name)
    name = re.sub(r"\['?([^'\]]*)'?\]", r".\1", name)
    return ".".join(part for part in name.split(".") if part and part not in WRAPPED)


def module_path(node: Node) -> str:
    """The path of the module whose forward contains the node, inside the compiled module."""
    stack = node.meta.get("nn_module_stack")
    return clean_path(list(stack.values())[-1][0]) if stack else ""


@dataclass
class Site:
    """One place of the model that was considered.

    kind: "linear", "norm_linear", "norm", "attention"; path: the module's path inside the compiled module; provider:
    who computes it, None where it was left as it was; reason: why it was left; layout: of an attention; flops: of
    its forward GEMMs, at the sizes it was compiled with; node: the name of its node in Dynamo's graph.
    """

    kind: str
    path: str
    node: str
    provider: str | None = None
    reason: str | None = None
    recipe: str | None = None
    layout: str | None = None
    flops: int = 0
    detail: dict[str, Any] = field(default_factory=dict)


class Sites:
    """All sites of one compiled graph."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.all: list[Site] = []
        self._declined: set[tuple[Graph, str, str]] = set()

    def __iter__(self) -> Iterator[Site]:
        return iter(self.all)

    def add(self, site: Site) -> Site:
        self.all.append(site)
        return site

    def declined(self, node: Node, kind: str, reason: str) -> None:
        """Records that a pattern which ends at `node` was found, and left as it was."""
        if (key := (node.graph, node.name, kind)) not in self._declined:
            self._declined.add(key)
            self.add(Site(kind=kind, path=module_path(node), node=node.name, reason=reason))

    def taken(self) -> list[Site]:
        return [s for s in self.all if s.provider is not None]

    def clear(self) -> None:
        self.all.clear()
        self._declined.clear()

    def whole_graph_left(self, reason: str) -> None:
        """Records that the graph was left without a look at its sites."""
        self.add(Site(kind="graph", path="", node="", reason=reason))

    def commonest_reasons(self, most: int = 3) -> str:
        """The commonest reasons for which sites were left, as a sentence."""
        counted = Counter(s.reason for s in self.all if s.reason)
        return "; ".join(f"{reason} ({count} sites)" if count > 1 else str(reason) for reason, count in counted.most_common(most)) + "."
