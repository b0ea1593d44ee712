"""The scale state: the published definition of delayed scaling; then when slots are written, rolled, shared, kept and freed."""

from __future__ import annotations

import copy
import gc
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import te_dynamo
from te_dynamo.backend import observing, te_fp8
from te_dynamo.recipe import DelayedScaling
from te_dynamo.state import FORWARD, GRADIENT, STATE, Arena, Group
from te_dynamo.state.reduce import Reduction
from tests.numerics import sqnr
from tests.slots import CPU, ROLES, all_slots, history_of, index_of

FLOAT32_MAX = torch.finfo(torch.float32).max
FP8_MAX = (448.0, 57344.0)
SIZE = 16
pytestmark = pytest.mark.usefixtures("no_codegen")


# --- the definition: scale = fp8_max / (the largest of the last `length` amaxes)


def float32(value: float) -> float:
    """Rounds to float32. A quotient of two float32 is thus correctly rounded, since double has more than twice their digits."""
    return struct.unpack("f", struct.pack("f", value))[0] if value <= FLOAT32_MAX else FLOAT32_MAX


class Definition:
    """One tensor's delayed scaling as in TE's documentation, in Python floats."""

    def __init__(self, fp8_max: float, length: int) -> None:
        self.fp8_max, self.length = fp8_max, length
        self.amaxes: list[float] = []
        self.scale = 0.0

    def update(self, amax: float) -> None:
        if amax == 0:
            return  # nothing was recorded: neither history nor scale changes
        self.amaxes.append(amax)
        largest = max(self.amaxes[-self.length :])
        if largest != float("inf"):
            self.scale = float32(self.fp8_max / largest)

    def history(self) -> list[float]:
        """The history, newest last, without the entry that is being written."""
        return self.amaxes[1 - self.length :] if self.length > 1 else []


def arena_of(length: int, forward: int, gradient: int) -> Arena:
    """An arena with this many slots, numbered from 1, and TE's recipe: an infinite amax enters the history."""
    arena = Arena(CPU)
    for direction, count in ((FORWARD, forward), (GRADIENT, gradient)):
        arena.configure(direction, list(arena.take(direction, count)), DelayedScaling(amax_history_len=length, like_te=True))
        arena.scale[direction] = 0.0
    return arena


def ring(arena: Arena, direction: int, index: int) -> list[float]:
    """A slot's past amaxes, newest last."""
    return [a for a in history_of(arena, direction, index)[1:].tolist() if a != 0]


# Zero, subnormal, tiny, ordinary, huge, infinite.
AMAX = st.one_of(
    st.sampled_from([0.0, 2.0**-149, 2.0**-127, 448.0, FLOAT32_MAX, float("inf")]),
    st.floats(0.0, FLOAT32_MAX, width=32),
    st.floats(2.0**-10, 2.0**10, width=32),
)
STEPS = st.lists(st.tuples(AMAX, AMAX, AMAX, AMAX), min_size=1, max_size=24)


@given(STEPS, st.integers(2, 5))
@settings(max_examples=150, deadline=None)
def test_a_roll_is_the_published_update(steps, length):
    arena = arena_of(length, forward=2, gradient=2)
    slots = [(direction, i) for direction in (FORWARD, GRADIENT) for i in (1, 2)]
    definitions = [Definition(FP8_MAX[direction], length) for direction, _ in slots]
    for amaxes in steps:
        for slot, definition, amax in zip(slots, definitions, amaxes, strict=True):
            arena.amax[slot] = amax
            definition.update(amax)
        arena.roll()
        for slot, definition in zip(slots, definitions, strict=True):
            assert arena.scale[slot].item() == definition.scale
            assert ring(arena, *slot) == definition.history()
            assert arena.history[slot][arena.cursor[slot]] == 0
        assert not arena.amax.any()


