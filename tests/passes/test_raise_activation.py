"""Activations as models write them: found, left alone if they must be, and bitwise equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from transformers.activations import ACT2FN

from te_dynamo import ops
from te_dynamo.ir.activation import SPELLINGS
from te_dynamo.passes.canonicalize import canonicalize
from te_dynamo.passes.raise_activation import ACTIVATION_RULES, patterns
from te_dynamo.passes.rules import apply
from te_dynamo.sites import Sites
from tests.capture import capture
from tests.models import HIDDEN, SMALL, VOCABULARY, Case, decoder

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZE = 16


def tensors(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [(3 * torch.randn(2, 3, SIZE)).to(dtype).requires_grad_() for _ in range(count)]


def raised(fn: Callable[..., Tensor], *inputs: Tensor, autocast: torch.dtype | None = None) -> tuple[GraphModule, list[Node]]:
    """The graph after the rule, and its activations. Checks that results and gradients are bitwise unchanged, except for gradients of
    `F.glu`, whose backward is one operator that rounds differently."""

    def cast(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            return fn(*given)

    gm = capture(cast, *inputs)
    given = gm.meta["example_inputs"]
    learned = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
    canonicalize(gm)
    gm.recompile()
    before = gm(*given)[0]
    gradients = torch.autograd.grad(before.float().square().sum(), learned)
    apply(ACTIVATION_RULES, gm, Sites(strict=True))
    gm.graph.lint()
    gm.recompile()
    after = gm(*given)[0]
    assert torch.equal(before, after) and (before.dtype, before.stride()) == (after.dtype, after.stride())
    found = gm.graph.find_nodes(op="call_function", target=ops.activation)
    for a, b in zip(gradients, torch.autograd.grad(after.float().square().sum(), learned), strict=True):
        assert torch.equal(a, b) or (found[0].kwargs["spelling"] == "glu" and torch.allclose(a, b, 0.03, 0.03))
    return gm, found


def spellings(nodes: list[Node]) -> list[tuple[str, bool]]:
    """For each activation: its spelling, and whether it is gated."""
    return [(n.kwargs["spelling"], len(n.args) == 2) for n in nodes]


def exact_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


UNARY: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    **{name: (ACT2FN[name], name) for name in ("gelu", "gelu_new", "gelu_fast", "quick_gelu", "silu", "relu", "mish")},
    "gelu_pytorch_tanh": (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
    "gelu_python": (ACT2FN["gelu_python"], "gelu_written_out"),
    "gelu_accurate": (ACT2FN["gelu_accurate"], "gelu_new"),
    "relu2": (ACT2FN["relu2"], "relu_squared"),
    "by a user": (exact_gelu, "gelu_written_out"),
    "nn.GELU": (nn.GELU("tanh"), "gelu_tanh"),
    "nn.SiLU": (nn.SiLU(), "silu"),
    "method": (lambda x: x.relu(), "relu"),
    "silu by hand": (lambda x: torch.sigmoid(x) * x, "silu_written_out"),
    "mish by hand": (lambda x: x * F.softplus(x).tanh(), "mish_written_out"),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", UNARY)
def test_each_spelling(name, gated):
    fn, spelling = UNARY[name]
    for dtype in DTYPES if name in ("gelu_new", "silu") else DTYPES[1:2]:
        _, found = raised((lambda x, up: up * fn(x)) if gated else (lambda x: fn(x)), *tensors(1 + gated, dtype))
        assert spellings(found) == [(spelling, gated)]


def test_every_spelling_finds_itself():
    assert {p.spelling for p in patterns()} == {name for name, s in SPELLINGS.items() if s.written_out}
    for pattern in patterns():
        spelling, numbers = SPELLINGS[pattern.spelling], {"alpha": 1.702, "limit": 2.5}
        given = {n: numbers[n] for n in spelling.numbers}
        _, found = raised(lambda *xs, s=spelling, given=given: s.compute(*xs, **given), *tensors(spelling.inputs))
        assert spellings(found) == [(pattern.spelling, spelling.inputs == 2)]
        assert {k: found[0].kwargs[k] for k in given} == given


def gpt_oss(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = gate.clamp(min=None, max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


@pytest.mark.parametrize("alpha", [1.702, 2.0])
def test_a_clamped_swiglu_has_the_model_s_numbers(alpha):
    _, (node,) = raised(lambda x: gpt_oss(x[..., ::2], x[..., 1::2], alpha, 3.0), *tensors(1, torch.bfloat16))
    assert (node.kwargs["spelling"], node.kwargs["alpha"], node.kwargs["limit"]) == ("clamped_swiglu", alpha, 3.0)


def test_a_clamp_with_other_limits_is_none():
    def uneven(gate, up):
        return (up.clamp(min=-3.0, max=2.0) + 1) * (gate.clamp(max=3.0) * torch.sigmoid(gate.clamp(max=3.0) * 1.5))

    _, found = raised(uneven, *tensors(2))
    assert "clamped_swiglu" not in dict(spellings(found))


class OneLinear(nn.Module):
    """Gate and up as one linear: timm's SwiGLUPacked, xformers' w12, Phi-3, in either order."""

    def __init__(self, first: str, split: str, bias: bool) -> None:
        super().__init__()
        self.both, self.down, self.first, self.split = nn.Linear(SIZE, 64, bias=bias), nn.Linear(32, SIZE), first, split

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        if self.split == "slice":
            a, b = y[..., :32], y[..., 32:]
        else:
            a, b = y.chunk(2, dim=-1) if self.split == "chunk" else y.split([32, 32], -1)
        gate, up = (a, b) if self.first == "gate" else (b, a)
        return self.down(F.silu(gate) * up)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("first", ["gate", "up"])
@pytest.mark.parametrize("split", ["chunk", "split", "slice"])
def test_gate_and_up_of_one_linear(first, split, bias):
    torch.manual_seed(0)
    _, found = raised(OneLinear(first, split, bias), *tensors(1))
    assert spellings(found) == [("silu", True)]


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_under_autocast(dtype):
    """`pow` runs in float32 there, and everything after it."""
    for fn, spelling in ((ACT2FN["gelu_new"], "gelu_new"), (ACT2FN["silu"], "silu")):
        linear = nn.Linear(SIZE, SIZE)
        _, found = raised(lambda x, f=fn, w=linear: F.linear(f(w(x)), w.weight), *tensors(1), autocast=dtype)
        assert spellings(found) == [(spelling, False)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_hand", [False, True])
def test_glu(by_hand, dtype):
    def glu(x):
        up, gate = x.chunk(2, -1)
        return up * torch.sigmoid(gate) if by_hand else F.glu(x)

    _, found = raised(glu, *tensors(1, dtype))
    assert spellings(found) == [("glu_written_out" if by_hand else "glu", True)]


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda x: F.glu(x, 0), id="a glu of rows"),
        pytest.param(lambda x: torch.sigmoid(x), id="a sigmoid by itself"),
        pytest.param(lambda x: x * torch.tanh(F.softplus(x, 2.0)), id="another mish"),
        pytest.param(lambda x: 0.5 * x * (1 + torch.erf(x / 1.5)), id="another gelu"),
        pytest.param(lambda x: F.leaky_relu(x), id="another function"),
        pytest.param(lambda x: F.silu(x.transpose(0, 2)), id="not contiguous"),
        pytest.param(lambda x: F.silu(x.double()), id="float64"),
    ],
)
def test_what_is_left_alone(fn):
    x = torch.randn(2, 3, SIZE, requires_grad=True)
    assert raised(fn, x)[1] == []


def test_what_something_else_reads_is_no_inner_node():
    def read_twice(x):
        s = torch.sigmoid(1.702 * x)
        return x * s + s

    assert spellings(raised(read_twice, *tensors(1))[1]) == []
    _, found = raised(lambda x, up: (a := F.silu(x)) * up + a, *tensors(2))
    assert spellings(found) == [("silu", False)]


def test_what_is_of_another_shape_is_no_gate():
    _, found = raised(lambda x: F.silu(x) * x.mean(-1, keepdim=True), *tensors(1))
    assert spellings(found) == [("silu", False)]


def gated_t5() -> nn.Module:
    sizes = {"d_model": HIDDEN, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 1, "vocab_size": VOCABULARY}
    config = hf.T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0, use_cache=False)
    return hf.T5ForConditionalGeneration(config)


MODELS: dict[str, tuple[Case, list[tuple[str, bool]]]] = {
    "llama": (SMALL["llama"], [("silu", True)]),
    "qwen3": (SMALL["qwen3"], [("silu", True)]),
    "gemma3": (SMALL["gemma3"], [("gelu_tanh", True)]),
    "phi3": (decoder(1, "Phi3ForCausalLM", "Phi3Config"), [("silu", True)]),
    "gpt2": (SMALL["gpt2"], [("gelu_new", False)]),
    "bert": (SMALL["bert"], [("gelu", False)]),
    "vit": (SMALL["vit"], [("gelu", False)]),
    "t5": (SMALL["t5"], [("relu", False)] * 4),
    "gated t5": (Case(lambda attention: gated_t5(), 0, 0, "seq2seq"), [("gelu_new", True)] * 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    case, expected = MODELS[name]
    model = case.model().eval()
    with torch.no_grad():
        gm = capture(model, **case.inputs())
        inputs = gm.meta["example_inputs"]
        canonicalize(gm)
        gm.recompile()
        before = gm(*inputs)
        apply(ACTIVATION_RULES, gm, Sites(strict=True))
        gm.recompile()
        assert all(torch.equal(a, b) for a, b in zip(before, gm(*inputs), strict=True))
    assert spellings(gm.graph.find_nodes(op="call_function", target=ops.activation)) == expected
