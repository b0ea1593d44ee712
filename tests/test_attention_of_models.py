"""Every attention of popular models is a site, in the table's layout up to and above the short length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from te_dynamo.backend import planned
from te_dynamo.config import Options
from te_dynamo.sites import Site
from tests.capture import capture
from tests.models import DECODER, ENCODER, SMALL

LONGEST = 2048
EQUAL = DECODER | {"num_key_value_heads": 4}
PADDED, PACKED = "a padded batch", "packed sequences"
SELF, GROUPED = ("bs3hd", "bsh3d"), ("bshd_bs2hd", "bshd_bsh2d")


def lm(model: str, config: str, sizes: dict[str, Any] = DECODER, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(hf, model)(getattr(hf, config)(**sizes | {"num_hidden_layers": 1, "max_position_embeddings": LONGEST} | more))

    return build


def gptj() -> nn.Module:
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 1, "n_positions": LONGEST, "rotary_dim": 8, "vocab_size": 320, "use_cache": False}
    return hf.GPTJForCausalLM(hf.GPTJConfig(**sizes, bos_token_id=0, eos_token_id=1, attn_implementation="eager"))


def whisper() -> nn.Module:
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    wide = {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 320, "num_mel_bins": 8, "use_cache": False}
    tokens = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    positions = {"max_source_positions": 64, "max_target_positions": LONGEST}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **wide, **tokens, **positions))


# The model, the kind of its batch, and its layouts up to 512 tokens and above, in the order of the graph.
CASES: dict[str, tuple[Callable[[], nn.Module], str, list[tuple[str, str]]]] = {
    "llama": (lm("LlamaForCausalLM", "LlamaConfig"), "", [GROUPED]),
    "llama, a padded batch": (lm("LlamaForCausalLM", "LlamaConfig"), PADDED, [GROUPED]),
    "llama, packed sequences": (lm("LlamaForCausalLM", "LlamaConfig"), PACKED, [GROUPED]),
    "mistral": (lm("MistralForCausalLM", "MistralConfig", sliding_window=100), "", [GROUPED]),
    "qwen3": (lm("Qwen3ForCausalLM", "Qwen3Config", head_dim=16), "", [GROUPED]),
    "gemma2": (lm("Gemma2ForCausalLM", "Gemma2Config", head_dim=16, sliding_window=100), "", [GROUPED]),
    "gemma3": (lm("Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=16, sliding_window=100), "", [GROUPED]),
    "gpt_oss": (lm("GptOssForCausalLM", "GptOssConfig", head_dim=16, num_local_experts=4, sliding_window=100), "", [GROUPED]),
    "gpt_neox": (lm("GPTNeoXForCausalLM", "GPTNeoXConfig", EQUAL, rotary_pct=0.25), "", [SELF]),
    "gptj": (gptj, "", [SELF]),
    "phi": (lm("PhiForCausalLM", "PhiConfig", EQUAL), "", [SELF]),
    "olmo2": (lm("Olmo2ForCausalLM", "Olmo2Config", EQUAL), "", [SELF]),
    "bert": (lm("BertModel", "BertConfig", ENCODER, vocab_size=320), PADDED, [SELF]),
    "t5": (lambda: SMALL["t5"].model(), "", [SELF] * 4),
    "whisper": (whisper, "", []),
}


def inputs_of(name: str, length: int) -> dict[str, Tensor]:
    ids = torch.zeros(1, length, dtype=torch.long)
    if name == "whisper":
        return {"input_features": torch.zeros(1, 8, 128), "decoder_input_ids": ids}
    batch = CASES[name][1]
    given = {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}
    if batch == PADDED:
        given["attention_mask"] = torch.ones_like(ids)
    if batch == PACKED:
        given["position_ids"] = torch.arange(length)[None] % 50
    return given


def attentions(name: str, length: int) -> list[Site]:
    model = CASES[name][0]().eval()
    gm = capture(lambda **given: model(**given)[0], **inputs_of(name, length))
    sites = planned(gm, Options(), torch.device("cpu"))
    return [site for site in sites if site.kind == "attention"]


FAST = ("llama, packed sequences", "gpt_oss", "gptj", "whisper")


@pytest.mark.parametrize("length", [pytest.param(128, marks=pytest.mark.slow), 512, 513, pytest.param(2048, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES])
def test_every_attention_is_a_site_in_the_layout_of_the_table(name, length):
    sites = attentions(name, length)
    assert sites and all(site.reason is None for site in sites), [site.reason for site in sites]
    as_wanted = [site.layout for site in sites if "layout" not in site.detail]
    assert as_wanted == [pair[length > 512] for pair in CASES[name][2]]
    # The exceptions: Whisper's scaled queries, and T5's cross-attention.
    others = [site.detail["layout"] for site in sites if "layout" in site.detail]
    assert all("copies q" in why if name == "whisper" else "different GEMMs" in why for why in others)
