"""Masks are proved to be what they are, in every spelling and at every size, and never to be what they are not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from te_dynamo import ops
from te_dynamo.ir.graph import EXAMPLE, emit, is_call, tensor
from te_dynamo.passes.canonicalize import SDPA, canonicalize
from te_dynamo.passes.masks import Proof, compute, prove, simplify_masks
from te_dynamo.passes.masks import proof as proofs
from te_dynamo.sites import Sites
from tests.capture import capture
from tests.matrix import thinned

S = 12
CAUSAL, ALL = Proof("causal"), Proof("all")


def raise_sdpa(gm: GraphModule) -> None:
    """Replaces every `scaled_dot_product_attention` by `ops.attention`."""
    for node in list(gm.graph.nodes):
        if is_call(node, SDPA):
            q, k, v, mask, dropout_p, causal = node.args
            with gm.graph.inserting_before(node):
                attributes = {"causal": causal, "dropout_p": dropout_p, **node.kwargs}
                new = gm.graph.call_function(ops.attention, (q, k, v, mask), attributes)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
    gm.recompile()


def run(gm: GraphModule) -> Any:
    torch.manual_seed(0)
    return gm(*(v.node.hint if isinstance(v, torch.SymInt) else v for v in gm.meta["example_inputs"]))


def attentions(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if is_call(n, ops.attention)]


def guards(gm: GraphModule) -> int:
    for node in gm.graph.nodes:
        for size in getattr(tensor(node), "shape", ()):
            if isinstance(size, torch.SymInt):
                return len(size.node.shape_env.guards)
    return 0


def simplified(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[GraphModule, list[Proof | None]]:
    """The graph without the masks that were proved, and the proofs of its attentions. Checks that the graph's results are the same
    as before, and that no guard was added."""
    gm = capture(fn, *args, **kwargs)
    canonicalize(gm)
    raise_sdpa(gm)
    before, expected = guards(gm), run(gm)
    simplify_masks(gm, Sites(strict=True))
    gm.graph.lint()
    assert guards(gm) == before
    torch.testing.assert_close(run(gm), expected)
    return gm, [n.meta.get("te_mask") for n in attentions(gm)]


def attend(make: Callable[[int, Tensor], Tensor], size: int = S, **kwargs: Any) -> tuple[GraphModule, Proof, Node]:
    """An attention with the mask that `make(size, q)` builds."""

    def fn(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=make(q.shape[2], q))

    gm, (proof,) = simplified(fn, torch.randn(2, 2, size, 4, generator=torch.Generator().manual_seed(0)), **kwargs)
    assert proof is not None
    return gm, proof, attentions(gm)[0]


def row(s: int) -> Tensor:
    return torch.arange(s)[:, None]


def column(s: int) -> Tensor:
    return torch.arange(s)[None, :]


def count(s: int) -> Tensor:
    """Positions computed from a padding mask."""
    return torch.ones(2, s, dtype=torch.long).cumsum(-1) - 1


def additive(keep: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)


def decoder(s: int, q: Tensor) -> Tensor:
    """As older versions of transformers built it."""
    mask = torch.full((s, s), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
    position = torch.arange(mask.size(-1), device=q.device)
    mask.masked_fill_(position < (position + 1).view(mask.size(-1), 1), 0)
    return mask[None, None, :, :].expand(q.shape[0], 1, s, s)


def written_whole(s: int, q: Tensor) -> Tensor:
    mask = torch.full((s, s), -torch.inf)
    mask.triu_(1)
    return mask


SPELLINGS: dict[str, Callable[[int, Tensor], Tensor]] = {
    "le": lambda s, q: torch.le(column(s), row(s)),
    "ge": lambda s, q: row(s) >= column(s),
    "not gt": lambda s, q: ~(column(s) > row(s)),
    "lt plus one": lambda s, q: column(s) < row(s) + 1,
    "difference": lambda s, q: (row(s) - column(s)) >= 0,
    "negative": lambda s, q: -column(s) >= -row(s),
    "doubled": lambda s, q: 2 * column(s) <= 2 * row(s) + 1,
    "running count": lambda s, q: count(s)[:, None, None, :] <= count(s)[:, None, :, None],
    "shifted": lambda s, q: torch.arange(3, s + 3)[None, :] <= torch.arange(3, s + 3)[:, None],
    "or": lambda s, q: (column(s) < row(s)) | (column(s) == row(s)),
    "xor": lambda s, q: torch.ones(s, s, dtype=torch.bool) ^ (column(s) > row(s)),
    "tril bool": lambda s, q: torch.ones(s, s, dtype=torch.bool).tril(),
    "tril": lambda s, q: torch.tril(torch.ones(s, s)).bool(),
    "tril view": lambda s, q: torch.tril(torch.ones((s, s), dtype=torch.uint8)).view(1, 1, s, s).to(torch.bool),
    "tril == 1": lambda s, q: q.new_ones(s, s).tril() == 1,
    "not triu": lambda s, q: ~torch.triu(torch.ones(s, s, dtype=torch.bool), diagonal=1),
    "logical_not triu": lambda s, q: torch.ones(s, s).triu(1).logical_not(),
    "transposed": lambda s, q: torch.ones(s, s).triu().bool().t(),
    "transposed T": lambda s, q: torch.ones(s, s, dtype=torch.bool).triu().T,
    "permuted": lambda s, q: torch.ones(1, s, s, 1, dtype=torch.bool).triu(-s).permute(3, 0, 2, 1) & (column(s) <= row(s)),
    "masked_fill": lambda s, q: torch.zeros(s, s).masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf),
    "masked_fill == 0": lambda s, q: (
        (m := torch.tril(torch.ones(s, s))).masked_fill(m == 0, -torch.inf).masked_fill(m == 1, 0.0)  #
    ),
    "full triu": lambda s, q: torch.full((s, s), float("-inf")).triu(1),
    "full triu fill_value": lambda s, q: torch.triu(torch.full(size=(s, s), fill_value=-torch.inf), diagonal=1),
    "generate_square_subsequent_mask": lambda s, q: nn.Transformer.generate_square_subsequent_mask(s),
    "one minus": lambda s, q: (1.0 - torch.tril(torch.ones(s, s))) * torch.finfo(torch.float32).min,
    "where tensors": lambda s, q: torch.where(torch.ones(s, s).tril().bool(), torch.tensor(0.0), torch.tensor(-torch.inf)),
    "where scalars": lambda s, q: torch.where(column(s) <= row(s), 0.0, torch.finfo(torch.float32).min),
    "where in bfloat16": lambda s, q: torch.where(column(s) <= row(s), q.new_zeros(()).bfloat16(), torch.finfo(torch.bfloat16).min).float(),
    "zeros_like": lambda s, q: torch.zeros_like(torch.ones(s, s)).masked_fill(column(s) > row(s), -torch.inf),
    "sum of masks": lambda s, q: additive(column(s) <= row(s)) + additive(column(s) <= row(s) + 2),
    "expanded": lambda s, q: (column(s) <= row(s))[None, None].expand(q.shape[0], q.shape[1], -1, -1),
    "ellipsis": lambda s, q: torch.arange(s)[..., None] >= torch.arange(s),
    "sliced": lambda s, q: torch.arange(s + 4)[None, 2:-2] <= torch.arange(s + 4)[2:-2, None],
    "gathered": lambda s, q: torch.arange(s)[torch.arange(s)[None, :]] <= torch.arange(s)[torch.arange(s)[:, None]],
    "gathered rows": lambda s, q: torch.ones(s, s).tril().bool()[torch.arange(s)],
    "concatenated": lambda s, q: torch.cat([torch.zeros(s, 1), torch.full((s, s - 1), -torch.inf).triu()], -1),
    "window of its length": lambda s, q: (column(s) <= row(s)) & (column(s) > row(s) - q.shape[2]),
    "packed, one sequence": lambda s, q: (
        ((p := (torch.diff(a := torch.arange(s)[None], prepend=a[:, :1] - 1, dim=-1) != 1).cumsum(-1))[:, :, None] == p[:, None, :])
        & (column(s) <= row(s))
    ),
    "older transformers": decoder,
    "written whole": written_whole,
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_causal(name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proofs, "compare", lambda *_: None)  # symbolically only
    gm, proof, node = attend(SPELLINGS[name], dynamic=dynamic)
    assert proof == CAUSAL
    assert node.args[3] is None and node.kwargs["causal"] is True
    if name in ("older transformers", "written whole"):
        return  # a write in place is left to Inductor
    left = {n.target for n in gm.graph.nodes if n.op in ("call_function", "call_method")} - {ops.attention}
    assert left <= {operator.mul, operator.add, operator.sub, "size"}, left


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda s, q: torch.ones(s, s, dtype=torch.bool),
        lambda s, q: torch.zeros(s, s),
        lambda s, q: torch.ones(1, 1, dtype=torch.bool),
        lambda s, q: torch.zeros(q.shape[0], 1, 1, s),
        lambda s, q: column(s) < s,
        lambda s, q: (column(s) <= row(s)) | (column(s) > row(s)),
        lambda s, q: torch.ones_like(q[:, :1, :, :1], dtype=torch.bool),
        lambda s, q: (1.0 - torch.ones(q.shape[0], 1, 1, s)) * torch.finfo(torch.float32).min,
    ],
)
def test_attends_everywhere(make: Any, dynamic: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proofs, "compare", lambda *_: None)
    _, proof, node = attend(make, dynamic=dynamic)
    assert proof == ALL
    assert node.args[3] is None and node.kwargs["causal"] is False


@pytest.mark.parametrize("dynamic", [False, True])
def test_windows_are_told_and_left(dynamic: bool):
    _, proof, node = attend(lambda s, q: (column(s) <= row(s)) & (row(s) - column(s) < 5), dynamic=dynamic)
    assert proof == Proof("window", window=4)
    assert isinstance(node.args[3], Node) and node.kwargs["causal"] is False


def buffer(s: int, q: Tensor) -> Tensor:
    return BUFFERED.bias[:s, :s]


BUFFERED = nn.Module()
BUFFERED.register_buffer("bias", torch.ones(S, S, dtype=torch.bool).tril())


def halfway(s: int, q: Tensor) -> Tensor:
    mask = torch.ones(s, s, dtype=torch.bool).tril()
    mask[:, 2:3] = True
    return mask


def behind_a_view(s: int, q: Tensor) -> Tensor:
    mask = torch.ones(s, s, dtype=torch.bool)
    view = mask[None]
    mask.tril_()
    return view


def read_too_early(s: int, q: Tensor) -> Tensor:
    mask = torch.zeros(s, s)
    kept = mask.view(1, s, s)
    mask.masked_fill_(column(s) > row(s), -torch.inf)
    return kept.add_(1.0)


def written_in_a_part_of_its_source(s: int, q: Tensor) -> Tensor:
    source = torch.ones(s, s, dtype=torch.bool).tril()
    source[:, 2:3].fill_(True)
    return source & (column(s) < s)


REASON: dict[str, tuple[Callable[[int, Tensor], Tensor], str]] = {
    "bidirectional": (lambda s, q: column(s) >= row(s), "not proved to hide what comes later"),
    "one later": (lambda s, q: column(s) <= row(s) + 1, "not proved to hide what comes later"),
    "itself hidden": (lambda s, q: (column(s) < row(s)) | (column(s) == 0), "hides more than what comes later"),
    "a hole": (lambda s, q: (column(s) <= row(s)) & (column(s) != 3), "hides more than what comes later"),
    "diagonal of tril": (lambda s, q: torch.ones(s, s).tril(1).bool(), "not proved"),
    "inverted floats": (lambda s, q: torch.ones(s, s).tril() * -1e9, "adds"),
    "not low enough": (lambda s, q: (1.0 - torch.ones(s, s).tril()) * -100.0, "adds -100"),
    "a bias": (lambda s, q: (column(s) - row(s)) * 0.5, "positions"),
    "data": (lambda s, q: q[:, :1, :, :1] > 0, "depends on the input q"),
    "data in floats": (lambda s, q: torch.where(column(s) <= row(s), q[:, :1, :, :1].mT, -torch.inf), "depends on the input q"),
    "data through an unknown function": (lambda s, q: q[:, :1] @ q[:, :1].mT, "depends on the input q, through matmul"),
    "bits": (lambda s, q: torch.ones(s, s).tril().view(torch.int32) == 1, "bits"),
    "random": (lambda s, q: torch.rand(s, s) > 0.5, "rand"),
    "a buffer": (buffer, "depends on the buffer"),
    "written in part": (halfway, "writes in place"),
    "its source written in part": (written_in_a_part_of_its_source, "writes in place"),
    "written behind a view": (behind_a_view, "writes in place"),
    "a view read after a write": (read_too_early, "writes in place"),
}


@pytest.mark.parametrize("name", REASON)
def test_not_proved(name: str):
    make, reason = REASON[name]
    _, proof, node = attend(make)
    assert proof.kind == "unknown" and reason in proof.reason, proof
    assert isinstance(node.args[3], Node) and node.kwargs["causal"] is False


def test_positions_that_round_are_no_positions():
    """In bfloat16, 256 and 257 are equal: row 256 sees column 257."""
    rounded = lambda s, q: torch.arange(s).bfloat16()[None, :] <= torch.arange(s).bfloat16()[:, None]  # noqa: E731
    assert attend(rounded, size=200)[1] == CAUSAL
    assert attend(rounded, size=300)[1].kind == "unknown"
    assert attend(rounded, size=200, dynamic=True)[1].kind == "unknown"


def test_a_scalar_that_overflows_is_no_number():
    near = lambda s, q: (torch.arange(s)[None, :].to(torch.int8) + 256) <= torch.arange(s)[:, None]  # noqa: E731
    assert attend(near, dynamic=True)[1].kind == "unknown"


def test_a_mask_that_is_too_complicated_takes_no_time():
    def nested(s: int, q: Tensor) -> Tensor:
        mask = column(s) <= row(s)
        for n in range(40):
            mask = mask ^ (column(s) > row(s) + n)
        return mask

    proof = attend(nested, dynamic=True)[1]
    assert "too complicated" in proof.reason


def test_positions_that_overflow_are_no_positions():
    wrapped = lambda s, q: torch.arange(s)[None, :] * 2**61 <= torch.arange(s)[:, None] * 2**61  # noqa: E731
    assert attend(wrapped)[1].kind == "unknown"
    narrow = lambda s, q: (torch.arange(s)[None, :] + 120).to(torch.int8) <= (torch.arange(s)[:, None] + 120).to(torch.int8)  # noqa: E731
    assert attend(narrow, size=8)[1] == CAUSAL
    assert attend(narrow, size=9)[1].kind == "unknown"


@pytest.mark.parametrize("rows, columns", [(4, 9), (9, 4), (1, 5)])
def test_rectangular(rows: int, columns: int):
    """Causal is aligned at the top left, whatever the sizes."""

    def fn(q: Tensor, k: Tensor, bottom: bool) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        offset = k.shape[2] - q.shape[2] if bottom else 0
        return F.scaled_dot_product_attention(q, k, k, attn_mask=j <= i + offset)

    q, k = torch.randn(1, 2, rows, 4), torch.randn(1, 2, columns, 4)
    assert simplified(fn, q, k, False)[1] == [CAUSAL]
    bottom = simplified(fn, q, k, True)[1][0]
    if rows <= columns:  # otherwise some rows would be fully masked
        assert bottom is not None and bottom.kind == ("all" if rows == 1 else "unknown")


def test_a_mask_of_one_row_is_that_row_everywhere():
    row = lambda s, q: (torch.arange(s) <= 0)[None, :]  # noqa: E731
    assert attend(row)[1].kind == "unknown"


@pytest.mark.parametrize("make, causal", [(SPELLINGS["le"], True), (lambda s, q: torch.zeros(s, s), True), (REASON["one later"][0], False)])
def test_an_attention_that_is_causal_already(make: Any, causal: bool):
    gm = capture(lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=make(q.shape[2], q)), torch.randn(1, 1, S, 4))
    canonicalize(gm)
    raise_sdpa(gm)
    (node,) = attentions(gm)
    node.kwargs = {**node.kwargs, "causal": True}
    simplify_masks(gm, Sites())
    assert node.kwargs["causal"] is True and (node.args[3] is None) == causal


def test_a_mask_that_something_else_reads_stays():
    def fn(q: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.ones(S, S).tril().bool()
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask), mask

    gm, proofs = simplified(fn, torch.randn(1, 1, S, 4))
    assert proofs == [CAUSAL] and any(is_call(n, torch.tril) for n in gm.graph.nodes)


def test_the_generator_is_read_as_before():
    """An unused random draw upstream of a mask is a side effect: it must stay."""

    def fn(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros_like(torch.rand(S, S)))

    gm, proofs = simplified(fn, torch.randn(1, 1, S, 4))
    assert proofs == [ALL] and any(is_call(n, torch.rand) for n in gm.graph.nodes)


def test_what_the_symbols_do_not_settle_is_computed():
    blocks = lambda s, q: (torch.arange(s)[None, :] // 1) <= torch.arange(s)[:, None].clamp(min=0)  # noqa: E731
    gm, proof, _ = attend(blocks)
    assert proof == CAUSAL
    assert {n.target for n in gm.graph.nodes if n.op == "call_function"} == {ops.attention}
    assert attend(blocks, dynamic=True)[1].kind == "unknown"


def test_a_large_mask_is_not_computed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compute, "MAX_BYTES", 8 * S * S - 1)
    assert attend(lambda s, q: torch.arange(s)[None, :].clamp(min=0) <= torch.arange(s)[:, None])[1] == CAUSAL
    assert attend(lambda s, q: torch.arange(s)[None, :] - torch.arange(s)[:, None].clamp(min=0) <= 0)[1].kind == "unknown"


def test_a_length_within_the_window_is_causal():
    def make(s: int, q: Tensor) -> Tensor:
        return (column(s) <= row(s)) & (column(s) > row(s) - S)

    assert attend(make)[1] == CAUSAL
    assert attend(make, size=S + 1)[1] == Proof("window", window=S - 1)
    assert attend(make, dynamic=True)[1] == Proof("window", window=S - 1)


def test_a_bounded_dynamic_length_within_the_window_is_causal():
    q = torch.randn(1, 1, 8, 4)
    torch._dynamo.mark_dynamic(q, 2, min=2, max=S)
    make = lambda q: (column(q.shape[2]) <= row(q.shape[2])) & (column(q.shape[2]) > row(q.shape[2]) - S)  # noqa: E731
    assert simplified(lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=make(q)), q)[1] == [CAUSAL]


def test_two_dynamic_lengths_are_two():
    def fn(q: Tensor, k: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        return F.scaled_dot_product_attention(q, k, k, attn_mask=j <= i + k.shape[2] - q.shape[2])

    q, k = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 9, 4)
    proof = simplified(fn, q, k, dynamic=True)[1][0]
    assert proof is not None and proof.kind == "unknown"


# --- Models of transformers ------------------------------------------------------------------------------------------

SIZES = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, vocab_size=256, head_dim=16)
HIDES_MORE = Proof("window", window=7)
MODELS: dict[str, tuple[Any, list[Proof]]] = {
    "llama": (dict(num_hidden_layers=2), [CAUSAL, CAUSAL]),
    "qwen3": (dict(num_hidden_layers=1), [CAUSAL]),
    "mistral": (dict(num_hidden_layers=1, sliding_window=8), [HIDES_MORE]),
    "gemma3_text": (
        dict(num_hidden_layers=2, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        [HIDES_MORE, CAUSAL],
    ),
}


def lm(name: str, implementation: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SIZES, **kwargs, use_cache=False, attn_implementation=implementation)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def t5(implementation: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=1, vocab_size=256)
    config = transformers.T5Config(**sizes, use_cache=False, attn_implementation=implementation)
    return transformers.T5ForConditionalGeneration(config).eval()


def ids(batch: int = 2, length: int = 16) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: model(*args, **kwargs, use_cache=False).logits


def softmax_masks(gm: GraphModule) -> list[Node]:
    """The masks that are added before a softmax, by hand."""
    return [n.args[0].args[1] for n in gm.graph.nodes if is_call(n, F.softmax, torch.softmax) and is_call(n.args[0], torch.add)]


@pytest.mark.parametrize(("name", "dynamic"), thinned(list(MODELS), [False, True]))
def test_transformers_sdpa(name: str, dynamic: bool):
    kwargs, expected = MODELS[name]
    gm, proofs = simplified(logits(lm(name, "sdpa", **kwargs)), ids(), dynamic=dynamic)
    assert proofs == expected
    if expected == [CAUSAL] * len(expected):
        assert not any(is_call(n, torch.cumsum, torch.diff, torch.le, torch.bitwise_and) for n in gm.graph.nodes)


@pytest.mark.parametrize(("dtype", "dynamic"), thinned([torch.float32, torch.bfloat16, torch.float16], [False, True]))
def test_transformers_eager(dtype: torch.dtype, dynamic: bool):
    gm = capture(logits(lm("llama", "eager", num_hidden_layers=1).to(dtype)), ids(), dynamic=dynamic)
    canonicalize(gm)
    assert [prove(m) for m in softmax_masks(gm)] == [CAUSAL]


def test_transformers_t5():
    """A learned bias is not a mask; the encoder and the cross-attention mask nothing."""

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return model(input_ids=x, decoder_input_ids=x, use_cache=False).logits

    _, (encoder, decoder, cross) = simplified(run, t5("sdpa"), ids())
    assert encoder is not None and encoder.kind == "unknown" and cross == ALL
    assert decoder is not None and "parameter decoder.block.0" in decoder.reason, decoder
    gm = capture(run, t5("eager"), ids())
    canonicalize(gm)
    first, *others = (prove(m).kind for m in softmax_masks(gm))
    # With torch 2.11 transformers adds the encoder's mask, which masks nothing, after the learned bias, not to it.
    assert first in ("unknown", "all") and others == ["causal", "all"]


def test_transformers_with_an_attention_mask():
    def fn(model: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    padded = torch.ones(2, 16, dtype=torch.long)
    padded[0, :3] = 0
    _, (proof,) = simplified(fn, lm("llama", "sdpa", num_hidden_layers=1), ids(), padded)
    assert proof is not None and (proof.kind, proof.within) == ("padded", "causal")
    assert proof.described == "causal of the keys that input attention_mask says are valid"


# --- Random masks ----------------------------------------------------------------------------------------------------

Build = Callable[["Builder | Eager"], Any]


class Builder:
    """Makes a graph of torch IR from calls, at one static size or a symbolic one."""

    def __init__(self, size: int, dynamic: bool) -> None:
        self.graph = Graph()
        shape_env = ShapeEnv()
        mode = FakeTensorMode(shape_env=shape_env)
        how = DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC
        context = StatelessSymbolicContext(dynamic_sizes=[how, DimDynamic.STATIC])
        x = mode.from_tensor(torch.empty(size, 1), static_shapes=False, symbolic_context=context)
        self.x = self.graph.placeholder("x")
        self.x.meta[EXAMPLE] = x
        if dynamic:
            self.size: Any = self.graph.placeholder("size")
            self.size.meta[EXAMPLE] = x.shape[0]
        else:
            self.size = size

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return emit(self.graph, fn, args, kwargs, like=self.x)


class Eager:
    """Makes the same calls eagerly."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)


