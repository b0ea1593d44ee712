"""What is told of each stage of one compiled graph: dumps, specs and verification, where the options ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from te_dynamo.config import Options


class Stages:
    def __init__(self, options: Options, inputs: Sequence[Any]) -> None:
        self.options, self.inputs = options, inputs

    def start(self, gm: GraphModule) -> None:
        """The graph as Dynamo gave it."""

    def done(self, stage: str, gm: GraphModule) -> None:
        """The graph as a stage left it."""
