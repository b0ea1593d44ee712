"""Hugging Face models whose masks become formulas: padded and packed batches, windows, capped scores, sinks. Compared with eager attention
in float64, also at padded rows, with `flex_attention`'s definition on a CPU; linears stay in high precision, so errors are rounding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from te_dynamo.backend import observing, te_fp8
from te_dynamo.ir import op_of
from te_dynamo.ir.graph import is_call
from te_dynamo.lowering import registry
from te_dynamo.lowering.call import Call
from te_dynamo.lowering.native import attention as native
from te_dynamo.lowering.site import site
from te_dynamo.sites import Site
from te_dynamo.state import STATE
from tests.models import DECODER, ENCODER
from tests.partitioned import interpreted
from tests.pipeline import stages_of

S = 24


@pytest.fixture(autouse=True)
def on_a_cpu(no_codegen: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uses flex_attention as on a GPU, but also for short sequences and float32."""
    registry.load()
    key = ("attention", "native", registry.HIGH_PRECISION, "cpu")
    monkeypatch.setitem(registry._IMPLEMENTATIONS, key, native.FlexAttention())
    monkeypatch.setattr(native, "SHORT", 0)
    monkeypatch.setattr(native, "SIXTEEN_BITS", (torch.float32,))
    registry.implementation_of.cache_clear()
    torch._dynamo.reset()
    torch.manual_seed(0)
    with STATE.set_aside():
        yield
    registry.implementation_of.cache_clear()


def padding(*lengths: tuple[int, int], hole: int | None = None) -> Tensor:
    made = torch.stack([((torch.arange(S) >= a) & (torch.arange(S) < b)).long() for a, b in lengths])
    if hole is not None:
        made[:, hole] = 0
    return made


PADDED = {"attention_mask": padding((5, S), (0, 17))}
PACKED = {"position_ids": torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((9, 15), (4, 20))])}
DECODERS: dict[str, Any] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, num_hidden_layers=1)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER, num_hidden_layers=1, sliding_window=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**DECODER, num_hidden_layers=2, head_dim=16, sliding_window=8, query_pre_attn_scalar=9)
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**DECODER, num_hidden_layers=2, head_dim=16, num_local_experts=4, sliding_window=8)
    ),
    "bert": lambda: hf.BertModel(hf.BertConfig(**ENCODER, vocab_size=DECODER["vocab_size"], num_hidden_layers=1), add_pooling_layer=False),
}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "padded": ("llama", PADDED, "causal of the keys"),
    "padded with a hole": ("llama", {"attention_mask": padding((5, S), (0, 17), hole=9)}, "causal of the keys"),
    "an empty sequence": ("llama", {"attention_mask": padding((0, 0), (0, S))}, "causal of the keys"),
    "packed": ("llama", PACKED, "within the sequences"),
    "a window": ("mistral", {}, "window"),
    "a window, padded": ("mistral", PADDED, "window of the keys"),
    "capped": ("gemma2", {}, "window"),
    "sinks": ("gpt_oss", {}, "window"),
    "sinks, padded": ("gpt_oss", PADDED, "window of the keys"),
    "padded, full": ("bert", PADDED, "all of the keys"),
}


def results(call: Any, model: nn.Module, given: dict[str, Any]) -> list[Tensor]:
    model.zero_grad()
    out = call(input_ids=torch.arange(2 * S).reshape(2, S) % 100, **given)
    y = out.logits if "logits" in out else out.last_hidden_state
    y.square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", CASES)
def test_what_eager_attention_gives(name):
    which, given, mask = CASES[name]
    model = DECODERS[which]().eval()
    exact = copy.deepcopy(model) if which == "gpt_oss" else copy.deepcopy(model).double()  # its experts do not support float64
    call, found = (
        torch.compile(
            model, backend=te_fp8, fullgraph=True, options={"skip": ["*proj", "*dense", "*query", "*key", "*value", "*experts*"]}
        ),
        list[Site](),
    )
    with observing(lambda gm, sites, _: found.extend(s for s in sites.taken() if s.kind == "attention")):
        ours = results(call, model, given)
    assert all(site.detail["kernel"] == "flex_attention" for site in found), found
    assert mask in found[0].detail["mask"], found[0].detail
    for a, b in zip(ours, results(exact, exact, given), strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=5e-6, rtol=5e-4)


def test_a_causal_mask_alone_is_left_to_torch_s_kernels():
    """On a GPU they take half the time."""
    model, found = DECODERS["llama"](), list[Site]()
    with observing(lambda gm, sites, _: found.extend(s for s in sites.taken() if s.kind == "attention")):
        results(torch.compile(model, backend=te_fp8, fullgraph=True), model, {})
    assert [(site.detail["mask"], site.detail.get("kernel")) for site in found] == [("causal", None)]


def test_the_graph_that_calibrates_is_run_as_it_is_and_reads_the_mask():
    """Without generated code, `flex_attention` would materialize all scores."""
    with interpreted():
        graphs = stages_of(DECODERS["llama"](), torch.arange(2 * S).reshape(2, S) % 100, **PADDED).graphs

    def attentions(stage: str) -> tuple[int, int]:
        nodes = graphs[stage].graph.nodes
        kept = [n for n in nodes if (op := op_of(n)) is not None and op.kind == "attention"]
        return len(kept), sum(is_call(n, site) and Call.parse(n.args[0]).op == "attention" for n in nodes)

    assert attentions("lower") == (0, 1) and attentions("lower_calibrating") == (1, 0)
