"""Results of linears that are kept in FP8 for backward: which ones, how exactly, and that gradients are those of the kept values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import live_after
from te_dynamo.backend import te_fp8
from te_dynamo.lowering.fp8 import E4M3
from te_dynamo.lowering.packed import pack, unpack
from tests.numerics import sqnr
from tests.partitioned import calls, interpreted, saved_for_backward

TOKENS, WIDTH, INNER = 48, 32, 256
aten = torch.ops.aten


class MLP(nn.Module):
    """gate and up share an input; `act` computes the input of `down` from them."""

    def __init__(self, act: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER)
        self.down, self.act = nn.Linear(INNER, WIDTH), act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.gate(x), self.up(x)))


def normed(gate: Tensor, up: Tensor) -> Tensor:
    return F.rms_norm(F.silu(gate) * up, (INNER,))


class Silu(torch.autograd.Function):
    """With a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return grad * gate * (1 + x * (1 - gate))


class DividesBy(torch.autograd.Function):
    """Its backward is singular, though its forward is not. divisor: what backward divides by, of x."""

    @staticmethod
    def forward(ctx, x, divisor):
        ctx.save_for_backward(x)
        ctx.divisor = divisor
        return torch.relu(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / ctx.divisor(x), None


@torch._dynamo.allow_in_graph
def divides_by_itself(x: Tensor) -> Tensor:
    return DividesBy.apply(x, lambda x: x)


@torch._dynamo.allow_in_graph
def divides_where_it_may(x: Tensor) -> Tensor:
    return DividesBy.apply(x, lambda x: torch.where(x == 0, 1.0, x))


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "tanh": lambda gate, up: F.gelu(gate + 1, approximate="tanh") * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "mish": lambda gate, up: F.mish(gate) * up,
    "hardswish": lambda gate, up: F.hardswish(gate) * up,
    "elu": lambda gate, up: F.elu(gate) * F.leaky_relu(up),
    "relu2": lambda gate, up: F.relu(gate).square() * up,
    "clamped": lambda gate, up: gate.clamp(max=2) * torch.sigmoid(1.702 * gate) * (up.clamp(-2, 2) + 1),
    "normed": normed,
    "its own backward": lambda gate, up: Silu.apply(gate) * up,
    "one minus": lambda gate, up: gate * (1 - torch.tanh(up).square()) / (1 + up * up),
    "soft": lambda gate, up: F.softplus(gate) * F.softsign(up),
}


@pytest.fixture
def graphs() -> Iterator[list[GraphModule]]:
    with interpreted() as made:
        yield made


