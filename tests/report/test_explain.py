"""`te_dynamo.explain`: its reports are true, and it has no side effects."""

from __future__ import annotations

import copy
import gc
import json
import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

import te_dynamo
from te_dynamo import backend
from te_dynamo.backend import te_fp8
from te_dynamo.report.explain import ISOLATED, OUTSIDE, UNRECOGNIZED
from te_dynamo.sites import Site
from te_dynamo.state import STATE
from tests.slots import all_slots

LINEAR_FLOPS = 2 * 16 * 64 * 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)
        self.down = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.block = Block()
        self.head = nn.Linear(64, 128, bias=False)

    def forward(self, ids):
        return self.head(self.block(self.embedding(ids)))


pytestmark = pytest.mark.usefixtures("no_codegen")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def x():
    return torch.randn(16, 64)


def paths(report, kind=("linear", "norm_linear", "activation_linear"), taken=True) -> list[str]:
    return [s.path for s in report.sites if s.kind in kind and (s.provider is not None) == taken]


def site(report, path) -> Site:
    (found,) = [s for s in report.sites if s.path == path]
    return found


# -- what it tells


@pytest.mark.parametrize("backward", [False, True])
def test_all_is_taken(x, backward):
    report = te_dynamo.explain(Stack(), x, backward=backward)
    assert (report.graph_count, report.graph_break_count) == (1, 0)
    assert sorted(paths(report)) == ["layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up"]
    assert {s.provider for s in report.sites} == {"native"}
    assert {s.flops for s in report.sites} == {LINEAR_FLOPS}
    assert report.fp8_flop_fraction == 1
    # the first linear's input has no gradient
    assert report.counted_flops == LINEAR_FLOPS * (4 + 7 * backward)


def test_what_is_left_counts(x):
    report = te_dynamo.explain(Stack(), x, options={"skip": ["layers.0.*"]}, backward=True)
    assert sorted(paths(report)) == ["layers.1.down", "layers.1.up"]
    left = site(report, "layers.0.up")
    assert left.provider is None and "skip pattern" in left.reason and left.flops == LINEAR_FLOPS
    assert report.fp8_flop_fraction == 6 / 11


def test_each_reason_is_told(x):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.wide = nn.Linear(64, 64), nn.Linear(64, 64).double()
            self.register_buffer("table", torch.randn(64, 64))

        def forward(self, x):
            return self.wide(F.linear(self.good(x), self.table).double())

    report = te_dynamo.explain(Odd(), x)
    assert paths(report) == ["good"]
    assert "float64" in site(report, "wide").reason
    assert any("buffer" in (s.reason or "") for s in report.sites)
    assert report.fp8_flop_fraction == 0.5  # a buffer is not a weight


def test_a_product_that_no_rule_sees_counts(x):
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Parameter(torch.randn(4, 64, 64))

        def forward(self, x):
            return torch.einsum("abtk,bkn->abtn", self.a(x).view(2, 4, 2, 64), self.b)

    report = te_dynamo.explain(Bilinear(), x, backward=True)
    assert report.counted_flops == LINEAR_FLOPS * (2 + 3) and report.fp8_flops == LINEAR_FLOPS * 2
    (left,) = [s for s in report.sites if s.provider is None]
    assert left.flops == LINEAR_FLOPS and left.reason


def test_a_form_that_no_rule_knows_is_a_site(x):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            return torch.linalg.multi_dot([self.a(x), self.b])

    report = te_dynamo.explain(Chain(), x)
    (left,) = [s for s in report.sites if s.provider is None]
    assert left.reason == f"{UNRECOGNIZED} (linalg_multi_dot)" and left.flops == LINEAR_FLOPS
    assert report.fp8_flop_fraction == 0.5


def test_logits_do_not_count_unless_included():
    ids = torch.randint(0, 128, (2, 8))
    report = te_dynamo.explain(Language(), ids, backward=True)
    assert "logits" in site(report, "head").reason and site(report, "head").flops == 2 * LINEAR_FLOPS
    assert report.fp8_flop_fraction == 1
    assert report.counted_flops == LINEAR_FLOPS * 6
    assert "(forward and backward, without the logits)" in str(report)
    report = te_dynamo.explain(Language(), ids, backward=True, options={"include_logits": True})
    assert site(report, "head").provider and report.counted_flops == LINEAR_FLOPS * 12
    assert "without the logits" not in str(report)


