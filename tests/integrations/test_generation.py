"""`generate` with a static cache, and pipelines."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, GenerationConfig, PreTrainedTokenizerFast, pipeline

import te_dynamo
from te_dynamo.backend import observing
from te_dynamo.recipe import Float8CurrentScaling
from tests.models import SMALL, VOCABULARY
from tests.numerics import sqnr

pytestmark = pytest.mark.usefixtures("no_codegen")
PROMPT = torch.arange(3, 11).reshape(1, 8)


def generate(model, **settings):
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "cache_implementation": "static",
        "use_cache": True,
        "eos_token_id": None,
    } | settings
    model.generation_config.eos_token_id = None
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), output_logits=True, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize("options", [{}, {"recipe": "current"}, {"recipe": Float8CurrentScaling(), "mode": "default"}])
def test_generate_decodes_in_fp8(options):
    model = SMALL["llama"].model().eval()
    plain = generate(copy.deepcopy(model), disable_compile=True)
    graphs = []
    with observing(lambda gm, sites, options: graphs.append(sites)):
        fp8 = generate(model, compile_config=te_dynamo.compile_config(**options))
    assert len(graphs) == 1 and len(graphs[0].taken()) >= 7
    assert torch.equal(plain.logits[0], fp8.logits[0])  # the prompt, which transformers does not compile
    assert 15 < sqnr(plain.logits[1], fp8.logits[1]) < 60
    assert fp8.sequences.shape == plain.sequences.shape


@pytest.mark.parametrize("recipe", ["current", {"*.q_proj": None, "*": "rowwise"}])
def test_a_generation_config_keeps_it(recipe, tmp_path):
    """In memory; `generation_config.json` drops it, for any backend."""
    config = GenerationConfig(cache_implementation="static", compile_config=te_dynamo.compile_config(recipe=recipe))
    assert "te_fp8" in repr(config) and hash(config)
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).compile_config is None


def test_wrong_options_are_an_error_at_once():
    with pytest.raises(ValueError, match="Did you mean 'recipe'"):
        te_dynamo.compile_config(recipie="current")


def test_a_compiled_model_generates_whole():
    model = SMALL["llama"].model().eval()
    plain = generate(copy.deepcopy(model), disable_compile=True)
    model.compile(backend="te_fp8", dynamic=True)
    fp8 = generate(model, disable_compile=True)
    assert all(15 < sqnr(a, b) < 60 for a, b in zip(plain.logits[:1], fp8.logits[:1], strict=True))


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "the", "cat", "sat", "on", "a", "mat"])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def test_a_pipeline_calls_the_compiled_model():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)
    pipe = pipeline("text-classification", model=BertForSequenceClassification(config), tokenizer=tokenizer(), device="cpu")
    sentences = ["the cat sat", "on a mat the cat sat"]
    plain = pipe(sentences)
    pipe.model.compile(backend="te_fp8", dynamic=True)
    graphs = []
    with observing(lambda gm, sites, options: graphs.append(sites)):
        fp8 = pipe(sentences)
    assert graphs and all(sites.taken() for sites in graphs)
    assert [a["label"] for a in plain] == [b["label"] for b in fp8]
    assert all(abs(a["score"] - b["score"]) < 0.02 and a["score"] != b["score"] for a, b in zip(plain, fp8, strict=True))
