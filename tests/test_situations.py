"""Situations from public bug reports for compile backends: about a model's surroundings, rather than the model."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import te_dynamo
from te_dynamo.backend import te_fp8
from te_dynamo.recipe import DelayedScaling
from te_dynamo.runtime import compile_without_codegen
from te_dynamo.state import STATE
from te_dynamo.state.arena import Arena
from tests.matrix import thinned

pytestmark = pytest.mark.usefixtures("no_codegen")
SIZE = 64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def sqnr(truth: Tensor, other: Tensor) -> float:
    truth, other = truth.detach(), other.detach()
    return float(10 * torch.log10(truth.square().sum() / (truth - other).square().sum()))


def gradients(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    call(x).pow(2).mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# --- the default dtype


DEFAULTS = [torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize(("recipe", "dtype"), thinned(["delayed", "current", "rowwise", "block", "mxfp8", "nvfp4"], DEFAULTS))
def test_the_default_dtype_changes_nothing(recipe, dtype):
    assert all(torch.equal(a, b) for a, b in zip(steps(recipe, torch.float32), steps(recipe, dtype), strict=True))


@functools.cache
def steps(recipe: str, default: torch.dtype) -> list[Tensor]:
    """Gradients, an output in eval and the scale state, computed under a default dtype."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    net = Net()
    inputs = [torch.randn(32, SIZE) for _ in range(3)]
    torch.set_default_dtype(default)
    try:
        call = torch.compile(net, backend=te_fp8, options={"recipe": recipe, "provider": "reference"})
        found = [g for x in inputs for g in gradients(call, net, x)]
        state = te_dynamo.scale_state(net).state_dict()
        net.eval()
        with torch.no_grad():
            return [*found, call(inputs[0]), *state.values()]
    finally:
        torch.set_default_dtype(torch.float32)


# --- torch.func and forward mode


def transforms(model: Callable[[Tensor], Tensor], v: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "jvp": lambda x: torch.func.jvp(model, (x,), (v,))[1],
        "vjp": lambda x: torch.func.vjp(model, x)[1](v)[0],
        "grad": torch.func.grad(lambda x: (model(x) * v).sum()),
        "vmap": torch.func.vmap(model),
        "jacrev": lambda x: torch.func.jacrev(lambda t: model(t).sum(0))(x),
    }


@pytest.mark.parametrize("inside", [True, False], ids=["the transform is compiled", "the model is compiled"])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("name", ["jvp", "vjp", "grad", "vmap", "jacrev"])
def test_transforms_of_torch_func_are_inductor_s(name, trains, inside):
    model, x, v = Net().train(trains).requires_grad_(trains), torch.randn(16, SIZE), torch.randn(16, SIZE)
    expected = transforms(model, v)[name](x)
    if inside:
        with pytest.warns(UserWarning, match="inside a transform of torch.func.*Remedy: compile the model itself"):
            found = torch.compile(transforms(model, v)[name], backend=te_fp8)(x)
    else:
        found = transforms(torch.compile(model, backend=te_fp8), v)[name](x)
    torch.testing.assert_close(found, expected)


def test_what_is_beside_a_transform_is_taken():
    model, other, x = Net(), Net(), torch.randn(16, SIZE)
    run = torch.compile(lambda x: model(x) + torch.func.grad(lambda t: other(t).sum())(x), backend=te_fp8)
    found = run(x)
    assert te_dynamo.scale_state({"model": model}).state_dict() and not te_dynamo.scale_state({"other": other}).state_dict()
    assert sqnr(model(x) + torch.func.grad(lambda t: other(t).sum())(x), found) > 20


@pytest.mark.parametrize("trains", [True, False])
def test_forward_mode_derivatives_are_refused_not_dropped(trains):
    model, x = Net().train(trains).requires_grad_(trains), torch.randn(16, SIZE)
    call = torch.compile(model, backend=te_fp8)
    call(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivatives.*Remedy"):
        call(forward_ad.make_dual(x, torch.randn_like(x)))
    with forward_ad.dual_level():
        assert sqnr(model(x), call(x)) > 20  # nothing to drop


# --- weights that change where autograd does not see it


def by_data(p: Tensor, new: Tensor) -> None:
    p.data = new.clone()


def by_data_copy(p: Tensor, new: Tensor) -> None:
    p.data.copy_(new)


def by_numpy(p: Tensor, new: Tensor) -> None:
    p.detach().numpy()[:] = new.numpy()


def by_swap(p: Tensor, new: Tensor) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(new.clone()))