def test_frozen_weights_and_no_grad(x):
    model = Block()
    model.up.requires_grad_(False)
    report = te_dynamo.explain(model, x, backward=True)
    assert report.counted_flops == LINEAR_FLOPS * (1 + 2)  # no gradient reaches the first, nor the input of the second
    with torch.no_grad():
        report = te_dynamo.explain(Block().eval(), x)
    assert report.fp8_flops == report.counted_flops == 2 * LINEAR_FLOPS


def test_attention_counts_only_in_fp8():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (4, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    x, linears, products = torch.randn(2, 8, 64), 4 * LINEAR_FLOPS, 2 * (2 * 2 * 4 * 8 * 8 * 16)
    high = te_dynamo.explain(Attention(), x)
    assert high.counted_flops == linears and high.fp8_flop_fraction == 1
    report = te_dynamo.explain(Attention(), x, options={"attention": "fp8_both"}, backward=True)
    assert report.fp8_flop_fraction == 1
    assert report.counted_flops == linears * 3 - 3 * LINEAR_FLOPS + products * 3
    (attention,) = [s for s in report.sites if s.kind == "attention"]
    assert attention.layout and attention.flops == products
    torch._dynamo.reset()
    forward_alone = te_dynamo.explain(Attention(), x, options={"attention": "fp8"}, backward=True)
    assert forward_alone.counted_flops - forward_alone.fp8_flops == 2 * products
    off = te_dynamo.explain(Attention(), x, options={"attention": "off"})
    assert paths(off, kind=("attention",)) == []


class CountFlops(TorchDispatchMode):
    """Counts FLOPs by operator, with torch's own formulas. (Under FlopCounterMode itself, Dynamo does not run its compiled code.)"""

    def __init__(self):
        super().__init__()
        self.flops = Counter()

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops[str(func)] += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.parametrize("options", [{}, {"skip": ["layers.1.up"]}], ids=["all", "one left"])
def test_agrees_with_what_is_seen_at_run_time(x, options):
    model = Stack()
    report = te_dynamo.explain(model, x, options=options, backward=True)
    compiled = torch.compile(model, backend=te_fp8, options=options)
    compiled(x).sum().backward()
    with CountFlops() as counter:
        compiled(x).sum().backward()
    assert sum(counter.flops.values()) == report.counted_flops
    assert sum(n for op, n in counter.flops.items() if "te_dynamo" in op) == report.fp8_flops > 0


# -- graph breaks, several graphs, regional compilation


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(64, 64)

    @torch._dynamo.disable
    def run_head(self, x):
        return self.head(x)

    def forward(self, x):
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        x = self.layers[1](x)
        return self.run_head(x)


def test_graph_breaks_and_what_runs_outside(x):
    report = te_dynamo.explain(Broken(), x, backward=True)
    assert (report.graph_count, report.graph_break_count) == (2, 2)
    assert any("graph_break" in reason for reason in report.graph_breaks)
    assert sorted(paths(report)) == ["layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up"]
    assert site(report, "head").reason == OUTSIDE and site(report, "head").flops == LINEAR_FLOPS
    assert report.fp8_flop_fraction == 11 / 14
    assert "graph break" in str(report)


def test_graphs_of_a_layer_that_breaks_are_told_for_each_layer(x):
    class Breaking(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Breaking(), Breaking()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    with torch.no_grad():
        report = te_dynamo.explain(Two(), x)
    assert report.graph_break_count >= 1
    assert sorted(paths(report)) == ["layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b"]
    assert report.counted_flops == report.fp8_flops == 4 * LINEAR_FLOPS


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_layers_compiled_one_by_one_have_absolute_paths(x, how):
    model = Stack()
    for i, layer in enumerate(model.layers):
        if how == "in place":
            layer.compile(backend="eager")
        else:
            model.layers[i] = torch.compile(layer, backend="eager")
    report = te_dynamo.explain(model, x.requires_grad_(), backward=True)
    assert report.graph_count == 1  # one graph for both layers
    assert sorted(paths(report)) == ["layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up"]
    assert report.counted_flops == report.fp8_flops == 12 * LINEAR_FLOPS
    assert x.grad is None


def test_a_break_in_a_loop_gives_up_the_function(x):
    class Loop(Stack):
        def forward(self, x):
            for layer in self.layers:
                x = layer.up(x)
                torch._dynamo.graph_break()
            return x

    report = te_dynamo.explain(Loop(), x)
    assert (report.graph_count, report.graph_break_count, report.fp8_flop_fraction) == (0, 1, 0)
    assert [s.path for s in report.sites] == ["layers.0.up", "layers.1.up"] and {s.reason for s in report.sites} == {OUTSIDE}
    assert report.notes


@pytest.mark.parametrize("how", ["checkpoint", "nested_compile_region"])
@pytest.mark.parametrize("skip", [[], ["*.up"]])
def test_sites_in_sub_graphs_are_told_for_each_layer(x, how, skip):
    """`nested_compile_region` makes one sub-graph for all layers with the same kind of inputs."""

    def run(layer, x):
        return layer(x)

    region = torch.compiler.nested_compile_region(run)

    class Nested(Stack):
        def __init__(self):
            super().__init__()
            self.layers.append(Block())

        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(run, layer, x, use_reentrant=False) if how == "checkpoint" else region(layer, x)
            return x

    report = te_dynamo.explain(Nested(), x.requires_grad_(), backward=True, options={"skip": skip})
    assert report.graph_count == 1
    assert sorted(s.path for s in report.sites) == [f"layers.{i}.{name}" for i in range(3) for name in ("down", "up")]
    assert {s.flops for s in report.sites} == {LINEAR_FLOPS}
    assert report.counted_flops == 18 * LINEAR_FLOPS and report.fp8_flop_fraction == (0.5 if skip else 1)
    assert {s.path for s in report.sites if s.reason} == ({f"layers.{i}.up" for i in range(3)} if skip else set())


def test_a_layer_that_is_called_twice(x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Block()
            self.layer.compile()

        def forward(self, x):
            return self.layer(self.layer(x))

    report = te_dynamo.explain(Twice(), x.requires_grad_())
    assert sorted(paths(report)) == ["layer.down", "layer.up"]
    assert {s.flops for s in report.sites} == {2 * LINEAR_FLOPS} and report.counted_flops == 4 * LINEAR_FLOPS


def test_wrappers_are_not_in_paths(x):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Stack()
    model.layers[1] = checkpoint_wrapper(model.layers[1])
    report = te_dynamo.explain(torch.compile(model), x, backward=True)
    assert sorted(paths(report)) == ["layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up"]
    assert report.fp8_flop_fraction == 1

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Block()

        def forward(self, x):
            return self.module(x)

    holder = Holder()
    assert sorted(paths(te_dynamo.explain(holder, x))) == ["module.down", "module.up"]  # the user's own name


def test_raw_and_tied_weights(x):
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(64, 64))
            self.one = nn.Linear(64, 64)
            self.two = nn.Linear(64, 64)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x @ self.matrix))

    model = Raw()
    assert sorted(paths(te_dynamo.explain(model, x, backward=True))) == ["matrix", "one", "two"]
    assert model.two.weight is model.one.weight


