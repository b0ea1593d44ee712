"""Gradients that are not stored: which expressions move into the nodes that read them, and what those then compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

import te_dynamo.lowering.quantize_rows as quantize_rows
from te_dynamo.backend import te_fp8
from te_dynamo.lab import pretend
from te_dynamo.lowering.inline import InlineGradients
from tests.forks import Forks
from tests.numerics import sqnr

ROOT = Path(__file__).resolve().parent.parent.parent
E4M3 = torch.float8_e4m3fn
quantize = torch.ops.te_dynamo.quantize_rows
reason = pretend.unavailable()


def gradient(both: Tensor, grad: Tensor) -> Tensor:
    """Of a clamped SwiGLU whose gate and up alternate: more operations than Inductor puts into one expression."""
    gate, up = both[:, ::2], both[:, 1::2]
    g, u = gate.clamp(max=2), up.clamp(-2, 2)
    s = torch.sigmoid(1.702 * g)
    of_gate = grad * (u + 1) * (s + 1.702 * g * s * (1 - s))
    nothing = torch.zeros(both.shape, dtype=both.dtype)
    made = torch.slice_scatter(nothing, torch.where(gate <= 2, of_gate, 0.0), 1, 0, both.shape[1], 2)
    return made + torch.slice_scatter(nothing, torch.where(up.abs() <= 2, grad * g * s, 0.0), 1, 1, both.shape[1], 2)


def of_biases(rows: Tensor, which: Tensor) -> Tensor:
    return torch.zeros(4, rows.shape[1], dtype=rows.dtype).index_put((which,), rows, accumulate=True)


def alone(both: Tensor, grad: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    return quantize([gradient(both, grad)], E4M3)


def with_biases(both: Tensor, grad: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    made = gradient(both, grad)
    return *quantize([made], E4M3), of_biases(made, which)


def as_parts(both: Tensor, grad: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    gate, up = (made := gradient(both, grad)) * 2, made.tanh()
    return *quantize([gate, up], E4M3), of_biases(gate, which)


def read_whole(both: Tensor, grad: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    made = gradient(both, grad)
    return *quantize([made], E4M3), made.sum(0)


def sorted_into(both: Tensor, grad: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    """Rows are written rather than added: in which order is not defined for two kernels."""
    made = gradient(both, grad)
    return *quantize([made], E4M3), torch.zeros_like(made).index_put((which,), made)


def of_much(both: Tensor, grad: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    return quantize([sum(grad.roll(i, 0) for i in range(1, 6)) + grad], E4M3)


def in_part(both: Tensor, grad: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    """Something else reads what the gradient is computed from: that stays outside."""
    inner = both.sigmoid()
    return *quantize([inner * both.cos()], E4M3), inner


def too_long(both: Tensor, grad: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    for _ in range(1000):
        grad = grad.sin()
    return quantize([grad], E4M3)


def read_again_and_again(both: Tensor, grad: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    """Each step doubles what has to be evaluated."""
    for _ in range(10):
        grad = grad * grad
    return quantize([grad], E4M3)


def added_to(both: Tensor, grad: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    made = gradient(both, grad)
    return *quantize([made], E4M3), both.index_put((which,), made, accumulate=True)


def complex_numbers(both: Tensor, grad: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    turned = torch.view_as_complex(both.view(-1, grad.shape[1], 2)) * 1j
    return quantize([torch.view_as_real(turned).reshape(both.shape) * 2], E4M3)


@torch.library.custom_op("te_dynamo_tests::act", mutates_args=(), tags=(torch.Tag.pointwise,))
def act(x: Tensor) -> Tensor:
    return x.sin()


@act.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def by_a_users_operator(both: Tensor, grad: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    return quantize([act(both * 2) * 2], E4M3)


MERGED: dict[Callable[..., tuple[Tensor, ...]], int] = {
    alone: 1, with_biases: 2, as_parts: 2, in_part: 1, complex_numbers: 1, by_a_users_operator: 1,
    read_whole: 0, sorted_into: 0, added_to: 0, of_much: 0, too_long: 0, read_again_and_again: 0,
}  # fmt: skip
WHOLE = (alone, with_biases, as_parts)  # nothing is left outside


def inputs(rows: int = 12, columns: int = 32, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return 2 * torch.randn(rows, 2 * columns).to(dtype), torch.randn(rows, columns).to(dtype), torch.arange(rows) % 4


@pytest.mark.parametrize("run", MERGED, ids=lambda run: run.__name__)
def test_what_moves_into_its_readers(run: Callable[..., tuple[Tensor, ...]]) -> None:
    graph = make_fx(run, select_decomp_table(), tracing_mode="fake")(*inputs()).graph
    before = len(graph.nodes)
    InlineGradients("")(graph)
    merged = [n for n in graph.nodes if hasattr(n.target, "_inductor_lowering_function")]
    assert len(merged) == MERGED[run]
    if not merged:
        assert len(graph.nodes) == before
    elif run in WHOLE:
        assert all(n.op in ("placeholder", "output") or not n.all_input_nodes or n in merged or "getitem" in n.name for n in graph.nodes)
    graph.lint()


@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("run", [*WHOLE, in_part, complex_numbers, by_a_users_operator], ids=lambda run: run.__name__)
def test_what_they_compute(run: Callable[..., tuple[Tensor, ...]], dynamic: bool) -> None:
    """As without the pass, bit for bit; and near what float64 gives."""
    quantize_rows.register_lowering()
    made = []
    for last in (None, InlineGradients("")):
        torch._dynamo.reset()
        with config.patch(post_grad_custom_post_pass=last, fx_graph_cache=False):
            compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
            made.append([compiled(*inputs(rows)) for rows in (12, 20)])
    assert all(map(torch.equal, (t.float() for each in made[0] for t in each), (t.float() for each in made[1] for t in each)))
    exact, (data, inverse, *_) = inputs(20), made[1][1]
    if run is with_biases:
        expected = gradient(*(t.double() for t in exact[:2]))
        assert sqnr(expected, data.double() * inverse) > 28 and sqnr(of_biases(expected, exact[2]), made[1][1][3]) > 100


class Mine(CustomGraphPass):
    def __init__(self) -> None:
        self.seen: list[Graph] = []

    def __call__(self, graph: Graph) -> None:
        self.seen.append(graph)

    def uuid(self) -> str:
        return uuid4().hex  # not cached


@pytest.mark.inductor
@pytest.mark.parametrize("by_option", [False, True])
def test_a_last_pass_of_the_user_still_runs(by_option: bool) -> None:
    """Over forward and backward, and before ours."""
    torch._dynamo.reset()
    mine, model, ours = Mine(), nn.Linear(32, 32), list[Graph]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlineGradients, "__call__", lambda self, graph: ours.append(graph))
        options = {"inductor": {"post_grad_custom_post_pass": mine}} if by_option else {}
        with config.patch(post_grad_custom_post_pass=None if by_option else mine):
            loss = torch.compile(model, backend=te_fp8, options={"recipe": "current", **options})(torch.randn(16, 32)).sum()
        loss.backward()  # compiled here, where the user's setting is another
    assert len(mine.seen) == 2 and mine.seen == ours


GPT_OSS = """
import json
from benchmarks.lab import built
from benchmarks.lab_models import CASES
from te_dynamo.lab.estimate import estimate_of

case = next(case for case in CASES if case.name == "gpt-oss-20b layer")
side = estimate_of(built(case)).sides[1]
print(json.dumps([f"{launch.phase} {launch.kind} {launch.detail}" for launch in side.launches if launch.bytes > 3e8]))
"""


@pytest.mark.skipif(reason is not None, reason=str(reason))
def test_what_the_kernels_of_gpt_oss_store(forks: Forks) -> None:
    """One kernel for the activation and what is kept of its inputs, one for its gradient: nothing in 16 bits but GEMMs' results and sums of
    all experts; the experts' biases are added where their sums are read."""
    launches = json.loads(forks.run(GPT_OSS, path=[str(ROOT)]).splitlines()[-1])
    of_experts = [detail for detail in launches if "gemm" not in detail and "65536x" in detail.split("out:", 1)[-1]]
    assert not [detail for detail in of_experts if "out:bf16[65536x2880]" in detail or "out:bf16[65536x5760]" in detail]
    assert sum("out:e4m3[65536x45x64] out:f32[65536x45x1]" in d and "out:e4m3[65536x2880]" in d for d in of_experts) == 1
    assert sum("backward" in d and "out:e4m3[65536x5760]" in d and "out:bf16[32x5760]" in d for d in of_experts) == 1