@pytest.mark.parametrize("write", [by_data, by_data_copy, by_numpy, by_swap])
@pytest.mark.parametrize("recipe", ["delayed", "rowwise"])
def test_an_eval_uses_weights_that_were_written_past_autograd(write, recipe):
    model, x = Net().eval(), torch.randn(16, SIZE)
    call = torch.compile(model, backend=te_fp8, options={"recipe": recipe})
    with torch.no_grad():
        call(x)
        for i in range(3):
            for parameter in (model.a.weight, model.b.weight)[i % 2 :]:
                write(parameter, torch.randn(parameter.shape) / 8)
            assert sqnr(model(x), call(x)) > 20


def test_an_eval_uses_weights_that_are_views_of_what_was_written():
    model, x = Net().eval(), torch.randn(16, SIZE)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for p in model.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    call = torch.compile(model, backend=te_fp8)
    with torch.no_grad():
        call(x)
        flat.mul_(-0.5)
        assert sqnr(model(x), call(x)) > 20


def test_weights_that_are_away_between_calls():
    """As with offloaded layers: a parameter only has memory during the call."""
    model, x = Net().eval(), torch.randn(16, SIZE)
    kept, expected = {n: p.detach().clone() for n, p in model.named_parameters()}, model(x)
    call = torch.compile(model, backend=te_fp8)
    with torch.no_grad():
        for _ in range(3):
            for name, p in model.named_parameters():
                p.data = kept[name].clone()
            assert sqnr(expected, call(x)) > 20
            for p in model.parameters():
                p.data = torch.empty(0)


def test_weights_that_did_not_change_are_not_quantized_again(monkeypatch):
    model, x = Net().eval(), torch.randn(16, SIZE)
    call = torch.compile(model, backend=te_fp8)
    made: list[Any] = []
    from te_dynamo.passes.lower import CachedWeights

    make = CachedWeights.make
    monkeypatch.setattr(CachedWeights, "make", lambda self, tensors: made.append(self) or make(self, tensors))
    with torch.no_grad():
        for _ in range(3):
            call(x)
        assert len(made) == 2
        model.a.weight.data.mul_(2)
        call(x)
        assert len(made) == 3 and made[2] is made[0]  # only the copy of the weight that changed


def test_copies_of_weights_that_were_replaced_are_let_go():
    model, x = Net().eval(), torch.randn(16, SIZE)
    call = torch.compile(model, backend=te_fp8, options={"recipe": "rowwise"})
    from te_dynamo.weight_cache import WeightCache

    with torch.no_grad():
        for _ in range(4):
            model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)
            assert sqnr(model(x), call(x)) > 20
    assert max(len(c.entries) for c in WeightCache.everyone if any(id(model.a.weight) in key for key in c.entries)) == 1


def actor(rank: int, folder: str) -> None:
    te_dynamo.runtime.compile_inductor = compile_without_codegen
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(rank)
    for grad in (False, True):
        model, x = Net().eval(), torch.randn(8, SIZE)
        call = torch.compile(model, backend="te_fp8")
        with torch.set_grad_enabled(grad):
            if rank == 1:
                call(x)  # on one rank only: it must not wait for the other
            for p in model.parameters():
                torch.distributed.broadcast(p.detach(), src=0)
            if rank == 1:
                assert sqnr(model(x), call(x)) > 20
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_one_rank_infers_alone_and_gets_weights_by_a_collective(forks, tmp_path):
    code = "import sys; from tests.forks import ranks; from tests.test_situations import actor; ranks(2, actor, sys.argv[1])"
    forks.run(code, str(tmp_path), path=[str(Path(__file__).resolve().parents[1])])


def test_parameters_are_swapped_on_conversion():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model, x = Net(), torch.randn(16, SIZE)
        call = torch.compile(model, backend=te_fp8)
        gradients(call, model, x)
        scales = te_dynamo.scale_state(model).state_dict()
        model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})
        assert sqnr(model(x), call(x)) > 20
        model.to(torch.bfloat16)
        assert sqnr(model(x.bfloat16()).float(), call(x.bfloat16()).float()) > 20
        assert te_dynamo.scale_state(model).state_dict().keys() == scales.keys()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


