"""Small models with random weights that read bytes: for examples that download nothing."""

from __future__ import annotations

from help_topics import BYTES
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM


def small_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def small_bert(length: int, classes: int) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=BYTES,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=length,
        num_labels=classes,
    )
    return BertForSequenceClassification(config)