def truth(mask: Tensor) -> set[str]:
    """Everything that is true of a mask."""
    rows, columns = mask.shape[-2:]
    i, j = torch.arange(rows)[:, None], torch.arange(columns)
    attended = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((attended | (mask <= torch.finfo(mask.dtype).min)).all()):
        return set()
    shapes = {"causal": j <= i, "all": j <= columns, **{f"window {w}": (j <= i) & (i - j <= w) for w in range(max(rows, columns))}}
    return {kind for kind, shape in shapes.items() if bool((attended == shape).all())}


def claim(proof: Proof) -> str:
    return f"window {proof.window}" if proof.kind == "window" else proof.kind


small = st.integers(-3, 3)


def call(fn: Callable[..., Any], *parts: st.SearchStrategy[Any], **kwargs: Any) -> st.SearchStrategy[Build]:
    """A call to `fn`; arguments that are builds are built first."""

    def together(args: tuple[Any, ...]) -> Build:
        return lambda b: b(fn, *(a(b) if callable(a) else a for a in args), **kwargs)

    return st.tuples(*parts).map(together)


def constant(value: Any) -> st.SearchStrategy[Any]:
    return st.just(value)


def getitem(x: st.SearchStrategy[Build], index: Any) -> st.SearchStrategy[Build]:
    return x.map(lambda v: lambda b: b(operator.getitem, v(b), index))