# --- autograd's hooks, backward inside, checkpoints


@pytest.mark.parametrize("hooks", ["offload", "none"])
def test_amaxes_of_gradients_survive_hooks_on_saved_tensors(hooks):
    model, x = Net(), torch.randn(32, SIZE)
    call = torch.compile(model, backend=te_fp8, options={"recipe": DelayedScaling(margin=0)})
    pack = unpack = (lambda t: t.detach().clone()) if hooks == "offload" else (lambda t: t)
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = call(x)
        y.retain_grad()
        y.pow(2).mean().backward()
    STATE.roll()
    scale = te_dynamo.scale_state(model).state_dict()["b.grad_output.scale"]
    assert scale == torch.tensor(57344.0) / y.grad.abs().max()


def test_backward_inside_the_compiled_function_makes_no_more_graphs():
    counts = {}
    for backend in ("inductor", "te_fp8"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = Net()

        def train_step(x: Tensor, model: nn.Module = model) -> Tensor:
            loss = model(x).pow(2).mean()
            loss.backward()
            return loss.detach()

        step = torch.compile(train_step, backend=te_fp8 if backend == "te_fp8" else "aot_eager")
        for x in (torch.randn(32, SIZE), torch.randn(32, SIZE), torch.randn(7, SIZE), torch.randn(9, SIZE)):
            step(x)
        counters = torch._dynamo.utils.counters
        counts[backend] = (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    assert counts["te_fp8"] == counts["inductor"]


GEMMS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm")}


def save_gemms(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in GEMMS:
        rows, columns = args[-2:]
        assert rows.dim() == columns.dim() == 2 and rows.shape[1] == columns.shape[0]
    return CheckpointPolicy.MUST_SAVE if op in GEMMS else CheckpointPolicy.PREFER_RECOMPUTE


def save_nothing(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.inductor
@pytest.mark.parametrize(("policy", "forward_again"), [(save_gemms, 0), (save_nothing, 2)])
def test_a_selective_checkpoint_that_saves_gemms_saves_ours(policy, forward_again):
    model, x = Net(), torch.randn(32, SIZE)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    call = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts), backend=te_fp8)
    call(x).sum().backward()
    y = call(x)
    with torch.profiler.profile() as profiler:
        y.sum().backward()
    ran = sum(event.count for event in profiler.key_averages() if event.key == "te_dynamo::site_fwd")
    assert ran == forward_again


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_graph_that_stays_in_use_is_compiled(dynamic, monkeypatch):
    from te_dynamo import runtime

    compiled: list[Any] = []
    plain = runtime.compile_without_codegen
    model = Net().eval()
    options = {"provider": "reference"}  # its first scales need a separate graph
    call = torch.compile(model, backend=te_fp8, dynamic=dynamic, options=options)
    call(torch.ones(8, SIZE, requires_grad=True)).sum().backward()
    monkeypatch.setattr(runtime, "compile_inductor", lambda *args: compiled.append(args) or plain(*args))
    results = []
    for _ in range(6):
        x = torch.ones(8, SIZE, requires_grad=True)
        y = call(x)
        y.sum().backward()
        results.append((y.detach(), x.grad))
    assert len(compiled) == 1
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("bounded", [False, True])
def test_what_is_compiled_late_is_for_any_size_or_not_used(bounded, monkeypatch):
    """One of two layers gets no gradient, so its scales stay unset."""
    from te_dynamo import runtime

    used: list[int] = []
    plain = runtime.compile_without_codegen
    layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(2))
    options = {"provider": "reference"}
    call = torch.compile(lambda x: [layer(x) for layer in layers], backend=te_fp8, dynamic=True, options=options)

    def train(tokens: int) -> None:
        call(torch.ones(tokens, SIZE))[0].sum().backward()

    def late(gm: Any, inputs: Any, given: Any) -> Any:
        if bounded:
            assert next(i for i in inputs if isinstance(i, torch.SymInt)) < 16
        run = plain(gm, inputs, given)
        return lambda *args: used.append(next(a.shape[0] for a in args if isinstance(a, Tensor) and not a.requires_grad)) or run(*args)

    train(8)
    monkeypatch.setattr(runtime, "compile_inductor", late)
    for tokens in (9, 10, 11, 32):
        train(tokens)
    assert used == ([] if bounded else [11, 32])


# --- owners


def test_owners_are_found_after_gc_freeze():
    model, x = Net(), torch.randn(32, SIZE)
    gc.collect()
    gc.freeze()  # like everything from before the tests (conftest.py), so it is never collected
    call = torch.compile(model, backend=te_fp8, options={"recipe": "delayed"})
    for _ in range(2):
        call(x).sum().backward()
    assert len(te_dynamo.scale_state(model).state_dict()) == 12
    model.eval()
    before = call(x).detach()
    call(1000 * x).sum().backward()
    assert torch.equal(before, call(x))


# --- Inductor's C++ wrapper


@pytest.mark.inductor
@pytest.mark.parametrize("trains", [True, False])
def test_the_cpp_wrapper(trains):
    model, x = Net().train(trains), torch.randn(16, SIZE)
    with torch._inductor.config.patch(cpp_wrapper=True), torch.set_grad_enabled(trains):
        call = torch.compile(model, backend=te_fp8)
        assert sqnr(model(x), call(x)) > 20
        if trains:
            assert all(sqnr(a, b) > 18 for a, b in zip(gradients(model, model, x), gradients(call, model, x), strict=True))


# --- amaxes that grow


class Adapter(nn.Module):
    """A linear with a low-rank adapter whose second matrix starts at zero."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.w, self.a, self.b = nn.Linear(n, m).requires_grad_(False), nn.Linear(n, 16, bias=False), nn.Linear(16, m, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x) + 2 * self.b(self.a(x))


def test_adapters_that_begin_at_zero_have_right_gradients_at_every_step():
    model = nn.Sequential(*(m for _ in range(3) for m in (Adapter(SIZE, 128), nn.SiLU(), Adapter(128, SIZE))))
    reference = copy.deepcopy(model)
    call = torch.compile(model, backend=te_fp8, options={"recipe": "delayed"})
    mine, theirs = ([p for p in m.parameters() if p.requires_grad] for m in (model, reference))
    optimizer = torch.optim.AdamW(mine, lr=3e-3)
    for _ in range(6):
        x = torch.randn(64, SIZE)
        with torch.no_grad():
            for p, q in zip(mine, theirs, strict=True):
                q.copy_(p)
        for m, run in ((model, call), (reference, reference)):
            m.zero_grad()
            (run(x) - x.flip(-1)).pow(2).mean().backward()
        assert min(sqnr(q.grad, p.grad) for p, q in zip(mine, theirs, strict=True) if q.grad.any()) > 18
        optimizer.step()


@pytest.mark.parametrize(("recipe", "expected"), [(DelayedScaling(margin=1), 3.0), (DelayedScaling(like_te=True, margin=1), 1.0)])
def test_growth_that_saturated_is_expected_once_more(recipe, expected):
    arena = Arena(torch.device("cpu"))
    arena.configure(0, arena.take(0, 1), recipe)
    for amax in (1.0, 3.0):
        arena.amax[0, 1] = amax
        arena.roll()
    assert arena.scale[0, 1].item() == pytest.approx(448 / 2 / 3 / expected)
    arena.amax[0, 1] = 3.5  # growth went on as expected: no more is expected
    arena.roll()
    assert arena.scale[0, 1] == torch.tensor(448 / 2) / 3.5


# --- reasons, and weights that are computed


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


class Conditional(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda t: self.a(t), lambda t: self.a(t) + 1, (x,))


class OwnFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(x, self.a.weight)


@pytest.mark.parametrize(("make", "operator"), [(Conditional, "cond"), (OwnFunction, "autograd_function_apply")])
def test_the_reason_names_the_operator_whose_sub_graph_is_left(make, operator):
    sites = te_dynamo.explain(make(), torch.randn(16, SIZE)).sites
    assert sites and all(f"in a sub-graph of {operator}" in site.reason for site in sites)


@pytest.mark.inductor
def test_frozen_constants_have_a_remedy():
    model, x = Net().eval(), torch.randn(16, SIZE)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        report = te_dynamo.explain(model, x)
    assert all(site.provider or "freezing = False" in site.reason for site in report.sites)


def weight_norm(n: int, m: int) -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(n, m))


def pruned(n: int, m: int) -> nn.Module:
    return prune.l1_unstructured(nn.Linear(n, m), "weight", 0.5)


class Merged(nn.Linear):
    """A linear whose low-rank adapter is merged in forward."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.u, self.v = nn.Parameter(torch.randn(m, 4) / 8), nn.Parameter(torch.randn(4, n) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.u @ self.v, self.bias)


@pytest.mark.parametrize("make", [weight_norm, pruned, Merged])
def test_a_weight_that_is_computed_is_a_weight(make):
    model, x = nn.Sequential(make(SIZE, 128), nn.Tanh(), make(128, SIZE)), torch.randn(64, SIZE)
    call = torch.compile(model, backend=te_fp8, options={"recipe": "delayed"})
    for _ in range(3):
        assert all(sqnr(a, b) > 17 for a, b in zip(gradients(model, model, x), gradients(call, model, x), strict=True))
    assert len(te_dynamo.scale_state(model).sites()) == 2
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(0.5)
        assert sqnr(model(x), call(x)) > 20


class ThroughAndBack(nn.Module):
    """Returns its own result and a view of its input, which another graph computed."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view(-1, SIZE), self.net(x)


@pytest.mark.parametrize("before", ["inductor's graph", "an own function", "our graph"])
def test_an_output_that_is_a_view_of_an_input_has_another_backward(before):
    last, first = ThroughAndBack(), Net()
    call = torch.compile(last, backend=te_fp8, options={"recipe": DelayedScaling(margin=0)})
    make = {
        "inductor's graph": torch.compile(lambda x: first(x), backend="aot_eager"),
        "an own function": lambda x: Twice.apply(x, first.a.weight)[:, :SIZE].clone(),
        "our graph": torch.compile(lambda x: first(x), backend=te_fp8),
    }[before]
    for _ in range(2):
        through, y = call(make(torch.randn(32, SIZE)))
        y.retain_grad()
        (through.sum() + y.pow(2).mean()).backward()
        STATE.roll()
        scale = te_dynamo.scale_state(last).state_dict()["net.b.grad_output.amax_history"]
        assert y.grad.abs().max() in scale


# --- exported programs


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(SIZE), nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)
        self.last, self.up, self.down = nn.RMSNorm(SIZE), nn.Linear(SIZE, 128), nn.Linear(128, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.last(x))))


def test_an_exported_program_is_taken_as_its_model_is():
    model, x = Block(), torch.randn(2, 16, SIZE)
    exported = torch.export.export(model, (x,)).module()
    reports = [te_dynamo.explain(m, x) for m in (model, exported)]
    taken = [sorted((site.kind, site.layout, site.provider is not None) for site in report.sites) for report in reports]
    assert taken[0] == taken[1] and reports[1].fp8_flop_fraction == 1
    call = torch.compile(exported, backend=te_fp8)
    assert sqnr(model(x), call(x)) > 20


# --- results that are written in place


@pytest.mark.parametrize("provider", ["auto", "reference"])
@pytest.mark.parametrize("trains", [True, False])
def test_results_of_linears_are_written_in_place(provider, trains):
    """Of two linears that are one GEMM, and of one alone: a site's result may be a view."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate(x), self.up(x)
            gate.mul_(2)
            up[:, :3] = 0
            y = self.down(torch.tanh(gate) * up)
            y.mul_(2)
            return y

    model, x = Writes().requires_grad_(trains), torch.randn(32, SIZE)
    call = torch.compile(model, backend=te_fp8, fullgraph=True, options={"provider": provider})
    for _ in range(2):
        assert sqnr(model(x), call(x)) > 20
    if trains:
        for exact, found in zip(gradients(model, model, x), gradients(call, model, x), strict=True):
            assert sqnr(exact, found) > 15


@pytest.mark.parametrize("provider", ["auto", "reference"])
def test_a_linear_whose_output_is_detached_has_no_gradient(provider):
    """Even if another linear of the same input has one: with a zero gradient, an optimizer would decay its weight."""

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.learns, self.watches = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.tanh(self.learns(x)), self.watches(x).detach().square()

    model, x = Watched(), torch.randn(32, SIZE)
    call = torch.compile(model, backend=te_fp8, fullgraph=True, options={"provider": provider})
    for _ in range(2):
        y, seen = call(x)
        (y.sum() + seen.sum()).backward()
    assert model.watches.weight.grad is None and model.learns.weight.grad is not None
    assert sqnr(model(x)[1], seen) > 15