@given(st.lists(st.lists(AMAX, min_size=1, max_size=3), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_what_is_recorded_between_two_rolls_counts_with_its_largest(steps):
    arena = arena_of(4, forward=4, gradient=3)
    together = Group(arena, ([1, 2], [1]), [])
    apart = Group(arena, ([4, 3], [3, 2]), [])  # not adjacent, as if another graph had made some of the slots
    definition = Definition(FP8_MAX[FORWARD], 4)
    for amaxes in steps:
        for amax in amaxes:
            together.record(FORWARD, torch.tensor([amax, amax / 2]))
            apart.record(FORWARD, torch.tensor([amax, amax / 2]))
            apart.record(GRADIENT, torch.tensor([amax, 1.0]))
        arena.roll()
        definition.update(max(amaxes))
        assert arena.scale[FORWARD, 1] == arena.scale[FORWARD, 4] == definition.scale
        assert ring(arena, FORWARD, 1) == ring(arena, FORWARD, 4) == ring(arena, GRADIENT, 3) == definition.history()
        assert torch.equal(apart.scales(FORWARD, snapshot=True), arena.scale[FORWARD, [4, 3]])


# --- models


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(SIZE, 2 * SIZE)
        self.down = nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


@torch.compiler.nested_compile_region
def region(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


HOW_BLOCKS_ARE_CALLED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda block, x: block(x),
    "checkpoint": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "region": region,
}


class Net(nn.Module):
    def __init__(self, how: str = "plain", blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = HOW_BLOCKS_ARE_CALLED[self.how](block, x)
        return x


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    STATE.roll()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, fullgraph: bool = True, dynamic: bool | None = None, **options: Any) -> Any:
    return torch.compile(model, backend=te_fp8, fullgraph=fullgraph, dynamic=dynamic, options={"recipe": "delayed", **options})


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def amaxes(weight: Tensor, role: str, ordinal: int = 0) -> list[float]:
    """The recorded amaxes of one tensor, one per step, newest last."""
    STATE.roll()
    return ring(STATE.arenas[CPU], ROLES[role], index_of(weight, role, ordinal))


def scale(weight: Tensor, role: str, ordinal: int = 0) -> float:
    STATE.roll()
    return STATE.arenas[CPU].scale[ROLES[role], index_of(weight, role, ordinal)].item()


def state_of(model: nn.Module) -> dict[str, tuple[float, list[float]]]:
    """The scale and amaxes of each tensor of a model's linears, by name."""
    return {f"{name}.{role}": (scale(m.weight, role), amaxes(m.weight, role)) for name, m in linears(model).items() for role in ROLES}


def slots_of(model: nn.Module) -> dict[Any, int]:
    ids = {id(p) for p in model.parameters()}
    return {key: index for key, index in all_slots().items() if key[0] in ids}


def batches(count: int, tokens: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(tokens, SIZE, generator=generator) for _ in range(2)) for _ in range(count)]  # type: ignore[misc]


def train(model: nn.Module, call: Any, steps: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Outputs and gradients of every step."""
    seen = []
    for x, dy in steps:
        x = x.clone().requires_grad_()
        model.zero_grad()
        y = call(x)
        y.backward(dy)
        seen += [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
    return seen


# --- what is recorded


@pytest.mark.inductor
def test_the_steps_follow_the_definition():
    model = nn.Linear(SIZE, SIZE)
    call = compiled(model, recipe=DelayedScaling(amax_history_len=4))
    tensors = {role: Definition(FP8_MAX[ROLES[role]] / unused, 4) for role, unused in (("input", 4), ("weight", 2), ("grad_output", 8))}
    for step, (x, dy) in enumerate(batches(9)):
        x, dy = (x * 0, dy) if step == 3 else (x, dy * 0) if step == 5 else (x / (step + 1) ** 2, dy)
        for role, tensor in (("input", x), ("weight", model.weight), ("grad_output", dy)):
            tensors[role].update(tensor.abs().max().item())
        train(model, call, [(x, dy)])
        for role, definition in tensors.items():
            assert scale(model.weight, role) == definition.scale
            assert amaxes(model.weight, role) == definition.history()
        with torch.no_grad():
            model.weight.mul_(0.9)


def test_the_first_scale_is_the_first_batch_s_and_later_ones_lag_a_step():
    model = nn.Linear(SIZE, SIZE, bias=False)
    call = compiled(model)
    (x, dy), _ = batches(2)
    first = call(x)
    first.backward(dy)
    assert sqnr(model(x), first) > 25
    STATE.roll()
    second = call(64 * x)  # saturates: the scale is the first batch's
    assert sqnr(model(64 * x), second) < 10
    STATE.roll()
    assert sqnr(model(64 * x), call(64 * x)) > 25


def test_a_second_use_in_the_first_step_is_scaled_by_its_own_batch():
    """A weight that multiplies the identity matrix, then activations (DoRA), in separate graphs: neither saturates."""
    model = nn.Linear(SIZE, SIZE, bias=False)
    uses = [compiled(model), torch.compile(lambda x: model(x) * 2, backend=te_fp8)]
    (x, dy), _ = batches(2)
    small, large = uses[0](torch.eye(SIZE)), uses[1](64 * x)
    assert sqnr(model(torch.eye(SIZE)), small) > 25
    assert sqnr(model(64 * x) * 2, large) > 25
    (small.sum() + (large * dy).sum()).backward()
    assert amaxes(model.weight, "input") == [1.0, 64 * x.abs().max().item()]
    assert sqnr(model(64 * x) * 2, uses[1](64 * x)) > 25  # by a scale that is set


@pytest.mark.inductor
def test_an_infinite_amax_is_not_recorded_and_a_nan_does_not_count():
    model = nn.Linear(SIZE, SIZE)
    call = compiled(model)
    (x, dy), (bad, bad_dy) = batches(2)
    train(model, call, [(x, dy)])
    bad[0, 0], bad_dy[0, 0] = torch.inf, torch.nan
    train(model, call, [(bad, bad_dy)])
    assert amaxes(model.weight, "input") == [x.abs().max().item()]
    assert amaxes(model.weight, "grad_output") == [dy.abs().max().item(), bad_dy.nan_to_num(0.0).abs().max().item()]


@pytest.mark.parametrize("mode", ["eval with grad", "no_grad", "inference_mode", "eval without grad"])
def test_only_training_with_grad_records(mode):
    model = Net()
    call = compiled(model)
    (x, dy), _ = batches(2)
    train(model, call, [(x, dy)])
    before = state_of(model)
    model.train("eval" not in mode)
    guard = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "eval without grad": torch.no_grad}.get(mode)
    if guard is None:
        call((100 * x).requires_grad_()).backward(100 * dy)
    else:
        with guard():
            call(100 * x)
    assert state_of(model) == before
    model.train()
    train(model, call, [(x, dy)])
    assert state_of(model) != before


def test_what_was_recorded_counts_from_the_end_of_the_backward():
    model = Net()
    call = compiled(model)
    train(model, call, batches(2))
    weight, arena = model.blocks[0].up.weight, STATE.arenas[CPU]
    assert len(ring(arena, FORWARD, index_of(weight, "input"))) == len(ring(arena, GRADIENT, index_of(weight, "grad_output"))) == 2
    assert not arena.amax.any()


@pytest.mark.parametrize("mode", ["train", "eval with grad", "no_grad", "inference_mode"])
def test_a_forward_without_a_backward_counts_from_the_next_forward_that_records(mode):
    """As in TE, whose forward slots roll with every forward."""
    model = Net()
    call = compiled(model)
    train(model, call, batches(2))
    weight, arena = model.blocks[0].up.weight, STATE.arenas[CPU]
    for _ in range(3):
        call(batches(1)[0][0])
    assert len(ring(arena, FORWARD, index_of(weight, "input"))) == 4
    model.train("eval" not in mode)
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)():
        call(batches(1)[0][0])
    assert len(ring(arena, FORWARD, index_of(weight, "input"))) == (5 if mode == "train" else 4)
    model.train()
    call(batches(1)[0][0])
    assert len(ring(arena, FORWARD, index_of(weight, "input"))) == (6 if mode == "train" else 5)
    STATE.roll()
    assert not arena.amax.any()
    model.train()
    train(model, call, batches(2))
    assert len(amaxes(weight, "grad_output")) == 4


def test_eval_before_any_training_leaves_no_scale_behind():
    model = Net().eval()
    call = compiled(model)
    (x, _), _ = batches(2)
    assert sqnr(model(x), call(x)) > 22
    with torch.no_grad():
        assert sqnr(model(x), call(x)) > 22
    assert not any(value for value, _ in state_of(model).values())


@pytest.mark.parametrize("how", ["autograd.grad", "backward(inputs=)"])
def test_every_form_of_backward_records_gradients(how):
    model = Net()
    call = compiled(model)
    steps = batches(3)
    for x, dy in steps:
        x = x.clone().requires_grad_()
        if how == "autograd.grad":
            torch.autograd.grad(call(x), [x], dy)
        else:
            call(x).backward(dy, inputs=[x])
    last = model.blocks[-1].down.weight
    assert amaxes(last, "grad_output") == [dy.abs().max().item() for _, dy in steps]
    assert all(len(history) == 3 for _, history in state_of(model).values())


def test_an_output_that_is_not_used_records_its_input_only():
    model = Net()
    call = compiled(model)
    (x, dy), _ = batches(2)
    call(x)
    train(model, call, [(x, dy)])
    weight = model.blocks[0].up.weight
    assert len(amaxes(weight, "input")) == 2
    assert len(amaxes(weight, "grad_output")) == 1


def test_gradient_accumulation_rolls_with_every_microbatch():
    model = nn.Linear(SIZE, SIZE)
    call = compiled(model)
    steps = batches(4)
    for x, dy in steps:
        call(x).backward(dy)
    assert amaxes(model.weight, "input") == [x.abs().max().item() for x, _ in steps]
    assert amaxes(model.weight, "grad_output") == [dy.abs().max().item() for _, dy in steps]
    exact = sum(dy.t() @ x for x, dy in steps)
    assert sqnr(exact, model.weight.grad) > 15


@pytest.mark.inductor
def test_two_calls_before_one_backward():
    """The second call rolls and gets another scale; the first call's backward still uses that of its own forward."""
    model = nn.Linear(SIZE, SIZE)
    call = compiled(model, recipe=DelayedScaling(amax_history_len=2))
    (x, dy), (other, _) = batches(2)
    train(model, call, [(100 * x, dy), (x, dy)])
    model.zero_grad()
    first = call(x)
    before = STATE.arenas[CPU].scale[FORWARD, index_of(model.weight, "input")].item()
    second = call(other)
    assert STATE.arenas[CPU].scale[FORWARD, index_of(model.weight, "input")].item() == pytest.approx(100 * before)
    (first * dy / 2 + second * dy).sum().backward()
    assert sqnr(dy.t() @ (x / 2 + other), model.weight.grad) > 20
    assert sqnr(1.5 * dy.sum(0), model.bias.grad) > 60
    STATE.roll()
    assert amaxes(model.weight, "input") == [other.abs().max().item()]
    assert amaxes(model.weight, "grad_output") == [dy.abs().max().item()]


@pytest.mark.inductor
@torch._functorch.config.patch(donated_buffer=False)  # else Inductor rejects `retain_graph`
def test_a_graph_that_is_kept_runs_backward_twice():
    model = Net()
    call = compiled(model)
    train(model, call, batches(2))
    (x, dy), _ = batches(2)
    x = x.clone().requires_grad_()
    y = call(x)
    model.zero_grad()
    y.backward(dy, retain_graph=True)
    once = [x.grad.clone(), *(p.grad.clone() for p in model.parameters())]
    y.backward(dy)
    for a, b in zip(once, [x.grad, *(p.grad for p in model.parameters())], strict=True):
        torch.testing.assert_close(2 * a, b)
    assert len(amaxes(model.blocks[0].up.weight, "input")) == 3
    assert len(amaxes(model.blocks[0].up.weight, "grad_output")) == 4  # as in TE, every backward is one


# --- whose state it is: the same, however the model is compiled and called


def call_of(model: nn.Module, way: str, **options: Any) -> Any:
    """A callable for the model, compiled whole, or each block by itself."""
    if not way.startswith("each block"):
        return compiled(model, fullgraph=model.how != "reentrant", **options)  # type: ignore[arg-type]
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend=te_fp8, fullgraph=True, options={"recipe": "delayed", **options})
    return model


WAYS = {
    "checkpoint in the graph": "checkpoint",
    "each block": "plain",
    "each block, checkpoint around": "checkpoint",
    "nested region": "region",
}
REGIONS = ("checkpoint in the graph", "nested region")  # sub-graphs, which Inductor takes apart


@pytest.mark.parametrize("way", [pytest.param(w, marks=pytest.mark.inductor) if w in REGIONS else w for w in WAYS])
def test_numbers_and_state_do_not_depend_on_how_a_model_is_compiled(way):
    plain, model = Net(), Net(WAYS[way])
    model.load_state_dict(plain.state_dict())
    alike = {"memory": "speed"}  # by default an activation's inputs are rounded, but not if a checkpoint decides what is kept
    expected = train(plain, compiled(plain, **alike), batches(4))
    got = train(model, call_of(model, way, **alike), batches(4))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)
    assert state_of(model) == state_of(plain)
    assert len(slots_of(model)) == len(slots_of(plain)) == 3 * len(linears(plain))


