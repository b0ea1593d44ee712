"""Graphs that run operator by operator: autograd sees the same as for a compiled graph."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import te_dynamo
from te_dynamo.backend import te_fp8
from te_dynamo.runtime import compile_without_codegen
from tests.numerics import sqnr

SIZE = 32
pytestmark = pytest.mark.usefixtures("no_codegen")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Net(nn.Module):
    """Its second result depends on the input only, its third has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        y = self.b(torch.tanh(self.a(x)))
        return y, x.flatten() * 1, y.argmax(-1), y.shape[0]


def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs calibrating graphs through AOTAutograd, like the graphs that run more than twice."""
    monkeypatch.setattr("te_dynamo.backend.eagerly", compile_without_codegen)


def first_step(how: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The calibrating graph's results and gradients, and the scale state after a second step, which depends on it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net().to(dtype)
    call = torch.compile(model, backend=te_fp8, fullgraph=True, options={"provider": "reference"})
    x = torch.randn(16, SIZE, dtype=dtype, requires_grad=True)
    y, flat, places, rows = call(x)
    assert rows == 16 and not places.requires_grad and torch.equal(flat.detach(), x.detach().flatten())
    if how == "backward":
        (y.square().sum() + flat.sum()).backward()
    elif how == "of the input alone":
        x.grad = torch.autograd.grad(y.square().sum(), x)[0]
    elif how == "twice":
        y.square().sum().backward(retain_graph=True)
        y.sum().backward()
    elif how == "of one result":
        flat.square().sum().backward()
    learned = [] if how == "of one result" else list(model.parameters())  # then AOTAutograd gives zeros, and eager mode None
    found = [y.detach(), x.grad, *(p.grad for p in learned if p.grad is not None)]
    call(x)[0].sum().backward()
    return [*found, *te_dynamo.scale_state(model).state_dict().values()]


@pytest.mark.parametrize("how", ["backward", "of the input alone", "twice", "of one result"])
def test_what_a_traced_graph_gives_and_records(how, monkeypatch):
    ours = first_step(how)
    traced(monkeypatch)
    theirs = first_step(how)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_a_second_backward_without_retain_graph_is_an_error():
    call = torch.compile(Net(), backend=te_fp8, options={"provider": "reference"})
    loss = call(torch.randn(16, SIZE))[0].square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_no_gradient_comes():
    class Stops(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    model = Net()
    call = torch.compile(model, backend=te_fp8, options={"provider": "reference"})
    Stops.apply(call(torch.randn(16, SIZE))[0]).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_no_gradient_is_wanted():
    model = Net().requires_grad_(False)
    call = torch.compile(model, backend=te_fp8, options={"provider": "reference"})
    assert not call(torch.randn(16, SIZE))[0].requires_grad


class Counted(nn.Module):
    """Writes to a buffer, and to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.linear(x.mul_(2))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.linear, x, use_reentrant=False)


@pytest.mark.parametrize(("kind", "is_traced"), [(Net, False), (Counted, True), (Checkpointed, True)])
def test_what_eager_mode_does_otherwise_is_traced(kind, is_traced, monkeypatch):
    seen: list[bool] = []

    def noted(*given):
        seen.append(True)
        return compile_without_codegen(*given)

    model = kind()
    exact, x = copy.deepcopy(model), torch.randn(16, SIZE)
    call = torch.compile(model, backend=te_fp8, fullgraph=True, options={"provider": "reference"})
    monkeypatch.setattr("te_dynamo.runtime.compile_inductor", lambda gm, inputs, options: gm.forward)
    monkeypatch.setattr("te_dynamo.runtime.compile_without_codegen", noted)
    given = [(x.clone().requires_grad_() * 1) for _ in range(2)]
    results = [module(t) for module, t in zip((call, exact), given, strict=True)]
    assert bool(seen) == is_traced
    ours, theirs = (r[0] if isinstance(r, tuple) else r for r in results)
    assert (ours - theirs).norm() < 0.1 * theirs.norm() and torch.equal(*given)
    if kind is Counted:
        assert model.calls == exact.calls == 1


