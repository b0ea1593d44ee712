"""`nn.MultiheadAttention` and `nn.TransformerEncoderLayer`: written out as linears and attention, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from te_dynamo import ops
from te_dynamo.ir.graph import is_call, tensor
from te_dynamo.passes.canonicalize import canonicalize
from te_dynamo.passes.layout import attention_shape
from te_dynamo.passes.raise_attention import ATTENTION_RULES
from te_dynamo.passes.raise_linear import LINEAR_RULES
from te_dynamo.passes.rules import apply
from te_dynamo.passes.select import site_path
from te_dynamo.passes.spec import RAISED, check
from te_dynamo.sites import Sites
from tests.capture import capture

B, S, T, E, H = 2, 6, 5, 16, 4  # batch, queries, keys, embedding, heads


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, H, **{"batch_first": True, **options})
    for name, parameter in module.named_parameters():  # biases are 0 at first
        if "bias" in name:
            nn.init.normal_(parameter)
    return module


def padding(keys: int = S) -> Tensor:
    """True where a key is padding."""
    return torch.arange(keys) >= torch.tensor([[keys], [keys - 2]])


def raised(fn: Callable[..., Any], *args: Any, low_precision: float = 0.0, grad: bool = True) -> tuple[GraphModule, list[str]]:
    """The graph after the rules for attention and for linears, and the reasons for what was declined. Checks that the graph
    still gives the same values, and the same gradients."""
    with torch.set_grad_enabled(grad):
        gm = capture(fn, *args)
        inputs = gm.meta["example_inputs"]
        canonicalize(gm)
        expected = run(gm, inputs)
        sites = Sites(strict=True)
        apply(ATTENTION_RULES, gm, sites)
        apply(LINEAR_RULES, gm, sites)
        gm.graph.lint()
        gm.recompile()
        assert check(gm, RAISED) == []
        actual = run(gm, inputs)
    for a, e in zip(actual, expected, strict=True):
        if low_precision:
            assert a.dtype == e.dtype
            assert (a - e).float().norm() <= low_precision * e.float().norm()
        else:
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert actual[0].is_contiguous() or not expected[0].is_contiguous()
    return gm, [s.reason or "" for s in sites]


def run(gm: GraphModule, inputs: list[Any]) -> list[Tensor]:
    """The first result, and the gradients of all inputs that require grad."""
    out = gm(*inputs)[0]
    leaves = [i for i in inputs if isinstance(i, Tensor) and i.requires_grad]
    if not out.requires_grad:
        return [out]
    weighted = (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
    return [out, *(g for g in torch.autograd.grad(weighted, leaves, allow_unused=True) if g is not None)]


def counts(gm: GraphModule) -> tuple[int, int]:
    """The number of linears and attentions; checks that nothing opaque is left."""
    opaque = (nn.functional.multi_head_attention_forward, torch._transformer_encoder_layer_fwd)
    assert not [n for n in gm.graph.nodes if is_call(n, *opaque) or is_call(n, torch._C._nn.linear)]
    linears = sum(is_call(n, ops.linear) for n in gm.graph.nodes)
    return linears, sum(is_call(n, ops.attention) for n in gm.graph.nodes)


def taken(fn: Callable[..., Any], *args: Any, linears: int, **options: Any) -> torch.fx.Node:
    """The one attention in what `fn` becomes, besides this many linears."""
    gm, reasons = raised(fn, *args, **options)
    assert (*counts(gm), reasons) == (linears, 1, [])
    return next(n for n in gm.graph.nodes if is_call(n, ops.attention))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_self_attention(batch_first: bool, bias: bool, training: bool) -> None:
    module = attention(batch_first=batch_first, bias=bias).train(training)
    node = taken(lambda x: module(x, x, x, need_weights=False)[0], random(B, S, E), linears=2)
    shape = attention_shape(node)
    assert (shape.batch_first, shape.self_attention, shape.packed_by_user) == (batch_first, True, "3hd")


@pytest.mark.parametrize("grad", [True, False])
def test_weights_that_nobody_reads(grad: bool) -> None:
    module = attention().eval()
    taken(lambda x: module(x, x, x)[0], random(B, S, E), linears=2, grad=grad)


def test_weights_that_are_returned() -> None:
    module = attention()
    gm, reasons = raised(lambda x: module(x, x, x), random(B, S, E))
    assert [n for n in gm.graph.nodes if is_call(n, ops.attention)] == []
    assert len(reasons) == 1 and "the attention weights are used" in reasons[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention(batch_first: bool) -> None:
    module = attention(batch_first=batch_first)
    q, memory = (random(B, S, E), random(B, T, E, seed=1)) if batch_first else (random(S, B, E), random(T, B, E, seed=1))
    node = taken(lambda q, m: module(q, m, m, need_weights=False)[0], q, memory, linears=3)
    assert attention_shape(node).packed_by_user == "2hd"
    taken(lambda q, m: module(q, m, m.relu(), need_weights=False)[0], q, memory, linears=4)


@pytest.mark.parametrize("batch_first", [True, False])
def test_separate_weights(batch_first: bool) -> None:
    module = attention(kdim=8, vdim=12, batch_first=batch_first)
    lead = (lambda n: (B, n)) if batch_first else (lambda n: (n, B))
    args = random(*lead(S), E), random(*lead(T), 8, seed=1), random(*lead(T), 12, seed=2)
    taken(lambda q, k, v: module(q, k, v, need_weights=False)[0], *args, linears=4)


def test_without_a_batch() -> None:
    module = attention()
    taken(lambda x: module(x, x, x, need_weights=False)[0], random(S, E), linears=2)
    missing = torch.where(torch.arange(S) > 3, -torch.inf, 0.0)
    mask = random(H, S, S, seed=3)
    masked = lambda x: module(x, x, x, need_weights=False, key_padding_mask=missing, attn_mask=mask)[0]  # noqa: E731
    taken(masked, random(S, E), linears=2)


BAND = torch.ones(S, S, dtype=torch.bool).triu(2)
MASKS: dict[str, tuple[dict[str, Any], bool]] = {
    "padding": ({"key_padding_mask": padding()}, True),
    "float padding": ({"key_padding_mask": padding().float() * -3}, False),
    "bool mask": ({"attn_mask": BAND}, True),
    "float mask": ({"attn_mask": torch.linspace(-1, 1, S * S).view(S, S)}, False),
    "bool mask for each head": ({"attn_mask": BAND.expand(B * H, S, S).contiguous()}, True),
    "float mask for each head": ({"attn_mask": random(B * H, S, S, seed=4)}, False),
    "both bool": ({"key_padding_mask": padding(), "attn_mask": BAND}, True),
    "both float": ({"key_padding_mask": padding().float() * -3, "attn_mask": torch.linspace(-1, 1, S * S).view(S, S)}, False),
}


@pytest.mark.parametrize(("masks", "is_bool"), MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks(masks: dict[str, Tensor], is_bool: bool, need_weights: bool, batch_first: bool) -> None:
    module = attention(batch_first=batch_first)
    x = random(B, S, E) if batch_first else random(S, B, E)
    node = taken(lambda x: module(x, x, x, need_weights=need_weights, **masks)[0], x, linears=2)
    assert (tensor(node.args[3]).dtype == torch.bool) == is_bool  # type: ignore[union-attr]
    assert not node.kwargs["causal"]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize(("mask", "missing"), [(BAND, padding().float() * -3), (random(S, S), padding()), (BAND, padding())])
def test_the_function_itself(mask: Tensor, missing: Tensor) -> None:
    """It takes masks as the user passes them; the module converts them to float."""
    module = attention()
    parameters = (module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0, module.out_proj.weight, module.out_proj.bias)

    def fn(x: Tensor) -> Tensor:
        attend = nn.functional.multi_head_attention_forward
        return attend(x, x, x, E, H, *parameters, need_weights=False, attn_mask=mask, key_padding_mask=missing)[0]

    taken(fn, random(S, B, E), linears=2)


def test_causal() -> None:
    module = attention()
    mask = nn.Transformer.generate_square_subsequent_mask(S)
    node = taken(lambda x: module(x, x, x, need_weights=False, attn_mask=mask, is_causal=True)[0], random(B, S, E), linears=2)
    assert node.kwargs["causal"] and node.args[3] is None
    # With padding, or if the weights are asked for, the mask itself counts.
    for more in ({"need_weights": True}, {"need_weights": False, "key_padding_mask": padding().float() * -3}):
        options: dict[str, Any] = {"attn_mask": mask, "is_causal": True, **more}
        node = taken(lambda x, o=options: module(x, x, x, **o)[0], random(B, S, E), linears=2)
        assert not node.kwargs["causal"] and node.args[3] is not None


@pytest.mark.parametrize("training", [True, False])
def test_dropout(training: bool) -> None:
    module = attention(dropout=0.25).train(training)
    gm = capture(lambda x: module(x, x, x, need_weights=False)[0], random(B, S, E))
    canonicalize(gm)
    apply(ATTENTION_RULES, gm, Sites(strict=True))
    (node,) = [n for n in gm.graph.nodes if is_call(n, ops.attention)]
    assert node.kwargs["dropout_p"] == (0.25 if training else 0)


@pytest.mark.parametrize(("options", "reason"), [({"add_bias_kv": True}, "add_bias_kv"), ({"add_zero_attn": True}, "add_zero_attn")])
def test_what_is_added_is_declined(options: dict[str, Any], reason: str) -> None:
    module = attention(**options)
    gm, reasons = raised(lambda x: module(x, x, x, need_weights=False)[0], random(B, S, E))
    assert [n for n in gm.graph.nodes if is_call(n, ops.attention)] == []
    assert len(reasons) == 1 and reason in reasons[0]


def test_autocast() -> None:
    module = attention()

    def fn(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x, x, x, need_weights=False)[0]

    gm, reasons = raised(fn, random(B, S, E), low_precision=0.02)
    assert (*counts(gm), reasons) == (2, 1, [])
    assert {n.kwargs["out_dtype"] for n in gm.graph.nodes if is_call(n, ops.linear)} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    module = attention().to(dtype)
    x = random(B, S, E).detach().to(dtype).requires_grad_()
    taken(lambda x: module(x, x, x, need_weights=False)[0], x, linears=2, low_precision=0.02)


def test_dynamic_lengths() -> None:
    module = attention()
    x = random(B, S, E)
    torch._dynamo.mark_dynamic(x, 1)
    node = taken(lambda x: module(x, x, x, need_weights=False)[0], x, linears=2)
    assert isinstance(tensor(node).shape[2], torch.SymInt)  # type: ignore[union-attr]


def test_the_results_memory() -> None:
    """A result that is returned directly is as contiguous as before."""
    module = attention(batch_first=False)
    taken(lambda x: module(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1), need_weights=False)[0], random(B, S, E), linears=2)


# --- nn.TransformerEncoderLayer


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(E, H, 32, **{"batch_first": True, "dropout": 0.0, **options})
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return module


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
def test_encoder_layer(norm_first: bool, activation: str, training: bool) -> None:
    """In inference without gradients, the layer is one opaque call."""
    module = layer(norm_first=norm_first, activation=activation).train(training)
    node = taken(module, random(B, S, E).detach(), linears=4, grad=training)
    assert site_path(node) == "self_attn"


ENCODER_MASKS: dict[str, dict[str, Any]] = {
    "padding": {"src_key_padding_mask": padding()},
    "mask": {"src_mask": BAND},
    "float mask": {"src_mask": torch.zeros(S, S).masked_fill(BAND, -torch.inf)},
    "any float mask": {"src_mask": torch.linspace(-1, 1, S * S).view(S, S) * BAND},
    "both": {"src_mask": BAND, "src_key_padding_mask": padding()},
    "causal": {"src_mask": nn.Transformer.generate_square_subsequent_mask(S), "is_causal": True},
}


@pytest.mark.parametrize("masks", ENCODER_MASKS.values(), ids=ENCODER_MASKS)
@pytest.mark.parametrize("training", [True, False])
def test_encoder_layer_with_masks(masks: dict[str, Any], training: bool) -> None:
    module = layer().train(training)
    taken(lambda x: module(x, **masks), random(B, S, E).detach(), linears=4, grad=training)


def test_encoder() -> None:
    module = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False).eval()
    gm, reasons = raised(lambda x: module(x, src_key_padding_mask=padding()), random(B, S, E).detach(), grad=False)
    assert (*counts(gm), reasons) == (8, 2, [])


def test_decoder_layer() -> None:
    torch.manual_seed(0)
    module = nn.TransformerDecoderLayer(E, H, 32, batch_first=True, dropout=0.0)
    gm, reasons = raised(lambda x, m: module(x, m), random(B, S, E), random(B, T, E, seed=1))
    assert (*counts(gm), reasons) == (7, 2, [])