# -- modules of torch.nn, compiled in place


@pytest.mark.parametrize("module", [lambda: nn.Sequential(Block()), lambda: nn.Linear(64, 64)], ids=["Sequential", "Linear"])
def test_modules_of_torch_themselves(x, module):
    assert te_dynamo.explain(module(), x).fp8_flop_fraction == 1
    model = nn.Sequential(nn.Linear(64, 64)) if isinstance(module(), nn.Sequential) else module()
    model.compile(backend=te_fp8)
    report = te_dynamo.explain(model, x)
    assert report.counted_flops == LINEAR_FLOPS
    if report.graph_count:  # in torch 2.14
        assert report.fp8_flop_fraction == 1 and not report.notes
        return
    assert report.fp8_flop_fraction == 0
    assert "torch.compile(module" in report.notes[0] and report.notes[0] in str(report)
    assert [s.reason for s in report.sites] == [OUTSIDE]


def test_nothing_to_compile(x):
    class Eager(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)

        @torch._dynamo.disable
        def forward(self, x):
            return self.a(x)

    report = te_dynamo.explain(Eager(), x)
    assert report.graph_count == 0 and report.notes and report.fp8_flop_fraction == 0
    report = te_dynamo.explain(nn.ReLU(), x)
    assert (report.graph_count, report.sites, report.fp8_flop_fraction) == (1, (), 0)


