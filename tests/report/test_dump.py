"""Dumps are scripts that run by themselves and give the graph's results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import checkpoint

from te_dynamo.ir.graph import EXAMPLE
from te_dynamo.report.dump import Dump, fill, index_bounds
from tests.capture import capture
from tests.forks import Forks
from tests.models import SMALL
from tests.pipeline import stages_of

ROOT = Path(__file__).parents[2]


def run(forks: Forks, script: Path) -> str:
    return forks.run("import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')", str(script), path=[str(ROOT)])


def dump_and_run(forks: Forks, folder: Path, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, list[str]]:
    """What the script of each stage prints, by stage; each runs in a separate process."""
    recorded = stages_of(fn, *args, **kwargs)
    dump = Dump(folder, 0)
    files = {name: dump.stage(i, name, gm, recorded.inputs) for i, (name, gm) in enumerate(recorded.graphs.items())}
    assert len(files) >= 6
    return {name: run(forks, file).splitlines() for name, file in files.items()}


def high_precision(printed: dict[str, list[str]]) -> list[list[str]]:
    return [lines for name, lines in printed.items() if name in ("dynamo", "canonicalize", "raise", "fuse", "plan")]


def numbers(lines: list[str]) -> list[float]:
    return [float(line.rpartition("norm ")[2]) for line in lines if "norm " in line]


class Mixed(nn.Module):
    """Checkpointing, autocast, no_grad, writes in place, slices, an ellipsis, a buffer that is updated."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(64, 96), nn.Linear(96, 64), nn.BatchNorm1d(64)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        x = x + checkpoint(self.mlp, x, use_reentrant=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.mlp(x)
        with torch.no_grad():
            z = z.float() * 2
        z += y
        z[0, 1:3] = torch.tensor(2.0)
        y.add_(1)
        clipped = x[..., None, 1:].clamp(-float("inf"), 3).to(device=x.device, dtype=torch.float64)
        return self.norm(x), z, clipped, y.mT, x.shape[0]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("train", [True, False])
def test_each_stage_runs_by_itself_and_gives_the_same(forks: Forks, tmp_path: Path, dynamic: bool | None, train: bool) -> None:
    with torch.set_grad_enabled(train):
        printed = dump_and_run(forks, tmp_path, Mixed(), torch.randn(6, 64), torch.randn(64, 6).t(), dynamic=dynamic)
    first, *others = high_precision(printed)
    assert any("gradient of" in line for line in first) == train
    for lines in others:
        assert numbers(lines) == pytest.approx(numbers(first), rel=1e-3)
    assert numbers(printed["lower"])[0] == pytest.approx(numbers(first)[0], rel=0.1)  # in FP8


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_llama(forks: Forks, tmp_path: Path, dynamic: bool | None) -> None:
    case = SMALL["llama"]
    inputs = case.inputs()
    model = case.model()
    model.gradient_checkpointing_enable()
    printed = dump_and_run(forks, tmp_path, model.train(), **inputs, labels=inputs["input_ids"], dynamic=dynamic)
    first, *others = high_precision(printed)
    assert first[0].startswith("output 0: torch.float32 (), norm ")
    for lines in others:
        assert numbers(lines) == pytest.approx(numbers(first), rel=1e-3)
    assert sum(line.startswith("output") for line in printed["lower"]) == 3  # and the recorded amaxes


def test_a_file_is_readable(forks: Forks, tmp_path: Path) -> None:
    recorded = stages_of(SMALL["llama"].model(), **SMALL["llama"].inputs())
    dump = Dump(tmp_path, 0)
    raised = dump.stage(2, "raise", recorded.graphs["raise"], recorded.inputs)
    planned = dump.stage(4, "plan", recorded.graphs["plan"], recorded.inputs)
    assert raised == tmp_path / "graph_0" / "2_raise.py"
    text = raised.read_text()
    assert "= te_dynamo.ir.linear.linear(" in text and "import te_dynamo.ir.linear\n" in text
    assert "# f32[2, 24, 64] | model.layers.0.self_attn.q_proj" in text
    assert '"model_layers_0_self_attn_q_proj_weight": (torch.randn((64, 64), dtype=torch.float32)' in text
    assert "native, delayed scaling" in planned.read_text()
    assert "output 0" in run(forks, planned)


