"""An MLP on a GPU: one kernel computes its activation and writes it in FP8 in forward, and one its gradient in backward. The graphs after
AOTAutograd's partition, made and run on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from te_dynamo.backend import observing, te_fp8
from te_dynamo.lowering.fp8 import E4M3, E5M2
from te_dynamo.sites import Site
from tests.matrix import thinned
from tests.numerics import sqnr
from tests.partitioned import calls, casts, interpreted, saved_for_backward

ours = torch.ops.te_dynamo
TOKENS, HIDDEN, INNER = 64, 96, 160


class MLP(nn.Module):
    """norm, then gate and up as two linears or as one (its halves in either order), then down."""

    def __init__(
        self, activation: Callable[[Tensor], Tensor] = F.silu, *, packed: str = "", bias: bool = False, gated: bool = True
    ) -> None:
        super().__init__()
        self.activation, self.packed, self.gated = activation, packed, gated
        self.norm, self.down = nn.RMSNorm(HIDDEN), nn.Linear(INNER, HIDDEN, bias=bias)
        self.up = nn.Linear(HIDDEN, INNER * (2 if packed else 1), bias=bias)
        self.gate = nn.Linear(HIDDEN, INNER, bias=bias) if gated and not packed else None
        self.dropout = nn.Dropout(0.0)

    def operand(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if not self.gated:
            return self.activation(self.up(h))
        if self.packed:
            a, b = self.up(h).chunk(2, -1)
            gate, up = (a, b) if self.packed == "gate first" else (b, a)
        else:
            gate, up = self.gate(h), self.up(h)
        return self.activation(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.operand(x)))


KINDS: dict[str, Callable[[], MLP]] = {
    "swiglu": lambda: MLP(),
    "swiglu with biases": lambda: MLP(bias=True),
    "geglu of one linear": lambda: MLP(F.gelu, packed="gate first", bias=True),
    "swiglu of one linear, up first": lambda: MLP(packed="up first"),
    "gelu": lambda: MLP(lambda x: F.gelu(x, approximate="tanh"), bias=True, gated=False),
    "relu squared": lambda: MLP(lambda x: F.relu(x).square(), gated=False),
}


def model_and_input(kind: str = "swiglu", tokens: int = TOKENS, dtype: torch.dtype = torch.bfloat16) -> tuple[MLP, Tensor]:
    torch.manual_seed(0)
    return KINDS[kind]().to(dtype), torch.randn(2, tokens // 2, HIDDEN).to(dtype).requires_grad_()


def results(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, steps: int = 1) -> list[Tensor]:
    """The output and all gradients of the last of several steps, with delayed scales."""
    for _ in range(steps):
        y = run(x)
        learned = [p for p in model.parameters() if p.requires_grad]
        found = [y.detach(), *torch.autograd.grad(y, [x, *learned], torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))]
    return found


def compiled(model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(model, backend=te_fp8, fullgraph=True, options={"strict": True, "memory": "speed", **options})


@pytest.mark.parametrize(("kind", "memory"), thinned(list(KINDS), ["speed", "balanced", "saving"]))
def test_it_is_one_kernel_each_way_and_right(kind, memory):
    model, x = model_and_input(kind)
    exact_model, exact_x = KINDS[kind]().double(), x.detach().double().requires_grad_()
    exact_model.load_state_dict(model.state_dict())
    exact = results(exact_model, exact_model, exact_x)
    with interpreted() as graphs:
        found = results(compiled(model, memory=memory), model, x, steps=3)
        forward, backward = graphs
        assert len(calls(forward, ours.activation.default)) == len(calls(backward, ours.activation_gradient.default)) == 1
        assert len(calls(backward, ours.activation.default)) == (memory == "saving")  # the transposed copy
        assert len(casts(forward, E4M3)) == len(calls(backward, ours.transpose.default)) == 1  # of the norm's output
        assert len(calls(backward, ours.cast_both.default)) == 1 and not casts(backward, E5M2)  # the gradient of `down`
        assert not calls(backward, torch.ops.aten.cat.default)
        wide = [t for t in saved_for_backward(forward, 1) if t.element_size() == 2 and t.shape[-1] >= INNER]
        assert bool(wide) == (memory == "speed")  # gate and up
        defined = results(compiled(model, provider="reference", memory=memory), model, x, steps=3)
    assert [f.shape for f in found] == [e.shape for e in exact]
    lost = [sqnr(e, d) - sqnr(e, f) for e, f, d in zip(exact, found, defined, strict=True)]
    assert max(lost) < 0.75 and sum(lost) < 0.25 * len(lost), lost  # dB


def sites_of(model: nn.Module, x: Tensor, **options: Any) -> tuple[list[Site], int, int]:
    """The sites of a training model, and how many kernels compute an activation in forward, and its gradient in backward."""
    found: list[Site] = []
    with interpreted() as graphs, observing(lambda gm, sites, _: found.extend(sites.all)):
        results(compiled(model, **options), model, x, steps=2)
        forward, backward = graphs[-2:]
        return found, len(calls(forward, ours.activation.default)), len(calls(backward, ours.activation_gradient.default))


def test_a_report_says_who_makes_the_operand():
    (site,) = (s for s in sites_of(*model_and_input())[0] if s.path == "down")
    assert (site.kind, site.detail["activation"]) == ("activation_linear", "one kernel with the cast and the transposed copy")


def test_the_gradient_of_what_something_else_reads_too_is_inductor_s():
    class Probed(MLP):
        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate(h := self.norm(x)), self.up(h)
            return self.down(F.silu(gate) * up) + gate.mean()

    torch.manual_seed(0)
    model = Probed().bfloat16()
    assert sites_of(model, model_and_input()[1])[1:] == (1, 0)


@pytest.mark.parametrize("read", [slice(1), slice(None, None, 2)], ids=["the first half", "every second sequence"])
def test_the_gradient_of_some_of_the_tokens_is_inductor_s(read):
    class Sliced(MLP):
        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate(h := self.norm(x)), self.up(h)
            return self.down(F.silu(gate[read]) * up[read])

    torch.manual_seed(0)
    model = Sliced().bfloat16()
    assert sites_of(model, model_and_input()[1])[1:] == (1, 0)


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [(("down",), (0, 0)), (("gate", "up"), (1, 0)), (("gate",), (1, 0))],
    ids=["the linear that reads it", "those before it", "one of those, so that they are not one GEMM"],
)
def test_without_a_transposed_copy_it_is_inductor_s(frozen, expected):
    model, x = model_and_input()
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    assert sites_of(model, x)[1:] == expected


def test_dropout_between_and_other_recipes_leave_it_to_inductor():
    model, x = model_and_input()
    model.dropout = nn.Dropout(0.5)
    assert sites_of(model, x)[1:] == (0, 0)
    model, x = model_and_input()
    assert sites_of(model, x, recipe="current")[1:] == (0, 0)
    assert sites_of(model, x, skip=["down"])[1:] == (0, 0)
    assert sites_of(model, x, skip=["gate", "up"])[1:] == (1, 0)


def test_a_checkpoint_gives_the_same_gradients():
    model, x = model_and_input()
    with interpreted() as graphs:
        expected = results(compiled(model), model, x, steps=3)
        found = results(compiled(lambda x: checkpoint(model, x, use_reentrant=False)), model, x, steps=3)
        assert sum(len(calls(gm, ours.activation.default)) for gm in graphs[-2:]) == 2  # recomputed in backward
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_token_counts_of_any_size():
    model, _ = model_and_input()
    exact = KINDS["swiglu"]().double()
    exact.load_state_dict(model.state_dict())
    with interpreted() as graphs:
        torch._dynamo.reset()
        run = torch.compile(model, backend=te_fp8, fullgraph=True, dynamic=True, options={"memory": "speed"})
        for tokens in (24, 34, 50):
            x = torch.randn(2, tokens // 2, HIDDEN).bfloat16().requires_grad_()
            expected = results(exact, exact, x.detach().double().requires_grad_())
            assert all(sqnr(e, f) > 17 for e, f in zip(expected, results(run, model, x), strict=True))
        assert len(graphs) == 2


def test_float32_and_float16():
    for dtype in (torch.float32, torch.float16):
        model, x = model_and_input("swiglu with biases", dtype=dtype)
        exact = KINDS["swiglu with biases"]().double()
        exact.load_state_dict(model.state_dict())
        with interpreted():
            found = results(compiled(model), model, x, steps=3)
        expected = results(exact, exact, x.detach().double().requires_grad_())
        assert all(f.dtype == dtype and sqnr(e, f) > 17 for e, f in zip(expected, found, strict=True))