# -- its forms


def test_forms(x):
    report = te_dynamo.explain(Stack(), x, options={"skip": ["layers.0.up"]})
    told = json.loads(json.dumps(report.to_dict()))
    assert told["graph_count"] == 1 and told["fp8_flop_fraction"] == 0.75
    assert {s["path"] for s in told["sites"]} == {"layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"}
    text, markdown = str(report), report.to_markdown()
    for form in (text, markdown):
        assert "75.0%" in form and "layers.*.down" in form and "layers.0.up" in form and "skip pattern" in form
    assert text.count("layers.*.down") == 1 and "| --- |" in markdown


def test_arguments_are_checked(x):
    with pytest.raises(ValueError, match="recipe"):
        te_dynamo.explain(Block(), x, options={"recipes": "current"})
    with pytest.raises(TypeError, match="nn.Module"):
        te_dynamo.explain(lambda x: x, x)
    with pytest.raises(ValueError, match="requires grad"):
        te_dynamo.explain(nn.ReLU(), x, backward=True)
    with pytest.raises(TypeError, match="positional"):
        te_dynamo.explain(Block(), x, x)


# -- nothing could be taken


def test_nothing_taken_is_one_warning(x):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).double()
    with pytest.warns(UserWarning, match="nothing in this graph could be computed in FP8.*float64") as caught:
        torch.compile(model, backend=te_fp8)(x.double())
    assert len([w for w in caught if "te_fp8" in str(w.message)]) == 1
    with pytest.warns(UserWarning, match="2 sites"):
        report = te_dynamo.explain(model, x.double())
    assert report.fp8_flop_fraction == 0 and report.counted_flops == 2 * LINEAR_FLOPS


def test_strict_raises(x):
    model = nn.Sequential(nn.Linear(64, 64)).double()
    with pytest.raises(Exception, match="nothing in this graph could be computed in FP8.*float64"):
        te_dynamo.explain(model, x.double(), options={"strict": True})
    assert all(type(p) is nn.Parameter and p.dtype == torch.float64 for p in model.parameters())


def test_skip_all_is_silent(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = te_dynamo.explain(Stack(), x, options={"skip": ["*"]}, backward=True)
    assert report.fp8_flop_fraction == 0 and report.counted_flops == 11 * LINEAR_FLOPS


# -- it leaves no trace


def tensors_of(model) -> dict[str, tuple]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (id(t), t._version, t.detach().clone(), id(t.grad), None if t.grad is None else t.grad.clone()) for name, t in named}


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name in before:
        for a, b in zip(before[name], after[name], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


@pytest.mark.inductor
def test_with_inductor(x):
    model = Stack()
    before = tensors_of(model)
    report = te_dynamo.explain(model, x, backward=True)
    assert report.graph_count == report.fp8_flop_fraction == 1
    assert_same(before, tensors_of(model))


@pytest.mark.parametrize("gradients", [False, True])
def test_model_is_as_it_was(x, gradients):
    model = Stack()
    if gradients:
        model(x).sum().backward()
    hooked = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: hooked.append(p))
    x.requires_grad_()
    before, mode = tensors_of(model), [m.training for m in model.modules()]
    attributes = [dict(vars(m)) for m in model.modules()]
    te_dynamo.explain(model, x, backward=True)
    assert_same(before, tensors_of(model))
    assert [m.training for m in model.modules()] == mode and x.grad is None and not hooked
    assert all(vars(m) == a for m, a in zip(model.modules(), attributes, strict=True))


def test_a_model_that_writes_is_as_it_was(x):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.calls = 0
            self.register_buffer("moved", torch.zeros(64))
            self.register_buffer("seen", torch.zeros(64))

        def forward(self, x):
            self.calls += 1
            self.last = x
            with torch.no_grad():
                self.a.weight.mul_(0.5)
                self.moved = self.moved + 1
                self.seen.add_(1)
                x.add_(1)
                torch._dynamo.graph_break()
                self.a.bias.mul_(0.5)
            return self.outside(self.a(x))

        @torch._dynamo.disable
        def outside(self, x):
            with torch.no_grad():
                self.a.bias.add_(1)
                self.a.bias.data.zero_()
            return x * 2

    model, input_before = Writes(), x.clone()
    values = {k: v.clone() for k, v in model.state_dict().items()}
    te_dynamo.explain(model, x, backward=True)
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert model.calls == 0 and not hasattr(model, "last") and torch.equal(x, input_before)