def gradients(model: nn.Module, x: Tensor, steps: int = 2, **options: object) -> list[Tensor]:
    """The gradients of the second step, including that of x."""
    torch._dynamo.reset()
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    run = torch.compile(model, backend=te_fp8, fullgraph=True, options={"recipe": "current", **options})
    for _ in range(steps):
        run(x).square().sum().backward()
        made = [x.grad, *(p.grad for p in model.parameters())]
        x.grad, _ = None, model.zero_grad()
    return made


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "pooled": lambda h: torch.relu(h).unflatten(0, (-1, 8)).amax(1),
    "layer_norm": lambda h: F.layer_norm(h, (INNER,)),
    "batch_norm": lambda h: F.batch_norm(h, None, None, training=True),
    "centered": lambda h: F.gelu(h - h.mean(-1, keepdim=True)),
    "softmax": lambda h: torch.softmax(h, -1),
    "scaled": lambda h: torch.tanh(h / h.abs().amax(-1, keepdim=True)),
    "standardized": lambda h: (h - h.mean()) / h.std(),
    "by its variance": lambda h: h * h.var(-1, keepdim=True),
    "by its largest": lambda h: h * torch.linalg.vector_norm(h, torch.inf, -1, keepdim=True),
}
# Functions that are not about the same at what rounding makes of a value: the difference cancels, turns over, or is singular.
SENSITIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "batch norm in eval": lambda h: torch.relu(F.batch_norm(h, torch.full((INNER,), 30.0), torch.ones(INNER))),
    "a constant": lambda h: F.gelu(h - 30),
    "a parameter": lambda h: F.gelu(h - torch.full((INNER,), 30.0)),
    "two halves": lambda h: F.gelu(h[:, ::2] - h[:, 1::2]).repeat(1, 2),
    "the larger half": lambda h: torch.maximum(h[:, ::2], h[:, 1::2]).repeat(1, 2),
    "there and back": lambda h: F.gelu((h + 30) - 30),
    "a mask": lambda h: torch.relu(h + torch.where(torch.arange(INNER) < 50, torch.finfo(h.dtype).min, 0.0)),
    "sine": lambda h: torch.sin(h),
    "root": lambda h: (h - 30).sign() * (h - 30).abs().sqrt(),
    "logarithm": lambda h: torch.log((h - 30).abs() + 1e-6),
    "inverse": lambda h: 1 / h,
    "exponential": lambda h: torch.exp(h),
    "a bound": lambda h: h.clamp(-30, 30),
    "a threshold": lambda h: F.threshold(h, 30, 0),
    "small steps": lambda h: F.gelu(h - 3 - 3 - 3 - 3 - 3 - 3 - 3 - 3 - 3 - 3),
    "steep": lambda h: torch.tanh((h / 10 - 3) * 10),
    "steep the other way": lambda h: torch.sigmoid(-(h / 10 - 3) / 0.1),
    "a division in backward": divides_by_itself,
    "a careful division in backward": divides_where_it_may,
}


