"""State that is only updated in part: two calls in one backward, slots that join late or leave, amaxes that wait for a roll."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import te_dynamo
from te_dynamo.backend import te_fp8
from te_dynamo.recipe import DelayedScaling
from te_dynamo.state import FORWARD, GRADIENT, STATE, Arena
from te_dynamo.state.reduce import Reduction

CPU = torch.device("cpu")
SIZE = 16
E4M3_MAX, E5M2_MAX = 448.0, 57344.0


@pytest.fixture(autouse=True)
def fresh(no_codegen: None) -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with STATE.set_aside():
        yield


def newest(model: nn.Module, slot: str) -> float:
    return float(te_dynamo.scale_state(model).state_dict()[f"{slot}.amax_history"][-1])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


@pytest.mark.parametrize("late", [False, True], ids=["side by side", "scattered"])
@pytest.mark.parametrize("factors", [(1.0, 8.0), (8.0, 1.0)])
def test_of_two_calls_in_one_backward_the_larger_gradient_counts(factors, late):
    """late: two graphs made the slots, so they are not adjacent."""
    model = Two()
    if late:
        for layer in (model.b, model.a):
            torch.compile(lambda x, layer=layer: layer(x) * 1, backend=te_fp8)(torch.randn(4, SIZE)).sum().backward()
    call = torch.compile(model, backend=te_fp8, fullgraph=True, options={"recipe": DelayedScaling(amax_history_len=4)})
    dys = [torch.randn(2, 8, SIZE) * factor for factor in factors]
    for _ in range(2):
        outputs = [call(torch.randn(8, SIZE)) for _ in dys]
        sum((y * dy[i]).sum() for pair, dy in zip(outputs, dys, strict=True) for i, y in enumerate(pair)).backward()
        for i, slot in enumerate(("a.grad_output", "b.grad_output")):
            assert newest(model, slot) == max(float(dy[i].abs().max()) for dy in dys)


def test_the_larger_gradient_of_a_recorded_step_is_in_the_scale():
    model = nn.Linear(SIZE, SIZE)
    call = torch.compile(model, backend=te_fp8, options={"recipe": "delayed"})
    small, large = torch.randn(8, SIZE), torch.randn(8, SIZE) * 8
    outputs = [call(torch.randn(8, SIZE)) for _ in range(2)]
    ((outputs[0] * large).sum() + (outputs[1] * small).sum()).backward()
    scale = te_dynamo.scale_state(model).state_dict()["grad_output.scale"]
    assert scale.item() == pytest.approx(E5M2_MAX / 8 / large.abs().max().item(), rel=1e-6)  # a margin of 3


# --- other ranks


@pytest.fixture
def triple(monkeypatch: Any) -> None:
    """Stands for the other ranks: their amaxes are three times this one's."""
    monkeypatch.setattr("te_dynamo.state.reduce.dist.all_reduce", lambda buffer, **_: buffer.mul_(3))


def test_slots_that_join_later_are_reduced_too(triple):
    """Two models that alternate: the second gets its slots after the first was reduced."""
    arena, group, reduction = Arena(CPU), object(), Reduction()
    for direction, count in ((FORWARD, 3), (GRADIENT, 2)):
        arena.take(direction, count)
    joined: list[tuple[int, int]] = []
    for direction, indices in ((FORWARD, [1, 2]), (GRADIENT, [1]), (FORWARD, [3]), (GRADIENT, [2])):
        reduction.join(arena, direction, indices, group)
        joined += [(direction, i) for i in indices]
        for _ in range(2):
            amax = torch.arange(1.0, 9.0).reshape(2, 4)
            expected = amax.clone()
            for slot in joined:
                expected[slot] *= 3
            reduce = reduction.of(arena)
            assert reduce is not None
            reduce(amax)
            assert torch.equal(amax, expected)
    reduction.join(arena, FORWARD, [1], None)  # from now on it is not reduced over ranks
    amax = torch.ones(2, 4)
    reduction.of(arena)(amax)  # type: ignore[misc]
    assert amax[FORWARD].tolist() == [1, 1, 3, 3] and amax[GRADIENT].tolist() == [1, 3, 3, 1]


# --- slots that share a scale


@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_who_leaves_a_union_neither_moves_nor_is_moved(leaver):
    arena, TOP = Arena(CPU), E4M3_MAX / 4
    slots = list(arena.take(FORWARD, 3))
    arena.configure(FORWARD, slots, DelayedScaling(amax_history_len=2, margin=2))
    arena.unite(FORWARD, slots)
    gone = slots.pop(leaver)
    arena.give_back(FORWARD, gone)
    (again,) = arena.take(FORWARD, 1)
    assert again == gone
    arena.configure(FORWARD, [again], DelayedScaling(amax_history_len=2, margin=2))

    def rolled(index: int, amax: float) -> list[float]:
        arena.amax[FORWARD, index] = amax
        arena.roll()
        return arena.scale[FORWARD, [again, *slots]].tolist()

    assert rolled(again, 2.0) == [TOP / 2, 0, 0]
    assert rolled(slots[0], 4.0) == [TOP / 2, TOP / 4, TOP / 4]
    assert rolled(slots[1], 8.0) == [TOP / 2, TOP / 8, TOP / 8]


# --- saved between a forward and its backward


@pytest.mark.parametrize("like_te", [False, True])
def test_what_is_saved_is_what_the_next_roll_leaves(like_te):
    """The roll drops an infinite amax that waits for it; with like_te, the amax enters the history."""
    model = nn.Linear(SIZE, SIZE)
    call = torch.compile(model, backend=te_fp8, options={"recipe": DelayedScaling(amax_history_len=4, like_te=like_te)})
    for x in (torch.randn(8, SIZE), torch.full((8, SIZE), torch.inf)):
        y = call(x)
        if x.isfinite().all():
            y.sum().backward()
    saved = te_dynamo.scale_state(model).state_dict()
    assert saved["input.amax_history"].isinf().any() == like_te
    assert all(v.isfinite().all() and v > 0 for k, v in saved.items() if k.endswith(".scale"))
    STATE.roll()
    rolled = te_dynamo.scale_state(model).state_dict()
    assert all(torch.equal(v, rolled[k]) for k, v in saved.items())