def test_an_rnn_whose_weights_are_in_a_list_too(x):
    model = nn.LSTM(64, 64)
    before = tensors_of(model)
    te_dynamo.explain(model, x.unsqueeze(0), backward=True)
    assert_same(before, tensors_of(model))


def test_a_pending_backward_is_as_it_was(x):
    model = Stack()
    reference = copy.deepcopy(model)
    pending = model(x)
    te_dynamo.explain(model, x, backward=True)
    pending.sum().backward()
    reference(x).sum().backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_random_states_are_as_they_were(x):
    class Noisy(Stack):
        def forward(self, x):
            x = F.dropout(super().forward(x), 0.5) * random.random() * np.random.rand()
            return x + torch.randn_like(x)

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    model = Noisy()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    te_dynamo.explain(model, x, backward=True)
    assert draw() == expected


def scale_state() -> dict:
    gc.collect()  # what other tests left behind
    rows = {}
    for device, arena in STATE.arenas.items():
        n = max(arena.used)
        tensors = (arena.scale, arena.amax, arena.history, arena.cursor)
        rows[device] = (id(arena), tuple(arena.used), [t.data_ptr() for t in tensors], [t[:, :n].tolist() for t in tensors])
    return {
        "arenas": rows,
        "slots": all_slots(),
        "watched": set(STATE.homes.watched),
        "visited": set(STATE.visited),
        "backward": STATE.backward_seen,
        "version": STATE.version,
    }


@pytest.mark.parametrize("trained", [False, True])
def test_scale_state_is_as_it_was(x, trained):
    model = Stack()
    compiled = torch.compile(model, backend=te_fp8)
    if trained:
        for _ in range(2):
            compiled(x).sum().backward()
    before = scale_state()
    te_dynamo.explain(model, 100 * x, backward=True)
    with torch.no_grad():
        te_dynamo.explain(model.eval(), 100 * x)
    assert scale_state() == before


def test_training_goes_on_as_if_nothing_had_been(x):
    def train(explained: bool) -> list[torch.Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Stack()
        compiled = torch.compile(model, backend=te_fp8)
        for step in range(4):
            out = compiled(x + step)
            if explained and step == 1:
                te_dynamo.explain(model, 100 * x, backward=True)  # between a forward and its backward
            out.square().sum().backward()
            if explained and step == 2:
                te_dynamo.explain(compiled, 100 * x, backward=True)
            with torch.no_grad():
                for p in model.parameters():
                    p -= 1e-3 * p.grad
                    p.grad = None
        return [out.detach(), *[p.detach() for p in model.parameters()], *model.buffers()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "torch before 2.13"])
def test_the_users_code_is_as_it_was(x, isolated, monkeypatch):
    if not isolated:
        monkeypatch.setattr("te_dynamo.report.explain.ISOLATED", {})
    elif not ISOLATED:
        pytest.skip("this torch has no isolate_recompiles")
    compiles = []

    def his(gm, inputs):
        compiles.append(gm)
        return gm.forward

    model = Stack()
    compiled = torch.compile(model, backend=his, dynamic=False)
    compiled(x)
    with torch._dynamo.config.patch(recompile_limit=3):
        reports = [te_dynamo.explain(model, torch.randn(n, 64)) for n in range(9, 13)]
        assert {r.graph_count for r in reports} == {1} and {r.fp8_flop_fraction for r in reports} == {1}
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(x)
        assert len(compiles) == 1
        for n in (17, 18):  # and the recompile limit is still the user's
            compiled(torch.randn(n, 64))
    assert len(compiles) == 3


