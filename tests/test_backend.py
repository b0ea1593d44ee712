"""The backend from a user's view: one graph, right results, and the rest is left to Inductor."""

from __future__ import annotations

import copy
import itertools
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import te_dynamo
from te_dynamo.backend import observing, te_fp8
from te_dynamo.config import Options
from te_dynamo.sites import Site
from tests.numerics import sqnr


class MLP(nn.Module):
    def __init__(self, size: int = 64, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(size, 2 * size, bias=bias)
        self.down = nn.Linear(2 * size, size, bias=bias)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MLP() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


pytestmark = pytest.mark.usefixtures("no_codegen")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def compiled(model, **options):
    return torch.compile(model, backend=te_fp8, fullgraph=True, options=options or None)


def sites_of(model, *args, **options) -> list[Site]:
    found: list[Site] = []
    with observing(lambda gm, sites, options: found.extend(sites)):
        compiled(model, **options)(*args)
    return found


# Every pair of values of two parameters occurs once. Inductor compiles each value once, the others of these run without generated code,
# and all other combinations are slow tests.
GENERATED = [("native", "delayed", torch.bfloat16), ("native", "current", torch.float32), ("reference", "delayed", torch.float16)]
INTERPRETED = [("native", "current", torch.float16), ("reference", "current", torch.bfloat16), ("reference", "delayed", torch.float32)]


@pytest.mark.parametrize(
    ("provider", "recipe", "dtype"),
    [
        pytest.param(
            *how,
            marks=pytest.mark.inductor if how in GENERATED else () if how in INTERPRETED else pytest.mark.slow,
            id="-".join(map(str, how)),
        )
        for how in itertools.product(["native", "reference"], ["delayed", "current"], [torch.float32, torch.bfloat16, torch.float16])
    ],
)
def test_trains_as_the_eager_model_to_fp8_error(provider, recipe, dtype):
    model = Stack().to(dtype)
    reference = copy.deepcopy(model)
    fp8 = compiled(model, provider=provider, recipe=recipe)
    for _ in range(3):
        x = torch.randn(4, 16, 64, dtype=dtype, requires_grad=True)
        x_ref = x.detach().clone().requires_grad_()
        model.zero_grad(), reference.zero_grad()
        y, y_ref = fp8(x), reference(x_ref)
        y.float().square().mean().backward()
        y_ref.float().square().mean().backward()
        assert y.dtype == dtype
        assert 25 < sqnr(y_ref, y) < 60
        assert 18 < sqnr(x_ref.grad, x.grad) < 60
        for p, p_ref in zip(model.parameters(), reference.parameters(), strict=True):
            assert p.grad.dtype == p.dtype
            assert 15 < sqnr(p_ref.grad, p.grad) < 80


class SeeFP8(TorchDispatchMode):
    """Records the operators that actually run, and the dtypes of their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.dtypes: set[torch.dtype] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else Dynamo would not run its compiled code while the mode is on

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func._schema.name)
        out = func(*args, **(kwargs or {}))
        self.dtypes |= {t.dtype for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.inductor
def test_no_gemm_of_the_model_is_left_and_fp8_is_what_backward_reads():
    model = MLP().bfloat16()
    fp8 = compiled(model, provider="native")
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    fp8(x).sum().backward()  # compile first: Dynamo skips frames while a mode is on
    with SeeFP8() as forward:
        y = fp8(x)
    with SeeFP8() as backward:
        y.sum().backward()
    assert forward.ops.count("te_dynamo::site_fwd") == 2
    assert backward.ops.count("te_dynamo::site_bwd") == 2
    assert torch.float8_e4m3fn in forward.dtypes & backward.dtypes
    assert not {"aten::mm", "aten::addmm", "aten::bmm"} & {*forward.ops, *backward.ops}


@pytest.mark.inductor
def test_what_is_left_is_bit_identical_to_inductor():
    model = Stack().bfloat16()
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    y = compiled(model, skip=["*"])(x)
    y.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    y_inductor = torch.compile(model, fullgraph=True)(x)
    y_inductor.sum().backward()
    assert torch.equal(y, y_inductor)
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))


def test_skip_leaves_what_its_patterns_match_and_says_so():
    sites = sites_of(Stack(), torch.randn(8, 64), skip=["layers.0.*", "*.down"])
    taken = {s.path for s in sites if s.provider}
    assert taken == {"layers.1.up"}
    assert {s.path: s.reason for s in sites if not s.provider} == {
        "layers.0.up": "skip pattern 'layers.0.*'",
        "layers.0.down": "skip pattern 'layers.0.*'",
        "layers.1.down": "skip pattern '*.down'",
    }


def test_an_absolute_pattern_for_a_layer_that_was_compiled_alone_gets_a_warning():
    model = Stack()
    with pytest.warns(UserWarning, match=r"layers\.0\.up.*compile those layers with their own options"):
        torch.compile(model.layers[0], backend=te_fp8, options={"skip": ["layers.0.up"]})(torch.randn(8, 64))


def test_nothing_taken_is_said_in_one_warning_and_strict_raises():
    model = MLP().double()
    x = torch.randn(8, 64, dtype=torch.float64)
    with pytest.warns(UserWarning, match="nothing in this graph could be computed in FP8.*float64") as seen:
        y = compiled(model)(x)
    assert len([w for w in seen if "te_fp8" in str(w.message)]) == 1
    torch.testing.assert_close(y, model(x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="nothing in this graph could be computed in FP8"):
        compiled(model, strict=True)(x)


def test_dynamo_s_graph_is_left_as_it_was():
    before, after = [], []

    def backend(gm, inputs):
        before.append((gm.print_readable(print_output=False), [dict(n.meta) for n in gm.graph.nodes]))
        result = te_fp8(gm, inputs)
        after.append((gm.print_readable(print_output=False), [dict(n.meta) for n in gm.graph.nodes]))
        return result

    torch.compile(Stack(), backend=backend)(torch.randn(8, 64))
    assert before[0][0] == after[0][0]
    assert [sorted(m) for m in before[0][1]] == [sorted(m) for m in after[0][1]]


def test_state_dict_and_modules_are_untouched():
    model = Stack()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = {name: type(m) for name, m in model.named_modules()}
    compiled(model)(torch.randn(8, 64)).sum().backward()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {name: type(m) for name, m in model.named_modules()} == modules


def test_lengths_that_change_every_step_recompile_once_more_at_most():
    def graphs(backend) -> int:
        torch._dynamo.reset()
        model, count = Stack(), []

        def counting(gm, inputs):
            count.append(1)
            return backend(gm, inputs)

        run = torch.compile(model, backend=counting)
        for length in (5, 9, 17, 24, 33, 40):
            run(torch.randn(length, 64)).sum().backward()
        return len(count)

    assert graphs(te_fp8) <= graphs(torch._dynamo.lookup_backend("aot_eager")) + 1


@pytest.mark.inductor
def test_autocast_gives_the_dtype_of_autocast():
    class Out(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = MLP()

        def forward(self, x):
            return self.mlp.up(x)

    model = Out()
    run = compiled(model)
    x = torch.randn(8, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(x)
        expected = model(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert 25 < sqnr(expected, y) < 32
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert model.mlp.up.weight.grad.dtype == torch.float32


@pytest.mark.inductor
@pytest.mark.parametrize(
    "x",
    [torch.randn(0, 64), torch.randn(64, 8).t(), torch.randn(8, 128)[:, ::2], torch.randn(1, 64).expand(8, 64), torch.randn(64)],
    ids=["empty", "transposed", "strided", "expanded", "one row"],
)
def test_odd_inputs(x):
    model = nn.Sequential(MLP())

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)

    holder = Holder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty batch is left to Inductor with a warning
        y = torch.compile(holder, backend=te_fp8, dynamic=False)(x)
    expected = holder(x)
    assert y.shape == expected.shape
    assert sqnr(expected, y) > 25  # nothing is equal to nothing
    results = []
    for out in (y, expected):
        holder.zero_grad()
        out.square().sum().backward()
        results.append([p.grad for p in holder.parameters()])
    assert all(sqnr(a, b) > 17 for a, b in zip(results[1], results[0], strict=True))


def test_raw_parameters_and_closed_over_modules():
    weight = nn.Parameter(torch.randn(32, 64) * 0.1)
    layer = nn.Linear(64, 64)
    run = torch.compile(lambda x: F.linear(layer(x), weight), backend=te_fp8, fullgraph=True)
    x = torch.randn(8, 64)
    parameters, dy = [weight, *layer.parameters()], torch.randn(8, 32)
    for _ in range(2):
        y = run(x)
        found = torch.autograd.grad(y, parameters, dy)
    expected = F.linear(layer(x), weight)
    assert 22 < sqnr(expected, y) < 40
    assert all(19 < sqnr(a, b) < 40 for a, b in zip(torch.autograd.grad(expected, parameters, dy), found, strict=True))


def test_frozen_weights_and_inputs_get_no_gradient():
    model = MLP()
    model.up.weight.requires_grad_(False)
    run = compiled(model)
    x = torch.randn(8, 64)
    dy = torch.randn(8, 64)
    run(x).backward(dy)
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(model(x), list(learns.values()), dy)
    assert model.up.weight.grad is None and len(learns) == 3
    assert all(sqnr(a, p.grad) > 19 for a, p in zip(expected, learns.values(), strict=True))


@pytest.mark.inductor
def test_inference_quantizes_weights_once_and_again_after_they_change():
    model = MLP().eval()
    run = compiled(model)
    x = torch.randn(8, 64)
    with torch.no_grad():
        first = run(x)
        assert 25 < sqnr(model(x), first)
        model.up.weight.data[0, 1] += 3  # one element, not seen by autograd: the old copy is used
        assert torch.equal(run(x), first)
        model.up.weight.mul_(1)  # seen, even if no value changes
        assert 25 < sqnr(model(x), run(x)) and not torch.equal(run(x), first)


def test_weights_written_through_data_are_seen_after_weights_changed():
    from te_dynamo import weights_changed

    model = MLP().eval()
    run = compiled(model)
    x = torch.randn(8, 64)
    with torch.no_grad():
        run(x)
        model.up.weight.data.mul_(-2)
        weights_changed(model)
        assert 25 < sqnr(model(x), run(x))


@pytest.mark.inductor
def test_inference_mode():
    model = MLP().eval()
    run = compiled(model)
    x = torch.randn(8, 64)
    with torch.inference_mode():
        assert 25 < sqnr(model(x), run(x))
        assert 25 < sqnr(model(x), run(x))


def test_a_region_without_grad_records_nothing_and_gives_no_gradient():
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.student = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            with torch.no_grad():
                target = self.teacher(x)
            return self.student(x) - target

    model = Teacher()
    x = torch.randn(8, 64)
    run = compiled(model)
    for _ in range(2):
        y = run(x)
        y.square().mean().backward()
    assert model.teacher.weight.grad is None and model.student.weight.grad is not None
    assert 20 < sqnr(model(x), y)
    recorded = {k: v.count_nonzero().item() for k, v in te_dynamo.scale_state(model).state_dict().items() if k.endswith("amax_history")}
    assert recorded == {f"student.{role}.amax_history": 2 for role in ("input", "weight", "grad_output")}


@pytest.mark.inductor
def test_in_place_writes_between_are_respected():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

        def forward(self, x):
            x = x * 1.0
            first = self.a(x)
            x.mul_(2)
            return first + self.b(x)

    model = Writes()
    x = torch.randn(8, 64)
    assert 25 < sqnr(model(x), compiled(model)(x))


@pytest.mark.inductor
def test_options_dataclass_and_mode(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformer_engine_torch", raising=False)  # other tests in this process install a stand-in
    model = MLP()
    x = torch.randn(8, 64)
    assert 25 < sqnr(model(x), torch.compile(model, backend=te_fp8, options=vars(Options(recipe="current")))(x)) < 40
    torch._dynamo.reset()
    assert 25 < sqnr(model(x), torch.compile(model, backend=te_fp8, mode="reduce-overhead")(x)) < 40
    with pytest.raises(Exception, match=r"provider.*transformer_engine|transformer_engine"):
        torch._dynamo.reset()
        torch.compile(model, backend=te_fp8, options={"provider": "te"})(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="Did you mean 'recipe'"):
        torch.compile(model, backend=te_fp8, options={"receipe": "current"})(x)


def test_numbers_that_modules_hold_are_numbers_under_dynamic_too():
    """Dynamo makes a norm's eps and an attention's scale inputs, but rules need their values. A change is noticed."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps, self.scale = 1e-6, 0.25
            self.weight = nn.Parameter(torch.ones(32))
            self.qkv = nn.Linear(32, 96)

        def forward(self, x):
            x = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(-3)
            scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT) * self.scale
            return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)

    torch._dynamo.reset()
    model, found = Attention(), []
    compiled = torch.compile(model, backend=te_fp8, dynamic=True, fullgraph=True)
    with observing(lambda gm, sites, options: found.append({s.kind for s in sites.taken()})):
        for length in (8, 12):
            x = torch.randn(2, length, 32)
            assert sqnr(model(x), compiled(x)) > 22
        model.scale, model.eps = 4.0, 1.0
        assert sqnr(model(x), compiled(x)) > 18
    assert found == [{"norm_linear", "attention"}] * 2