def square(fn: Callable[..., Any], *fill: Any, **kwargs: Any) -> Build:
    return lambda b: b(fn, (b.size, b.size), *fill, **kwargs)


arange: st.SearchStrategy[Build] = st.just(lambda b: b(torch.arange, b.size))
ones: st.SearchStrategy[Build] = st.just(lambda b: b(torch.ones, b.size, dtype=torch.int64))
vectors = st.recursive(
    arange | arange | call(torch.sub, call(torch.cumsum, ones, constant(0)), constant(1)),
    lambda v: st.one_of(
        call(torch.add, v, small),
        call(torch.mul, v, small),
        call(torch.neg, v),
        call(torch.index_select, v, constant(0), arange),
        st.tuples(v, arange).map(lambda p: lambda b: b(operator.getitem, p[0](b), p[1](b))),
        st.tuples(v, small).map(lambda p: lambda b: b(torch.diff, (x := p[0](b)), prepend=b(torch.add, b(torch.narrow, x, 0, 0, 1), p[1]))),
        call(torch.cumsum, v, constant(0)),
    ),
    max_leaves=3,
)
plain = st.one_of(arange, arange, arange, vectors)
rows = plain.flatmap(lambda v: getitem(st.just(v), (slice(None), None)))
columns = plain.flatmap(lambda v: getitem(st.just(v), (None, slice(None))))
matrices = st.recursive(
    rows | columns,
    lambda m: st.one_of(call(torch.add, m, m), call(torch.sub, m, m), call(torch.add, m, small), call(torch.mul, m, small)),
    max_leaves=3,
)
compare = st.sampled_from([torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne])
atoms = st.one_of(
    call(torch.le, columns, rows),
    call(torch.gt, columns, rows),
    compare.flatmap(lambda fn: call(fn, columns, rows)),
    compare.flatmap(lambda fn: call(fn, matrices, matrices | small)),
    st.sampled_from([square(torch.full, True), square(torch.full, False)]),
)
shaped = st.sampled_from([torch.tril, torch.triu])
bools = st.recursive(
    atoms,
    lambda p: st.one_of(
        call(torch.bitwise_and, p, p),
        call(torch.bitwise_or, p, p),
        call(torch.bitwise_xor, p, p),
        call(torch.logical_not, p),
        call(torch.where, p, p, p),
        call(torch.unsqueeze, p, constant(0)),
        shaped.flatmap(lambda fn: call(fn, call(torch.bitwise_and, p, st.just(square(torch.full, True))), small)),
        call(torch.transpose, p, constant(-1), constant(-2)),
    ),
    max_leaves=4,
)
floats = st.one_of(
    call(torch.where, bools, constant(0.0), st.sampled_from([-torch.inf, torch.finfo(torch.float32).min, -100.0])),
    bools.flatmap(
        lambda p: call(torch.masked_fill, st.just(square(torch.zeros)), call(torch.logical_not, st.just(p)), constant(-torch.inf))  #
    ),
    shaped.flatmap(lambda fn: call(fn, st.just(square(torch.full, -torch.inf)), small)),
)
random_masks = st.one_of(bools, bools, floats)
checks = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@checks
@given(random_masks, st.integers(1, 6))
def test_random_masks(build: Build, size: int):
    """Symbolically: never a false claim. By computing the mask: the whole truth."""
    known, mask = truth(build(Eager(size))), build(Builder(size, dynamic=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proofs, "compare", lambda *_: None)
        proof = prove(mask)
    assert proof.kind == "unknown" or claim(proof) in known, proof
    if known & {"causal", "all"}:
        assert claim(prove(mask)) in known


@checks
@given(random_masks)
def test_random_masks_of_any_size(build: Build):
    mask = build(Builder(5, dynamic=True))
    (x,) = mask.graph.find_nodes(op="placeholder", target="x", sort=False)
    before = len(x.meta[EXAMPLE].fake_mode.shape_env.guards)
    proof = prove(mask)
    assert len(x.meta[EXAMPLE].fake_mode.shape_env.guards) == before
    for size in range(2, 9) if proof.kind != "unknown" else ():
        shorter = proof if proof.window is None else Proof("window", window=min(proof.window, size - 1))
        assert claim(shorter) in truth(build(Eager(size))), (proof, size)
