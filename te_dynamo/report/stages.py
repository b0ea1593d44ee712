"""Dumps, spec checks and verification for each stage of one compiled graph, if the options ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

from torch.fx import GraphModule

from te_dynamo.config import Options
from te_dynamo.passes.spec import SPECS, require
from te_dynamo.report.dump import Dump
from te_dynamo.report.verify import Verifier

HIGH_PRECISION = ("canonicalize", "raise", "fuse", "plan")  # these keep the model's result, so they can be compared
graph_numbers = count()


class Stages:
    """Follows one graph through the pipeline.

    verifier: compares the high-precision stages on the first real inputs; None unless `verify` is set.
    """

    def __init__(self, options: Options, inputs: Sequence[Any]) -> None:
        self.inputs, self.check_specs = inputs, options.verify
        self.dump = Dump(options.debug_dir, next(graph_numbers)) if options.debug_dir else None
        self.verifier: Verifier | None = None
        self._written = count()

    def start(self, gm: GraphModule) -> None:
        """The graph as Dynamo gave it."""
        self.verifier = Verifier(gm) if self.check_specs else None
        self._dump("dynamo", gm)

    def done(self, stage: str, gm: GraphModule) -> None:
        """The graph as a stage left it. Raises SpecError if `verify` is set and the graph breaks the stage's spec."""
        if self.check_specs:
            require(gm, SPECS[stage.removesuffix("_calibrating").removesuffix("_partly")])
        if self.verifier is not None and stage in HIGH_PRECISION:
            self.verifier.stage(stage, gm)
        self._dump(stage, gm)

    def _dump(self, stage: str, gm: GraphModule) -> None:
        if self.dump is not None:
            self.dump.stage(next(self._written), stage, gm, self.inputs)