def test_shapes_that_explain_saw_make_nothing_dynamic(x):
    shapes = []

    def his(gm, inputs):
        shapes.extend(tuple(t.shape) for t in inputs if isinstance(t, torch.Tensor) and not isinstance(t, nn.Parameter) and t.dim() == 2)
        return gm.forward

    model = Block()
    te_dynamo.explain(model, x)
    torch.compile(model, backend=his)(torch.randn(24, 64))
    assert shapes == [(24, 64)] and all(type(n) is int for s in shapes for n in s)


def test_after_a_compile_with_other_options(x):
    model = Stack()
    model.compile(backend=te_fp8, options={"skip": ["layers.0.*"]})
    expected = model(x)
    counted = {k: dict(v) for k, v in torch._dynamo.utils.counters.items()}
    report = te_dynamo.explain(model, x, options={"recipe": "current", "skip": ["layers.1.*"]}, backward=True)
    assert sorted(paths(report)) == ["layers.0.down", "layers.0.up"]
    assert {s.recipe for s in report.sites if s.provider} == {"current"}
    assert sorted(paths(te_dynamo.explain(model, x))) == ["layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up"]
    assert {k: dict(v) for k, v in torch._dynamo.utils.counters.items()} == counted
    with torch.compiler.set_stance("fail_on_recompile"):
        assert model(x).shape == expected.shape


def test_under_the_users_stance(x):
    model = Stack()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"), torch._dynamo.config.patch(error_on_recompile=True):
        assert te_dynamo.explain(model, x).graph_count == 1
        compiled(x)


def test_all_is_restored_after_an_error(x):
    class Fails(Stack):
        def forward(self, x):
            torch.rand(3)
            super().forward(x)
            raise KeyError("his own")

    model = Fails()
    before, random_state = tensors_of(model), torch.get_rng_state()
    scales = scale_state()
    with pytest.raises(KeyError, match="his own"):
        te_dynamo.explain(model, x, backward=True)
    assert_same(before, tensors_of(model))
    assert torch.equal(torch.get_rng_state(), random_state) and scale_state() == scales and not backend.observers


# -- Hugging Face


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


LLAMA_LINEARS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_llama(llama, training, dtype):
    ids = torch.randint(0, 128, (2, 16))
    model, kwargs = llama.to(dtype).train(training), {"use_cache": False} | ({"labels": ids} if training else {})
    with torch.set_grad_enabled(training):
        report = te_dynamo.explain(model, input_ids=ids, backward=training, **kwargs)
    assert (report.graph_count, report.graph_break_count) == (1, 0)
    assert sorted(paths(report)) == sorted(f"model.layers.{i}.{name}" for i in range(2) for name in LLAMA_LINEARS)
    assert paths(report, taken=False) == ["lm_head"]
    assert set(paths(report)) <= {name for name, _ in model.named_modules()}
    assert report.fp8_flop_fraction >= 0.98
    attentions = [s for s in report.sites if s.kind == "attention"]
    assert [s.path for s in attentions] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(s.provider and s.layout for s in attentions)


def test_llama_under_autocast(llama):
    ids = torch.randint(0, 128, (2, 16))
    before = tensors_of(llama)
    with torch.autocast("cpu", torch.bfloat16):
        report = te_dynamo.explain(llama, input_ids=ids, labels=ids, use_cache=False, backward=True)
    assert report.graph_count == 1 and report.fp8_flop_fraction >= 0.98
    assert_same(before, tensors_of(llama))


def test_llama_in_layers(llama):
    """Like accelerate's regional compilation."""
    for layer in llama.model.layers:
        layer.compile(backend=te_fp8)
    ids = torch.randint(0, 128, (2, 16))
    report = te_dynamo.explain(llama, input_ids=ids, labels=ids, use_cache=False, backward=True)
    assert sorted(paths(report)) == sorted(f"model.layers.{i}.{name}" for i in range(2) for name in LLAMA_LINEARS)
    assert site(report, "lm_head").reason == OUTSIDE


def test_what_cannot_be_counted_is_told():
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.beside = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.beside(x) + torch.vmap(lambda row: torch.tanh(self.inside(row)))(x)

    report = te_dynamo.explain(Mapped(), torch.randn(16, 64))
    assert report.counted_flops == LINEAR_FLOPS
    (note,) = report.notes
    (left,) = [site for site in report.sites if site.provider is None]
    assert note.startswith("not among the FLOPs") and left.node in note and left.path == "inside"
