"""Which linears are logits, in real models and in small ones made to mislead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from te_dynamo import ops
from te_dynamo.passes.canonicalize import canonicalize
from te_dynamo.passes.logits import find_logits
from te_dynamo.passes.raise_linear import LINEAR_RULES
from te_dynamo.passes.rules import apply
from te_dynamo.sites import Sites
from tests.capture import capture
from tests.matrix import thinned

VOCABULARY, WIDTH = 96, 32
TINY = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
ids = torch.arange(20).view(2, 10)


def logits_of(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[list[str], int]:
    """The paths of the logits, and how many linears there are."""
    gm = capture(fn, *args, **kwargs)
    canonicalize(gm)
    apply(LINEAR_RULES, gm, Sites(strict=True))
    found = find_logits(gm)
    return [n.meta["te_path"] for n in gm.graph.nodes if n in found], sum(n.target is ops.linear for n in gm.graph.nodes)


def llama(tied: bool, intermediate: int = 64) -> nn.Module:
    config = transformers.LlamaConfig(**TINY, intermediate_size=intermediate, use_cache=False, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=1, n_head=4, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TINY, intermediate_size=64, max_position_embeddings=128))


def gemma3() -> nn.Module:
    config = transformers.Gemma3TextConfig(**TINY, intermediate_size=64, head_dim=8, num_key_value_heads=2, use_cache=False)
    assert config.final_logit_softcapping is None
    return transformers.Gemma3ForCausalLM(config)


def t5(tied: bool) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0, use_cache=False
    )
    config.tie_word_embeddings = tied
    return transformers.T5ForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "Llama": (lambda: llama(False), "lm_head", 8),
    "Llama tied": (lambda: llama(True), "lm_head", 8),
    "Llama as wide as the vocabulary": (lambda: llama(False, VOCABULARY), "lm_head", 8),
    "GPT-2": (gpt2, "lm_head", 5),
    "BERT": (bert, "cls.predictions.decoder", 8),
    "Gemma3": (gemma3, "lm_head", 8),
    "T5": (lambda: t5(False), "lm_head", 17),
    "T5 tied": (lambda: t5(True), "lm_head", 17),
}


@pytest.mark.parametrize(("name", "labels"), thinned(list(MODELS), [False, True]))
def test_transformers(name, labels):
    make, path, linears = MODELS[name]
    model = make()
    model.loss_type = model.loss_type or "ForCausalLM"  # else the model's own warning breaks the graph
    inputs = {"input_ids": ids}
    if labels:
        inputs["labels"] = ids
    elif name.startswith("T5"):
        inputs["decoder_input_ids"] = ids
    assert logits_of(model, **inputs) == ([path], linears)


def test_layers_alone_have_no_logits():
    """Per-layer compile, or the rest of a model after a graph break: the head may be in the graph, but no embedding."""
    model = llama(False)
    assert logits_of(lambda h: model.lm_head(model.model.norm(h)), torch.randn(2, 4, WIDTH)) == ([], 1)


class Model(nn.Module):
    """An embedding, a linear, and what a test does with them."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(2 * VOCABULARY, WIDTH)
        self.middle = nn.Linear(WIDTH, VOCABULARY)
        self.back = nn.Linear(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(VOCABULARY)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.wide = nn.Linear(WIDTH, 2 * VOCABULARY)
        self.conv = nn.Conv1d(VOCABULARY, 1, 1)
        self.body = forward

    def forward(self, ids: torch.Tensor) -> Any:
        return self.body(self, ids)


POSITIVE: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "output": lambda m, i: m.head(m.embed(i)),
    "middle of the same size": lambda m, i: m.head(m.back(m.middle(m.embed(i)))),
    "softcap": lambda m, i: 30 * torch.tanh(m.head(m.embed(i)) / 30),
    "slice and cast": lambda m, i: m.head(m.embed(i))[:, -1:].float(),
    "cross_entropy": lambda m, i: F.cross_entropy(m.head(m.embed(i)).float().flatten(0, 1), i.flatten()),
    "nll": lambda m, i: F.nll_loss(F.log_softmax(m.head(m.embed(i)), -1).flatten(0, 1), i.flatten()),
    "z-loss": lambda m, i: torch.logsumexp(m.head(m.embed(i)), -1).square().mean(),
    "sampled token embedded": lambda m, i: m.embed(m.head(m.embed(i)).argmax(-1)),
    "topk": lambda m, i: m.head(m.embed(i)).topk(3),
    "index cast, viewed and clamped": lambda m, i: m.head(m.embed(i.clamp(min=0).long().view(-1))),
    "index shifted in place": lambda m, i: m.head(m.embed(shifted(i))),
    "functional embedding": lambda m, i: m.head(F.embedding(input=i, weight=m.embed.weight.bfloat16()).float()),
    "a larger position table": lambda m, i: m.head(m.embed(i) + m.positions(torch.arange(10))),
    "positions computed from the tokens": lambda m, i: m.head(m.embed(i) + m.positions(i.ne(0).long().cumsum(1))),
    "chunked loss": lambda m, i: sum(m.head(h).logsumexp(-1).sum() for h in m.embed(i).chunk(2)),
    "loss in a checkpoint": lambda m, i: checkpoint(F.log_softmax, m.head(m.embed(i)), -1, use_reentrant=False),
}