class Softplus(nn.Module):
    """As in Qwen3.5's linear attention. `softplus_backward` gives its result the strides of the gradient, unlike what tracing expects."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.steps = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2)

    def part(self, x: Tensor) -> Tensor:
        steps = F.softplus(self.steps(x).view(2, 8, 2)).transpose(1, 2)
        return (steps * self.linear(x)[:, :2].reshape(2, 2, 8)).sum()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=False)


def test_strides_that_tracing_does_not_expect():
    model, x = Softplus(), torch.randn(16, SIZE)
    exact = copy.deepcopy(model)
    call = torch.compile(model, backend=te_fp8, fullgraph=True, options={"provider": "reference", "recipe": "delayed"})
    for module in (call, exact):
        module(x).backward()
    assert sqnr(exact.steps.weight.grad, model.steps.weight.grad) > 20


@pytest.mark.parametrize("write", [lambda y: y.mul_(2), torch.relu_, lambda y: y[:, :5].zero_()], ids=["scaled", "relu", "part"])
def test_a_result_may_be_written(write):
    """From the first step on: backward does not read the caller's tensor."""
    model, x = Net(), torch.randn(16, SIZE)
    run, found = torch.compile(model, backend=te_fp8, options={"provider": "reference"}), []
    for _ in range(2):
        model.zero_grad()
        y = run(x)[0]
        write(y)
        y.sum().backward()
        found.append(model.a.weight.grad.clone())
    assert found[0].isfinite().all() and sqnr(found[0], found[1]) > 25


def test_results_that_share_memory_may_be_written():
    """In a calibrating graph too, whose results are views to PyTorch's operators."""
    linear, x = nn.Linear(SIZE, 2 * SIZE), torch.randn(16, SIZE)
    run = torch.compile(lambda x: linear(x).chunk(2, -1), backend=te_fp8, options={"provider": "reference"})
    for _ in range(2):
        linear.zero_grad()
        mean, variance = run(x)
        variance.clamp_(-0.1, 0.1)
        (mean.sum() + variance.sum()).backward()
        within = linear(x).chunk(2, -1)[1].detach().abs() < 0.1
        assert linear.bias.grad is not None and (linear.bias.grad[:SIZE] == 16).all()
        assert (linear.bias.grad[SIZE:] - within.sum(0)).abs().amax() <= 2  # FP8 moves some across the border


class Viewed(nn.Module):
    """Returns a linear's result and views of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.linear(x)
        return y, y.flatten(), y[0]


@pytest.mark.parametrize("provider", ["native", "reference"])
@pytest.mark.parametrize("how", ["written", "hooked", "retained"])
def test_views_of_a_result_are_views_of_it_to_autograd(how, provider):
    """As in eager mode, in the calibrating step and in later ones: a write and a hook concern them too."""
    model = Viewed()
    call = torch.compile(model, backend=te_fp8, fullgraph=True, options={"provider": provider, "recipe": "delayed"})

    def gradient(run: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y, *views = run(x)
        if how == "written":
            y.mul_(3)
        elif how == "hooked":
            y.register_hook(lambda grad: 2 * grad)
        else:
            views[0].retain_grad()
            views[1].mul_(2)
        sum((1 + i) * result.sum() for i, result in enumerate([y, *views])).backward()
        return x.grad

    for _ in range(3):
        x = torch.randn(16, SIZE)
        assert sqnr(gradient(model, x), gradient(call, x)) > 20


@pytest.mark.inductor
@pytest.mark.parametrize("recipe", ["delayed", "rowwise"])
def test_generated_code_returns_what_may_be_written(recipe):
    """Also where an operator of ours made the result by reshaping another: Inductor drops the copy."""
    model = Viewed()
    call = torch.compile(model, backend=te_fp8, fullgraph=True, options={"recipe": recipe})
    for _ in range(3):
        x = torch.randn(16, SIZE, requires_grad=True)
        y, *_ = expected = model(x)
        z, *_ = found = call(x)
        y.mul_(3), z.mul_(3)
        grads = [torch.autograd.grad(sum((1 + i) * t.sum() for i, t in enumerate(results)), x)[0] for results in (expected, found)]
        assert sqnr(*grads) > 20


def test_a_result_that_is_a_view_of_an_input_stays_one():
    linear, leaf = nn.Linear(SIZE, SIZE), torch.randn(16, SIZE, requires_grad=True)
    run = torch.compile(lambda x: (x.view(-1), linear(x)), backend=te_fp8, options={"provider": "reference"})
    for _ in range(2):
        x, leaf.grad = leaf * 1, None
        view, _ = run(x)
        view.mul_(3)
        x.sum().backward()
        assert leaf.grad is not None and (leaf.grad == 3).all()


@pytest.mark.parametrize("write", [lambda x: torch._foreach_mul_([x], [2.0]), lambda x: x.__iadd__(1)], ids=["foreach", "method"])
def test_an_input_that_is_written(write):
    linear, leaf = nn.Linear(SIZE, SIZE), torch.randn(16, SIZE, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        write(x)
        return linear(x)

    run = torch.compile(f, backend=te_fp8, options={"provider": "reference"})
    x = leaf * 1
    run(x).sum().backward()
    expected = leaf.detach() * 1
    write(expected)
    assert torch.equal(x, expected) and leaf.grad is not None
