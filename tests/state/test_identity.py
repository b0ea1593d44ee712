"""Which tensor a slot belongs to when the model changes; and the effect of non-finite and huge numbers on it."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import te_dynamo
from te_dynamo.backend import te_fp8
from te_dynamo.recipe import DelayedScaling
from te_dynamo.state import STATE
from te_dynamo.state.homes import _all_holders
from tests.numerics import sqnr

SIZE = 16
pytestmark = pytest.mark.usefixtures("no_codegen")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with STATE.set_aside():
        yield
    torch._dynamo.reset()


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend=te_fp8, options={"recipe": "delayed", **options})


def train(call: Any, steps: int = 2, factor: float = 1.0) -> Tensor:
    for step in range(steps):
        y = call(factor * torch.randn(8, SIZE, generator=torch.Generator().manual_seed(step)))
        y.square().sum().backward()
    return y.detach()


def entries(model: Any, slot: str) -> int:
    """How many steps a slot remembers."""
    found = te_dynamo.scale_state(model).state_dict()
    return int(found[f"{slot}.amax_history"].count_nonzero()) if f"{slot}.amax_history" in found else 0


def reassigned(model: Block) -> None:
    model.up.weight = nn.Parameter(model.up.weight.detach().clone())


def loaded_by_assignment(model: Block) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def converted(model: Block) -> None:
    previous = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.bfloat16().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(previous)


def written(model: Block) -> None:
    model.up.weight.data = model.up.weight.detach().clone()


def moved_to(model: Block) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def evaluated(model: Block) -> None:
    model.eval()
    model(torch.randn(8, SIZE))
    model.train()


@pytest.mark.parametrize("change", [reassigned, loaded_by_assignment, converted, written, moved_to, evaluated])
def test_a_changed_model_goes_on_with_its_state(change):
    model = Block()
    call = compiled(model)
    train(call)
    change(model)
    gc.collect()
    used = list(STATE.arenas[torch.device("cpu")].used)
    y = train(call)
    assert entries(model, "up.input") == entries(model, "up.weight") == entries(model, "down.grad_output") == 4
    assert list(STATE.arenas[torch.device("cpu")].used) == used
    assert sqnr(model(torch.randn(8, SIZE, generator=torch.Generator().manual_seed(1))), y) > 22


def test_a_dtype_that_is_moved_keeps_the_state():
    model = Block()
    call = compiled(model)
    train(call)
    model.bfloat16()
    y = call(torch.randn(8, SIZE, dtype=torch.bfloat16))
    y.square().sum().backward()
    assert y.dtype == torch.bfloat16 and entries(model, "up.input") == 3


def test_a_replaced_layer_starts_fresh_and_gives_its_slots_back():
    model = Block()
    call = compiled(model)
    train(call)
    model.up = nn.Linear(SIZE, 2 * SIZE)
    torch._dynamo.reset()
    gc.collect()
    assert entries(model, "up.input") == 0 and entries(model, "down.input") == 2
    y = train(call)
    assert entries(model, "up.input") == 2 and entries(model, "down.input") == 4
    assert sqnr(model(torch.randn(8, SIZE, generator=torch.Generator().manual_seed(1))), y) > 22


def test_wrapping_a_layer_keeps_its_state():
    """As in PEFT: the linear moves into a module that adds an adapter."""

    class LoRA(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base
            self.a, self.b = nn.Linear(SIZE, 4, bias=False), nn.Linear(4, 2 * SIZE, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.b(self.a(x))

    model = Block()
    train(compiled(model))
    model.up.requires_grad_(False)
    model.up = LoRA(model.up)
    torch._dynamo.reset()
    train(compiled(model))
    # They share their input, and so its scale and history. They are not one GEMM: the base is frozen, the adapter is trained.
    assert entries(model, "up.base_layer.input") == entries(model, "up.a.input") == 4
    assert entries(model, "up.base_layer.weight") == 4 and entries(model, "up.a.weight") == 2
    assert entries(model, "up.b.weight") == 2
    assert entries(model, "up.input") == 0


def test_a_tied_weight_that_is_untied_is_two():
    model = nn.ModuleDict({"a": nn.Linear(SIZE, SIZE), "b": nn.Linear(SIZE, SIZE)})
    model["b"].weight = model["a"].weight
    call = compiled(lambda x: model["b"](torch.tanh(model["a"](x))))
    train(call)
    assert entries(model, "a.input") == entries(model, "a.1.input") == 2
    model["b"].weight = nn.Parameter(model["b"].weight.detach().clone())
    train(call)
    assert entries(model, "a.input") == 4 and entries(model, "a.1.input") == 2 and entries(model, "b.input") == 2


def test_compile_of_the_model_and_model_compile_share_their_state():
    model = Block()
    train(compiled(model))
    model.compile(backend=te_fp8)
    train(model)
    model.up.compile(backend=te_fp8)
    train(torch.compile(lambda x: model(x), backend=te_fp8))
    assert entries(model, "up.weight") == entries(torch.compile(model), "down.input") == 6


def test_a_graph_break_changes_nothing():
    class Broken(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.up(x))
            torch._dynamo.graph_break()
            return self.down(h)

    whole, broken = Block(), Broken()
    broken.load_state_dict(whole.state_dict())
    for model in (whole, broken):
        train(compiled(model), steps=4)
    a, b = (te_dynamo.scale_state(m).state_dict() for m in (whole, broken))
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_modules_are_found_that_gc_freeze_hides_before_a_search_and_after_it():
    made: list[nn.Module] = []
    for _ in range(2):
        made.append(nn.Linear(2, 2))
        for hides in (False, True):
            if hides:
                gc.collect()
                gc.freeze()
            held = _all_holders()
            assert all(list(held[id(m.weight)].modules) == [(id(m), "weight")] for m in made)
    gone = weakref.ref(made.pop())
    gc.collect()
    assert gone() is None


def test_a_frozen_weight_has_state_too():
    model = Block()
    model.down.requires_grad_(False)
    train(compiled(model), steps=3)
    assert entries(model, "down.input") == entries(model, "down.weight") == entries(model, "down.grad_output") == 3


def test_an_optimizer_step_that_a_grad_scaler_skips():
    """Forward and backward update the state, whether the optimizer then steps or not."""
    model = Block()
    call = compiled(model)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(4):
        before = model.up.weight.detach().clone()
        x = torch.randn(8, SIZE)
        loss = call(x).square().sum() * (torch.inf if step == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model.up.weight) == (step == 2)
    assert entries(model, "up.input") == 4
    assert entries(model, "down.grad_output") == 3  # an infinite amax is not recorded
    found = te_dynamo.scale_state(model).state_dict()
    assert all(v.isfinite().all() for v in found.values())


@pytest.mark.inductor
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_a_grad_scaler_finds_an_overflow_without_a_bias_to_show_it(recipe):
    model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False), nn.Tanh(), nn.Linear(SIZE, SIZE, bias=False))
    call = compiled(model, recipe=recipe)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(3):
        before = model[0].weight.detach().clone()
        scaler.scale(call(torch.randn(8, SIZE)).square().sum() * (1e38 if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model[0].weight) == (step == 1)
    infinite = torch.randn(8, SIZE)
    infinite[0, 0] = torch.inf
    assert not call(infinite).isfinite().all() and call(infinite)[1:].isfinite().all()


def test_a_part_in_eval_mode_does_not_stop_the_rest():
    """A frozen backbone is often put into eval mode: the scales of the training part are still updated."""
    model = Block()
    call = compiled(model)
    train(call)
    model.up.eval().requires_grad_(False)
    train(call)
    assert entries(model, "down.input") == entries(model, "down.grad_output") == 4
    model.eval()
    train(call)
    assert entries(model, "down.input") == 4


@pytest.mark.inductor  # its C++ might handle NaN differently
@pytest.mark.parametrize("like_te", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("where", ["activations", "gradients"])
def test_wild_numbers_for_some_steps_do_not_poison_the_state(where, bad, like_te):
    """After one step of clean data the error is as before. With like_te an infinite amax stays in the history until it ages out,
    as in TE: the previous scale is kept until then."""
    model = Block()
    call = compiled(model, recipe=DelayedScaling(amax_history_len=1 if bad == 1e30 else 8, like_te=like_te))
    x, dy = torch.randn(2, 8, SIZE)

    def step(x: Tensor, dy: Tensor) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        y = call(leaf)
        y.backward(dy)
        return [y.detach(), leaf.grad, model.up.weight.grad]

    for _ in range(3):
        step(x, dy)
    for _ in range(2):
        wild_x, wild_dy = x.clone(), dy.clone()
        (wild_x if where == "activations" else wild_dy)[0, 0] = bad
        step(wild_x, wild_dy)
    # A huge finite amax is recorded like any other, and ages out of the history; then layer by layer.
    for _ in range(4 if bad == 1e30 else 1):
        step(x, dy)
    found = step(x, dy)
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    y = model(leaf)
    y.backward(dy)
    assert all(sqnr(a, b) > 18 for a, b in zip([y.detach(), leaf.grad, model.up.weight.grad], found, strict=True))


@pytest.mark.inductor
def test_overflow_saturates():
    model = nn.Linear(SIZE, SIZE, bias=False)
    call = compiled(model, recipe=DelayedScaling(amax_history_len=4, margin=0))
    x = torch.randn(8, SIZE)
    call(x).sum().backward()
    y = call(100 * x)  # beyond the scale's range: elements saturate to the largest value
    assert sqnr(model((100 * x).clamp(-x.abs().max(), x.abs().max())), y) > 25