def shifted(i: torch.Tensor) -> torch.Tensor:
    out = i.new_zeros(i.shape)
    out[:, 1:] = i[:, :-1].clone()
    return out.masked_fill_(out == -100, 0)


@pytest.mark.parametrize("name", POSITIVE)
def test_logits(name):
    found, _ = logits_of(Model(POSITIVE[name]), ids)
    assert set(found) == {"head"}


NEGATIVE: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "linear after it": lambda m, i: m.back(m.middle(m.embed(i))),
    "linear after it, and an output": lambda m, i: (lambda y: (y, m.back(y)))(m.middle(m.embed(i))),
    "activation and linear": lambda m, i: m.back(F.gelu(m.middle(m.embed(i)))),
    "norm after it": lambda m, i: m.norm(m.middle(m.embed(i))),
    "attention after it": lambda m, i: (lambda q: F.scaled_dot_product_attention(q, q, q))(m.middle(m.embed(i))[:, None]),
    "matmul after it": lambda m, i: (lambda q: q @ q.mT)(m.middle(m.embed(i))),
    "convolution after it": lambda m, i: m.conv(m.middle(m.embed(i)).mT),
    "a layer in a checkpoint after it": lambda m, i: checkpoint(m.back, m.middle(m.embed(i)), use_reentrant=False),
    "no embedding": lambda m, i: m.head(F.one_hot(i, WIDTH).float()),
    "positions only": lambda m, i: m.wide(m.positions(torch.arange(10))),
    "another size": lambda m, i: m.wide(m.embed(i)),
    "the size of the position table": lambda m, i: m.wide(m.embed(i) + m.positions(torch.arange(10))),
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_no_logits(name):
    found, _ = logits_of(Model(NEGATIVE[name]), ids)
    assert not found


def test_a_tied_weight_is_logits_wherever_it_stands():
    """Soft embeddings: probabilities are multiplied by the embedding table again."""

    def fn(m, i):
        probabilities = F.linear(m.embed(i), m.embed.weight).softmax(-1)
        return m.back(probabilities)

    assert logits_of(Model(fn), ids) == (["embed"], 2)


def test_token_types_do_not_hide_the_vocabulary():
    model = Model(lambda m, i: None)
    types = nn.Embedding(2, WIDTH)
    pair = nn.Linear(WIDTH, 2)

    def fn(i, t):
        h = model.embed(i) + types(t)
        return model.head(h), pair(h)

    assert logits_of(fn, ids, ids.clamp(max=1)) == (["head"], 2)