@pytest.mark.parametrize("way", ["whole", "each block"])
def test_a_reentrant_checkpoint_records_in_its_recomputation(way):
    """Its first pass runs without grad, so weights are scaled by their own amax: results are only equal up to FP8's error."""
    plain, model = Net(), Net("reentrant")
    model.load_state_dict(plain.state_dict())
    steps = batches(4)
    expected = train(plain, compiled(plain), steps)
    got = train(model, call_of(model, way), steps)
    for a, b in zip(expected, got, strict=True):
        assert sqnr(a, b) > 10
    for name, (_, history) in state_of(plain).items():
        assert state_of(model)[name][1] == pytest.approx(history, rel=0.15), name
    assert amaxes(model.blocks[0].up.weight, "input") == [x.abs().max().item() for x, _ in steps]


@pytest.mark.parametrize("calls", [1, 5])
@pytest.mark.parametrize("provider", ["native", "reference"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("between", [False, True])
def test_what_a_checkpoint_recomputes_is_what_forward_computed(mode, provider, calls, between):
    """Bitwise, also in calibrating steps, however often a block is called in a step, and also if other backwards end in between: another
    model's, as in a GAN, or those of several losses."""
    block, other = getattr(Block(), mode)(), compiled(Block(), provider=provider)
    run = torch.compile(block, backend=te_fp8, fullgraph=True, options={"recipe": "delayed", "provider": provider})
    made: list[Tensor] = []

    def remembered(x: Tensor) -> Tensor:
        y = run(x)
        made.append(y.detach().clone())
        return y

    for step in range(3):
        x = torch.randn(calls, SIZE, SIZE, requires_grad=True)
        with set_checkpoint_early_stop(False):
            y = [checkpoint(remembered, 10**step * (1 + i) * x[i], use_reentrant=False) for i in range(calls)]
            if between:
                other(y[0].detach()).sum().backward()
                for loss in y:
                    loss.square().sum().backward()
            else:
                sum(y).square().sum().backward()
        forward, recomputed = made[:calls], made[calls:]
        assert len(recomputed) == calls
        found = [any(torch.equal(a, b) for b in recomputed) for a in forward]
        assert all(found), (step, found)
        made.clear()
    if mode == "train":  # scales have moved with what is ten times as large
        assert scale(block.up.weight, "input") < 448 / 30


@pytest.mark.parametrize("provider", ["native", "reference"])
def test_a_checkpoint_of_two_parts_is_recomputed_for_each_part_s_loss(provider):
    parts, made = [compiled(Block(), provider=provider) for _ in range(2)], []

    def both(x: Tensor) -> list[Tensor]:
        made.append([part(x) for part in parts])
        return made[-1]

    for step in range(3):
        made.clear()
        with set_checkpoint_early_stop(False):
            for y in checkpoint(both, (10**step * torch.randn(SIZE, SIZE)).requires_grad_(), use_reentrant=False):
                y.square().sum().backward()
        assert len(made) == 3 and all(torch.equal(a, b) for again in made[1:] for a, b in zip(made[0], again, strict=True))


@pytest.mark.parametrize("provider", ["native", "reference"])
@pytest.mark.parametrize("nested", [False, True])
def test_checkpoints_are_recomputed_in_any_order_and_inside_others(nested, provider):
    """Each has its own backward, the last call first; what is nested is recomputed twice in it."""
    run, made = torch.compile(Block(), backend=te_fp8, fullgraph=True, options={"recipe": "delayed", "provider": provider}), []

    def remembered(x: Tensor) -> Tensor:
        made.append(run(x))
        return made[-1]

    def called(x: Tensor) -> Tensor:
        return checkpoint(remembered, x, use_reentrant=False) if nested else remembered(x)

    for step in range(3):
        made.clear()
        x = torch.randn(3, SIZE, SIZE, requires_grad=True)
        with set_checkpoint_early_stop(False):
            y = [checkpoint(called, 10**step * (1 + i) * x[i], use_reentrant=False) for i in range(3)]
            for one in y if nested else reversed(y):
                one.square().sum().backward()
        assert len(made) == (9 if nested else 6)
        assert all(any(torch.equal(a, b) for b in made[3:]) for a in made[:3]), step


def test_an_optimizer_s_step_ends_the_wait_for_a_recomputation():
    """A result that lives until the next step replaces it, with a graph that is kept, would otherwise keep the scales where they are."""
    block = Block()
    run, optimizer, found = compiled(block, recipe=DelayedScaling(margin=2)), torch.optim.SGD(block.parameters(), 1e-3), []
    inputs = [(1 + step) * torch.ones(SIZE, SIZE) for step in range(4)]
    for x in inputs:
        y = checkpoint(run, x.requires_grad_(), use_reentrant=False)
        found.append(STATE.arenas[CPU].scale[FORWARD, index_of(block.up.weight, "input")].item())
        y.square().mean().backward(retain_graph=True)
        optimizer.step()
    assert found == [0.0, *[float32(448 / 4 / (1 + step)) for step in range(3)]]


@pytest.mark.parametrize("provider", ["native", "reference"])
def test_a_checkpoint_after_a_reset_and_recomputed_twice(provider):
    """Scales that a reset unset are computed anew, and `retain_graph` lets one forward be recomputed by the same scales again."""
    block, x = Block(), torch.randn(SIZE, SIZE, requires_grad=True)
    run = compiled(block, provider=provider)
    for step in range(4):
        if step == 2:
            te_dynamo.scale_state(block).reset()
        y = checkpoint(run, x, use_reentrant=False).square().sum()
        (first,) = torch.autograd.grad(y, x, retain_graph=True)
        (second,) = torch.autograd.grad(y, x)
        assert first.isfinite().all() and sqnr(first, second) > 20


@pytest.mark.inductor
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("provider", ["native", "reference"])
def test_dropout_in_a_checkpoint_is_drawn_again_alike(provider, reentrant, dynamic):
    """Also in the calibrating step, whose graph is not compiled by Inductor."""
    model = nn.Sequential(nn.Linear(32, 48), nn.Dropout(0.5))
    run = torch.compile(model, backend=te_fp8, fullgraph=True, dynamic=dynamic, options={"recipe": "delayed", "provider": provider})
    for _ in range(3):
        model.zero_grad()
        y = checkpoint(run, torch.randn(64, 32, requires_grad=True), use_reentrant=reentrant)
        y.sum().backward()
        torch.testing.assert_close(model[0].bias.grad, 2.0 * (y != 0).sum(0).float())


def test_one_graph_serves_every_layer_with_state_of_its_own():
    model = Net(blocks=3)
    call = call_of(model, "each block")
    graphs: list[Any] = []
    with observing(lambda gm, sites, options: graphs.append(gm)):
        train(model, call, batches(2))
    assert len(graphs) == 1
    ups = [block.up.weight for block in model.blocks]
    assert len({index_of(w, "input") for w in ups}) == 3
    assert len({scale(w, "input") for w in ups}) == 3


def test_a_deep_copy_starts_fresh():
    model = Net()
    train(model, compiled(model), batches(2))
    before = state_of(model)
    twin = copy.deepcopy(model)
    assert not slots_of(twin)
    call = compiled(twin)
    (x, dy), _ = batches(2)
    train(twin, call, [(100 * x, dy)])
    assert amaxes(twin.blocks[0].up.weight, "input") == [(100 * x).abs().max().item()]
    assert state_of(model) == before


def test_a_tied_weight_has_a_slot_for_each_use():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(SIZE, SIZE, bias=False), nn.Linear(SIZE, SIZE, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(50 * self.first(x))

    model = Tied()
    reference = copy.deepcopy(model)
    call = compiled(model)
    steps = batches(3)
    got, expected = train(model, call, steps), train(reference, reference, steps)
    assert all(sqnr(a, b) > 14 for a, b in zip(expected[-3:], got[-3:], strict=True))
    weight = model.first.weight
    assert amaxes(weight, "input", 0) == [x.abs().max().item() for x, _ in steps]
    assert amaxes(weight, "grad_output", 1) == [dy.abs().max().item() for _, dy in steps]
    assert amaxes(weight, "weight", 0) == amaxes(weight, "weight", 1)
    assert amaxes(weight, "input", 1) > amaxes(weight, "input", 0)


# --- slots are kept, and freed


@pytest.mark.parametrize("event", ["another length", "dynamic", "reset", "another graph"])
def test_slots_are_kept_when_a_model_is_compiled_again(event):
    model = Net()
    graphs: list[Any] = []
    with observing(lambda gm, sites, options: graphs.append(gm)):
        call = compiled(model, dynamic=True if event == "dynamic" else None)
        train(model, call, batches(2))
        kept = slots_of(model)
        if event == "reset":
            torch._dynamo.reset()
        if event == "another graph":
            call = compiled(model, short_sequence=1)
        for tokens in (8, 5, 13):
            train(model, call, batches(1, tokens))
    assert slots_of(model) == kept
    assert all(len(history) == 5 for _, history in state_of(model).values())
    assert len(graphs) == (1 if event == "dynamic" else 2 if event == "another length" else 3)


def test_parts_of_a_model_that_were_compiled_before_keep_their_slots():
    """A group of slots that are not adjacent: the second block's were made first."""
    plain, model = Net(), Net()
    model.load_state_dict(plain.state_dict())
    expected = train(plain, compiled(plain), batches(4))
    x, dy = batches(1)[0]
    with torch.no_grad():
        inner = model.blocks[0](x)
    train(model.blocks[1], compiled(model.blocks[1]), [(inner, dy)])
    torch._dynamo.reset()
    got = train(model, compiled(model), batches(4))
    for a, b in zip(expected[-2:], got[-2:], strict=True):
        assert sqnr(a, b) > 14
    for name, (_, history) in state_of(model).items():
        assert len(history) == (5 if name.startswith("blocks.1") else 4), name


def test_slots_are_given_back_when_a_model_dies():
    def a_short_life() -> tuple[set[int], Tensor]:
        model = Net()
        train(model, compiled(model), batches(2))
        return set(slots_of(model).values()), STATE.arenas[CPU].used  # type: ignore[return-value]

    def collected(value: Any) -> Any:
        torch._dynamo.reset()
        gc.collect()
        return value

    collected(None)
    before = all_slots()
    collected(a_short_life())
    assert all_slots() == before
    used = list(STATE.arenas[CPU].used)
    for _ in range(3):
        collected(a_short_life())
    assert list(STATE.arenas[CPU].used) == used, "indices are not used again"


def test_a_slot_that_is_used_again_starts_unset():
    arena = Arena(CPU)
    slots = arena.take(FORWARD, 3)
    arena.configure(FORWARD, list(slots), DelayedScaling(amax_history_len=4, like_te=True))
    arena.amax[FORWARD, 1:4] = 7.0
    arena.roll()
    arena.amax[FORWARD, 1:4] = 9.0
    for slot in slots:
        arena.give_back(FORWARD, slot)
    assert arena.take(FORWARD, 2) == slots[:2]
    arena.roll()
    assert arena.scale[FORWARD, 1:3].tolist() == [0.0, 0.0]
    assert not arena.history[FORWARD, 1:3].any() and not arena.cursor[FORWARD, 1:3].any()
    assert arena.take(FORWARD, 2) == range(4, 6)  # not adjacent to the one that is left
    assert arena.take(FORWARD, 1) == range(3, 4)


@pytest.mark.parametrize("provider", ["native", "reference"])
def test_a_layer_that_takes_a_dead_one_s_place_starts_fresh(provider):
    """One graph, with one instance after another, until Python has reused a dead weight's address three times."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    graphs: list[Any] = []
    addresses: list[int] = []
    with observing(lambda gm, sites, options: graphs.append(gm)):
        for i in range(40):
            layer = Layer()
            addresses.append(id(layer.linear.weight))
            layer.compile(backend=te_fp8, options={"recipe": "delayed", "provider": provider})
            power = 2.0 ** (i % 5 * 4 - 8)
            for x, dy in batches(2):
                y = layer(x * power)
                y.backward(dy)
                assert sqnr(layer.linear(x * power), y) > 20
            del layer, y
            gc.collect()
            if len(addresses) == len(set(addresses)) + 3:
                break
    assert len(graphs) == 1


def test_a_rank_whose_slots_are_all_gone_still_takes_part(monkeypatch):
    """Ranks collect garbage at different times, and a collective needs all of them."""
    buffers: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda buffer, op, group: buffers.append(buffer.clone()))
    arena, reduction, group = arena_of(4, forward=2, gradient=0), Reduction(), object()
    reduction.join(arena, FORWARD, [1, 2], group)
    for gone in ([], [1], [2]):
        reduction.join(arena, FORWARD, gone, None)
        arena.amax[FORWARD, 1:3] = 3.0
        arena.roll(reduction.of(arena))
    assert [buffer.tolist() for buffer in buffers] == [[0, 3, 3], [0, 0, 3], [0, 0, 0]]


def test_an_arena_grows_without_losing_what_was_recorded():
    count = Arena(CPU).capacity - 1
    arena = arena_of(4, forward=count, gradient=count)
    group = Group(arena, (range(1, count + 1), range(1, count + 1)), [])
    group.record(GRADIENT, torch.full((count,), 2.0))
    more = arena.take(GRADIENT, 1)
    arena.roll()
    assert arena.scale.shape[1] > count + 1 and more == range(count + 1, count + 2)
    assert arena.scale[GRADIENT, 1] == arena.scale[GRADIENT, count] == 57344.0 / 2
    assert arena.scale[GRADIENT, more].item() == 0