def test_no_file_of_another_graph_or_process_is_overwritten(forks: Forks, tmp_path: Path) -> None:
    gm = capture(lambda x: x + 1, torch.randn(3))
    first, second = (Dump(tmp_path, 0).stage(0, "dynamo", gm, []) for _ in range(2))
    program = (
        "import sys, torch; from te_dynamo.report.dump import Dump; gm = torch.fx.symbolic_trace(lambda x: x + 1);"
        "print(Dump(sys.argv[1], 0).stage(0, 'dynamo', gm, []))"
    )
    third = Path(forks.run(program, str(tmp_path), path=[str(ROOT)]).strip())
    assert [p.parent.name for p in (first, second, third)] == ["graph_0", "graph_1", "graph_2"]


def written(gm: GraphModule, tmp_path: Path, inputs: list[Any] | None = None) -> str:
    return Dump(tmp_path, 0).stage(0, "dynamo", gm, inputs or []).read_text()


def test_indices_stay_below_what_they_index(forks: Forks, tmp_path: Path) -> None:
    def fn(ids: Tensor, places: Tensor, labels: Tensor, table: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        rows = F.embedding(ids.long().reshape(-1)[2:], table)
        return rows, logits[:, places], F.cross_entropy(logits, F.pad(labels, (0, 1), value=-100)[1:])

    ids, places, labels = torch.full((40,), 6, dtype=torch.int32), torch.full((30,), 2), torch.full((20,), -100)
    gm = capture(fn, ids, places, labels, torch.randn(7, 4), torch.randn(20, 3))
    named = {node.name: bound for node, bound in index_bounds(gm).items()}
    assert named == {"l_ids_": 7, "l_places_": 3, "l_labels_": 3}
    text = written(gm, tmp_path)
    assert '"l_ids": torch.randint(0, 7, (40,), dtype=torch.int32)' in text
    assert "output 2" in run(forks, tmp_path / "graph_0" / "0_dynamo.py")
    # Real inputs are more precise, but an ignored label (-100) is not an index.
    real = written(gm, tmp_path, gm.meta["example_inputs"])
    assert '"l_ids": torch.randint(6, 7,' in real and '"l_labels": torch.randint(0, 1,' in real


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(4, 6).t(),
        torch.randn(1, 6).expand(4, 6),
        torch.randn(8, 6)[::2, 1:],
        torch.randn(3, 4).to(torch.float8_e4m3fn),
        torch.randn(2, 2, dtype=torch.complex64),
        torch.rand(5) < 0.5,
        torch.arange(6),
        torch.randint(0, 9, (40, 2)).t(),
        torch.tensor(0.25, dtype=torch.float64),
        torch.empty(0, 3),
        torch.full((3,), float("inf")),
        torch.ones(4, dtype=torch.bfloat16),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_an_input_has_the_right_size_stride_and_dtype(value: Tensor, known: bool) -> None:
    made = eval(fill(value, value if known else None, None))
    assert (made.dtype, made.shape, made.device) == (value.dtype, value.shape, value.device)
    assert value.numel() == 0 or made.stride() == value.stride() or value.numel() <= 16


def test_an_input_resembles_the_real_one() -> None:
    value = torch.randn(1000) * 0.02 + 3
    made = eval(fill(value, value, None))
    assert made.mean().item() == pytest.approx(3, rel=0.01) and made.std().item() == pytest.approx(0.02, rel=0.1)
    variance = torch.rand(1000)  # like a batch norm's: a negative one would give NaN
    assert eval(fill(variance, variance, None)).min() >= 0
    assert eval(fill(torch.tensor(1e-5), torch.tensor(1e-5), None)).item() == pytest.approx(1e-5)


def test_what_cannot_be_imported_says_so(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta[EXAMPLE] = torch.randn(2)
    graph.output((graph.call_function(lambda t: t, (x,)),))
    text = written(GraphModule({}, graph), tmp_path)
    assert "raise NotImplementedError(" in text
    compile(text, "dump", "exec")