class Between(nn.Module):
    """The function of results that are about 30."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.function = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH), function
        with torch.no_grad():
            self.first.bias.add_(30)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


OTHERS = [("current", "reference"), ("rowwise", "native")]
SPOILED = [(name, "current", "native") for name in [*STATISTICS, *SENSITIVE]] + [(name, *how) for name in STATISTICS for how in OTHERS]


@pytest.mark.parametrize(("name", "recipe", "provider"), SPOILED)
def test_what_rounding_would_spoil_stays_as_it_is(name, recipe, provider, graphs):
    """An exact mean and rounded values would differ by the rounding error, and no value would equal an exact maximum."""
    model, x = Between((STATISTICS | SENSITIVE)[name]), torch.randn(TOKENS, WIDTH)
    balanced, speed = (gradients(model, x, memory=memory, provider=provider, recipe=recipe) for memory in ("balanced", "speed"))
    assert all(torch.equal(a, b) for a, b in zip(balanced, speed, strict=True))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(count: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Adjacent rows of different magnitudes, with zeros, a NaN, an infinity and tiny values."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(count, columns + 3, generator=generator) * 10 ** torch.empty(count, 1).uniform_(-6, 3, generator=generator)
    whole[::5], whole[1::7, 0], whole[2::7, columns // 2] = 0, torch.nan, torch.inf
    whole[3::7] *= 2.0**-110
    return whole.to(dtype)[:, :columns]


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise equal, except for the bits of a NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    nan, bits = b.float().isnan(), {1: torch.uint8, 2: torch.int16, 4: torch.int32}[b.itemsize]
    return torch.equal(a.float().isnan(), nan) and torch.equal(a[~nan].view(bits), b[~nan].view(bits))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.sampled_from([1, 5, 16, 96, 128, 130, 192, 384]), st.sampled_from(DTYPES), st.integers(0, 99))
def test_the_operators_of_a_cpu_are_the_definition(count, columns, dtype, seed):
    v = rows(count, columns, dtype, seed)
    found, expected = torch.ops.te_dynamo.pack_kept(v), pack(v)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert same(torch.ops.te_dynamo.unpack_kept(*found, dtype), unpack(*expected, dtype))


def test_opcheck(monkeypatch):
    allclose = torch.allclose  # which cannot compare FP8
    monkeypatch.setattr(torch, "allclose", lambda *ts, **k: allclose(*(t.view(torch.uint8) if t.dtype == E4M3 else t for t in ts), **k))
    v = torch.randn(6, 256).bfloat16()
    torch.library.opcheck(torch.ops.te_dynamo.pack_kept.default, (v,))
    torch.library.opcheck(torch.ops.te_dynamo.unpack_kept.default, (*pack(v), torch.bfloat16))


@pytest.mark.parametrize("memory", ["balanced", "speed"])
def test_on_a_cpu_operators_pack_and_join(memory, monkeypatch):
    """Otherwise their generated code, for each layer and each site, would be most of what is compiled."""
    ops, forms = torch.ops.te_dynamo, list[GraphModule]()

    def interpret(gm, example_inputs, **_):
        forms.append(gm)
        return make_boxed_func(gm.forward)

    monkeypatch.setattr(compile_fx, "compile_fx", partial(compile_fx.compile_fx, inner_compile=interpret))
    gradients(MLP(ACTIVATIONS["swiglu"]), torch.randn(TOKENS, WIDTH), memory=memory, recipe="delayed")
    forward, backward = forms[-2:]
    counts = [[len(calls(gm, op.default)) for op in (ops.pack_kept, ops.unpack_kept, ops.joined, aten.cat)] for gm in (forward, backward)]
    assert counts == ([[2, 0, 1, 0], [0, 2, 1, 1]] if memory == "balanced" else [[0, 0, 1, 0], [0, 0, 1, 1]])


def kept(graphs: list[GraphModule]) -> tuple[int, int]:
    """The elements that the last forward keeps of the two results: in FP8, and in high precision."""
    forward = graphs[-2] if len(graphs) > 1 else graphs[0]
    saved = [t for t in saved_for_backward(forward, 1) if t.numel() >= TOKENS * INNER]
    # the FP8 input of `down` is a matrix
    return sum(t.numel() for t in saved if t.dtype == E4M3 and t.dim() == 3), sum(t.numel() for t in saved if t.itemsize > 1)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_what_an_activation_reads_is_kept_in_fp8(graphs, act):
    model, x = MLP(ACTIVATIONS[act]).bfloat16(), torch.randn(2, TOKENS // 2, WIDTH).bfloat16()
    found = gradients(model, x)
    assert kept(graphs) == (2 * TOKENS * INNER, 0)
    exact = gradients(model, x, memory="speed")
    assert kept(graphs)[0] == 0
    of_down, others = found[-2:], found[:-2]
    assert all(torch.equal(a, b) for a, b in zip(of_down, exact[-2:], strict=True))
    assert all(22 < sqnr(e, f) < 60 for e, f in zip(exact, others, strict=False))


def halves(both: Tensor) -> tuple[Tensor, ...]:
    return both.chunk(2, -1)


def alternating(both: Tensor) -> tuple[Tensor, ...]:
    return both[..., ::2], both[..., 1::2]


class Joined(nn.Module):
    """gate and up are the results of one linear; `shifts` reads all of it."""

    def __init__(self, inner: int = INNER, shifts: bool = False, parts: Callable[[Tensor], tuple[Tensor, ...]] = halves) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.both, self.down, self.shifts, self.parts = nn.Linear(WIDTH, 2 * inner), nn.Linear(inner, WIDTH), shifts, parts

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        gate, up = self.parts(both)
        gated = F.silu(gate) * up
        return self.down(gated + torch.tanh(both).chunk(2, -1)[0] if self.shifts else gated)


@pytest.mark.parametrize(
    ("model", "parts", "block"),
    [
        (Joined(), 2, 128),
        (Joined(inner=192), 2, 64),
        (Joined(inner=160), 1, 64),  # a block would span both
        (Joined(shifts=True), 1, 128),
        (Joined(parts=alternating), 2, 128),
        (Joined(parts=alternating, inner=192), 2, 64),
        (Joined(parts=alternating, shifts=True), 1, 128),
    ],
)
def test_gate_and_up_from_one_gemm_are_kept_apart(graphs, model, parts, block):
    """Those that are halves with the scales that they have in the whole."""
    model, x = model.bfloat16(), torch.randn(TOKENS, WIDTH).bfloat16()
    found = gradients(model, x)
    whole = 2 * model.down.in_features
    saved = [t for t in saved_for_backward(graphs[-2], 1) if t.dtype == E4M3 and t.dim() == 3]
    assert [t.shape for t in saved] == [(TOKENS, whole // parts // block, block)] * parts
    if model.parts is halves and block == 128:
        as_one = gradients(model, x[None])  # three dimensions: a matrix is kept
        assert all(torch.equal(a.view_as(b), b) for a, b in zip(found, as_one, strict=True))
    exact = gradients(model, x, memory="speed")
    assert all(22 < sqnr(e, f) for e, f in zip(exact, found, strict=True))


@pytest.mark.parametrize(
    ("others", "parts"),
    [
        (lambda both: both.split(256, 1), 2),
        (lambda both: both.split([384, 128], 1), 1),
        (lambda both: (both[:, :256], both[:, 256:][:, -256:]), 2),
        (lambda both: (both[:, :256], aten.slice(both, 1, 256)), 2),
        (lambda both: (both[:, 512:], both[:, :256], both[:, 256:]), 1),
    ],
    ids=["the same parts", "others", "a slice of a slice", "as slices", "no columns"],
)
def test_no_column_is_kept_twice(graphs, others, parts):
    class Split(Joined):
        def forward(self, x: Tensor) -> Tensor:
            both = self.both(x)
            gate, up = both.split(256, 1)
            return self.down(F.silu(gate) * up + torch.tanh(torch.cat(others(both), 1))[:, 128:384])

    model, x = Split().bfloat16(), torch.randn(TOKENS, WIDTH).bfloat16()
    found = gradients(model, x)
    saved = [t for t in saved_for_backward(graphs[-2], 1) if t.dtype == E4M3 and t.dim() == 3]
    assert [t.numel() for t in saved] == [TOKENS * 2 * INNER // parts] * parts
    assert all(22 < sqnr(e, f) for e, f in zip(gradients(model, x, memory="speed"), found, strict=True))


@pytest.mark.parametrize("width", [64, 128])
def test_columns_that_nothing_reads_are_not_kept(graphs, width):
    """Parts as wide as a block."""

    class Some(Joined):
        def forward(self, x: Tensor) -> Tensor:
            gate, up, _ = self.both(x).split([width, width, 2 * INNER - 2 * width], 1)
            return self.down(F.pad(F.silu(gate) * up, (0, INNER - width)))

    gradients(Some().bfloat16(), torch.randn(TOKENS, WIDTH).bfloat16())
    assert [t.shape for t in saved_for_backward(graphs[-2], 1) if t.dtype == E4M3 and t.dim() == 3] == [(TOKENS, 1, width)] * 2


def test_columns_that_only_a_call_tells(graphs):
    class Cut(Joined):
        def forward(self, x: Tensor, width: int) -> Tensor:
            both = self.both(x)
            return self.down(F.pad(F.silu(both[:, :width]) * both[:, width : 2 * width], (0, INNER - width)))

    model, x = Cut(), torch.randn(TOKENS, WIDTH)
    run = torch.compile(model, backend=te_fp8, fullgraph=True, dynamic=True, options={"recipe": "current"})
    for width in (128, 256, 128):
        loss = run(x, width).square().sum()
        (found,) = torch.autograd.grad(loss, [model.both.weight])
        (exact,) = torch.autograd.grad(model(x, width).square().sum(), [model.both.weight])
        assert sqnr(exact, found) > 15


class Biased(nn.Module):
    """gate and up alternate, and each token adds the bias of its expert, as in gpt-oss. reads: what else reads the result of the linear."""

    def __init__(self, reads: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.both, self.down = nn.Linear(WIDTH, 2 * INNER, bias=False), nn.Linear(INNER, WIDTH)
        self.biases, self.reads = nn.Parameter(0.3 * torch.randn(4, 2 * INNER)), reads

    def forward(self, x: Tensor) -> Tensor:
        result = self.both(x)
        both = result + self.biases[torch.arange(len(x)) % 4]
        gated = ACTIVATIONS["clamped"](both[..., ::2], both[..., 1::2])
        return self.down(gated if self.reads is None else gated + self.reads(result)[..., ::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sum_of_a_result_and_a_bias_is_kept(graphs, dtype):
    model, x = Biased().to(dtype), torch.randn(TOKENS, WIDTH).to(dtype)
    found = gradients(model, x)
    assert kept(graphs) == (2 * TOKENS * INNER, 0)
    assert [t.shape[1:] for t in saved_for_backward(graphs[-2], 1) if t.dtype == E4M3 and t.dim() == 3] == [(INNER // 128, 128)] * 2
    exact = gradients(model, x, memory="speed")
    assert kept(graphs)[0] == 0
    assert all(22 < sqnr(e, f) for e, f in zip(exact, found, strict=True))


@pytest.mark.parametrize("reads", [torch.tanh, torch.sin], ids=["tolerantly", "or not"])
def test_a_result_that_is_read_without_the_bias_is_kept_or_exact(graphs, reads):
    model, x = Biased(reads), torch.randn(TOKENS, WIDTH)
    found, exact = gradients(model, x), gradients(model, x, memory="speed")
    if reads is torch.sin:
        assert all(map(torch.equal, found, exact))
    else:
        assert all(22 < sqnr(e, f) for e, f in zip(exact, found, strict=True))


def test_scales_of_its_own_are_no_such_statistic(graphs):
    """wgrad's operand is cast with scales of its columns, which forward computed from the exact values."""
    model, x = MLP(ACTIVATIONS["swiglu"]).bfloat16(), torch.randn(2, TOKENS // 2, WIDTH).bfloat16()
    found = gradients(model, x, recipe="rowwise")
    assert kept(graphs) == (2 * TOKENS * INNER, 2 * INNER * WIDTH)  # the latter: gate's and up's weights
    exact = gradients(model, x, recipe="rowwise", memory="speed")
    assert kept(graphs)[0] == 0
    assert all(20 < sqnr(e, f) for e, f in zip(exact, found, strict=True))


def test_dropout_is_drawn_once(graphs):
    """Backward drops the same elements as forward."""
    model, x = MLP(lambda gate, up: F.dropout(F.silu(gate) * up, 0.5)), torch.randn(1, WIDTH)
    with torch.no_grad():
        model.down.weight.zero_()[:, :WIDTH].fill_diagonal_(1.0)  # passes the first features through
    run = torch.compile(model, backend=te_fp8, fullgraph=True, options={"recipe": "current"})
    for _ in range(3):
        model.zero_grad()
        y = run(x)
        y.sum().backward()
        dropped = ((y - x - model.down.bias)[0].abs() < 1e-5).tolist()
        assert dropped == (model.up.bias.grad[:WIDTH] == 0).tolist() and 0 < sum(dropped) < WIDTH
    assert any(t.dtype == E4M3 and t.dim() == 3 for t in saved_for_backward(graphs[0], 1))


class Reads(MLP):
    """Another operation reads a result too."""

    def __init__(self, reads: Callable[[Tensor], Tensor]) -> None:
        super().__init__(ACTIVATIONS["swiglu"])
        self.reads = reads

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.gate(x), self.up(x)
        return x + self.down(self.act(gate, up)), self.reads(gate)


@pytest.mark.parametrize(
    "reads",
    [lambda gate: gate, lambda gate: gate.tanh(), lambda gate: gate @ gate.mT, lambda gate: torch.softmax(gate, 0)],
    ids=["returned", "its tanh", "a product", "a softmax"],
)
def test_what_anything_else_reads_is_not(graphs, reads):
    model, x = Reads(reads), torch.randn(TOKENS, WIDTH)
    run = torch.compile(model, backend=te_fp8, fullgraph=True, options={"recipe": "current"})
    y, other = run(x)
    (y.sum() + other.sum()).backward()
    forward = graphs[0]
    in_fp8 = [t for t in saved_for_backward(forward, 2) if t.dtype == E4M3 and t.dim() == 3]
    assert [t.numel() for t in in_fp8] == [TOKENS * INNER]  # up alone


def test_an_attention_and_a_residual_are_left_alone(graphs):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o, self.up = (nn.Linear(WIDTH, WIDTH) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (linear(x).unflatten(-1, (2, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
            x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + self.up(F.layer_norm(x, (WIDTH,)))

    model, x = Attention(), torch.randn(2, 16, WIDTH)
    assert all(map(torch.equal, gradients(model, x), gradients(model, x, memory="speed")))


def test_what_is_checkpointed_is_left_to_the_checkpoint(graphs):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = MLP(ACTIVATIONS["swiglu"])

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.mlp, x, use_reentrant=False)

    model, x = Checkpointed(), torch.randn(TOKENS, WIDTH)
    found = gradients(model, x)
    assert not [t for t in saved_for_backward(graphs[-2], 1) if t.numel() >= TOKENS * INNER]
    assert all(map(torch.equal, found, gradients(model, x, memory="speed")))


def test_like_te_it_is_what_te_reads(graphs):
    model, x = MLP(ACTIVATIONS["swiglu"]), torch.randn(TOKENS, WIDTH)
    assert all(map(torch.equal, gradients(model, x, like_te=True), gradients(model, x, like_te=True, memory="speed")))


def test_compiled_on_a_cpu():
    """With symbolic lengths: bytes at the allocator, and gradients compared with those in high precision."""
    model, x = MLP(ACTIVATIONS["swiglu"]), torch.randn(1024, WIDTH)
    model(x).square().sum().backward()
    live, noise = {}, {}
    for memory in ("speed", "saving"):
        torch._dynamo.reset()
        trained = copy.deepcopy(model)
        run = torch.compile(trained, backend=te_fp8, fullgraph=True, dynamic=True, options={"recipe": "current", "memory": memory})
        for tokens in (512, 1024):
            trained.zero_grad()
            run(x[:tokens]).square().sum().backward()
        noise[memory] = [sqnr(e.grad, p.grad) for e, p in zip(model.parameters(), trained.parameters(), strict=True)]
        live[memory] = live_after(lambda run=run: run(x))
    # gate and up are float32: one byte of four is kept, and the factor of a gradient that Inductor would keep instead is not
    assert live["speed"] - live["saving"] > 0.9 * 2 * 1024 * INNER * 3
    assert all(s > 17 and s > f - 1.5 for f, s in zip(noise["speed"], noise["saving"], strict=True))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 5),
    columns=st.sampled_from([1, 7, 48, 128, 192, 256, 320]),
    exponent=st.integers(-40, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_what_is_packed(rows, columns, exponent, dtype, seed):
    torch.manual_seed(seed)
    t = (torch.randn(rows, columns) * 2.0**exponent).to(dtype)
    back = unpack(*pack(t), dtype=dtype)
    assert back.shape == t.shape and back.dtype == dtype
    block = 128 if columns % 128 == 0 else 64 if columns % 64 == 0 else columns
    peak = t.double().reshape(-1, block).abs().amax(1, keepdim=True).expand(-1, block).reshape(t.shape)
    # E4M3: three bits after the leading one, down to 2**-6 of 448; below, steps of 2**-9. And bf16's or float32's rounding of the result.
    bound = torch.maximum(t.double().abs() * 2.0**-4, peak / 448 * 2.0**-10) + t.double().abs() * 2.0**-8
    assert ((back.double() - t.double()).abs() <= bound).all()


def test_special_values_when_packed():
    t = torch.ones(4, 256)
    t[0, 3], t[1, 200], t[2] = torch.nan, -torch.inf, 0.0
    t[3] = 2.0**-126
    back = unpack(*pack(t), dtype=torch.float32)
    assert back[0].isnan().nonzero().flatten().tolist() == [3] and torch.equal(back[0, 4:], t[0, 4:])
    assert torch.equal(back[1, :128], t[1, :128]) and not back[1, 128:].isfinite().any()
    assert torch.equal(back[2], t[2]) and back[3].isfinite().all() and back[3].abs().max() <= 2.0**-100