@pytest.mark.inductor
@pytest.mark.parametrize("write", ["scaled", "normalized"])
def test_a_weight_that_the_forward_writes_is_read_as_written(write):
    """In eval weights are quantized once, ahead of the graph, unless the graph itself writes them."""

    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Linear(32, 32, bias=False)

        def forward(self, x):
            with torch.no_grad():
                if write == "scaled":
                    self.p.weight.mul_(-0.5)
                else:
                    self.p.weight.copy_(F.normalize(self.p.weight, dim=1))
            return self.p(x)

    torch._dynamo.reset()
    reference = Prototypes().eval()
    model = copy.deepcopy(reference)
    compiled = torch.compile(model, backend=te_fp8)
    x = torch.randn(8, 32)
    with torch.no_grad():
        for _ in range(3):
            assert sqnr(reference(x), compiled(x)) > 22


@pytest.mark.inductor
@pytest.mark.parametrize("grad", [True, False])
def test_what_leaves_the_graph_is_no_view_of_a_joined_buffer(grad):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.a(x), self.b(x).unflatten(-1, (4, 8)).transpose(1, 2)

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        a, b = torch.compile(Two(), backend=te_fp8)(torch.randn(2, 4, 32))
    assert a.view(-1).shape == (256,) and a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


def test_a_row_that_sees_nothing_has_the_gradients_it_had():
    class Attention(nn.Module):
        def __init__(self, first: int) -> None:
            super().__init__()
            self.qkv, self.first = nn.Linear(32, 96), first

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
            length = x.shape[1]
            past = torch.ones(length, length, device=x.device).tril(self.first).bool()
            scores = torch.where(past, q @ k.mT / 4, torch.finfo(x.dtype).min)
            return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    for first, taken in ((-1, False), (0, True)):  # strictly earlier keys: the first row has none; causal: each has one
        torch._dynamo.reset()
        model, x, dy, found = Attention(first), torch.randn(2, 6, 32), torch.randn(2, 6, 32), []
        with observing(lambda gm, sites, options, found=found: found.extend(s for s in sites if s.kind == "attention")):
            (torch.compile(model, backend=te_fp8)(x) * dy).sum().backward()
        assert [s.provider is not None for s in found] == [taken]
        assert taken or "may see nothing" in found[0].reason
        gradient = model.qkv.weight.grad.clone()
        model.zero_grad()
        (model(x) * dy).sum().backward()
        assert sqnr(model.qkv.weight.grad, gradient) > 17
