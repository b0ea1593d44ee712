"""`debug_dir`: each graph after each stage, as a readable script that runs by itself.

`<debug_dir>/graph_<n>/<index>_<stage>.py` has the graph as PyTorch prints it, one line per node, with shapes, dtypes and
module paths in comments, and a function that makes inputs from a fixed seed. Run as a program, it does a forward and a backward
pass and prints a summary of the results. The inputs imitate the real ones (mean, deviation, range of the indices): of the
model's own data the file has only scalars and small integer tensors, such as positions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from te_dynamo.report.dump.inputs import fill, index_bounds
from te_dynamo.report.dump.script import Script

__all__ = ["Dump", "fill", "index_bounds"]


class Dump:
    """The dumps of one compiled graph.

    directory: `debug_dir`; graph_number: the first number to try for the folder `graph_<n>`. Folders of other graphs, other
    processes and earlier runs are left alone. `folder` is created at the first stage.
    """

    def __init__(self, directory: str | os.PathLike[str], graph_number: int) -> None:
        self.directory, self.graph_number = Path(directory), graph_number
        self.folder: Path | None = None
        self.filled: dict[str, str] = {}  # how each input is made: decided once, so that all stages get the same
        self.grad_enabled = torch.is_grad_enabled()

    def stage(self, index: int, name: str, gm: GraphModule, inputs: Sequence[Any]) -> Path:
        """Writes the graph as a stage left it, and returns the file.

        inputs: what the graph is called with, in the order of its placeholders, real or fake. Missing ones at the end are
        made up from the placeholders' fake values. Raises OSError if the folder cannot be written.
        """
        if self.folder is None:
            self.folder, self.graph_number = _new_folder(self.directory, self.graph_number)
        path = self.folder / f"{index}_{name}.py"
        process = f"process {os.getpid()}" + (f" (rank {os.environ['RANK']})" if "RANK" in os.environ else "")
        title = f"Graph {self.graph_number} after the stage {name!r}, {process}; torch {torch.__version__}."
        path.write_text(Script(gm, inputs, self.filled).text(f"{title}\n\nRuns by itself: python {path.name}", self.grad_enabled))
        return path


def _new_folder(directory: Path, number: int) -> tuple[Path, int]:
    """Makes the first `graph_<n>`, from `number` on, that does not exist, which also reserves it."""
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            (folder := directory / f"graph_{number}").mkdir()
            return folder, number
        except FileExistsError:
            number += 1
