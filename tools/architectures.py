"""Every architecture of the installed transformers, tiny and with random weights: does te_fp8 take it, and does it compute the same?

    python -m tools.architectures [causal] [masked] [seq2seq] [image]        about 10 s per architecture on one core

Runs forward and backward in float32, in eager mode and under te_fp8 (`recipe="current"`, AOTAutograd without code generation). Prints for
each how many graphs Dynamo makes with AOTAutograd alone and with te_fp8, the SQNR of the output and of all gradients together, and the
sites. An architecture that cannot be made tiny by setting sizes, or does not run in eager mode, is skipped with the reason. Exits with 1 if
te_fp8 fails although AOTAutograd alone does not, if the number of graphs differs, or if the error is larger than FP8's.
"""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor, nn
from transformers.models.auto import configuration_auto, modeling_auto

from te_dynamo import runtime
from te_dynamo.backend import observing, te_fp8
from te_dynamo.config import Options
from te_dynamo.sites import Site
from tests.numerics import sqnr

KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
SIZES: dict[int, str] = {  # the names of sizes in configurations: each is set if a configuration has it
    1: "n_group topk_group first_k_dense_replace num_hidden_groups bos_token_id n_groups",
    2: """num_hidden_layers num_key_value_heads n_layer num_layers n_layers encoder_layers decoder_layers num_experts_per_tok
        num_experts_per_token moe_k moe_topk eos_token_id linear_num_key_heads global_attn_every_n_layers mamba_expand""",
    4: """num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads num_experts num_local_experts
        n_routed_experts moe_num_experts mamba_n_heads linear_num_value_heads""",
    8: "rotary_dim mamba_d_state state_size ssm_state_size patch_size",
    10: "num_labels",
    16: """head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim sliding_window mamba_chunk_size chunk_size lightning_block_size
        linear_key_head_dim linear_value_head_dim""",
    32: "kv_lora_rank q_lora_rank embedding_size mamba_d_head image_size",
    64: """hidden_size n_embd d_model dim moe_intermediate_size shared_expert_intermediate_size word_embed_proj_dim lru_width""",
    128: """intermediate_size max_position_embeddings n_positions n_ctx n_inner ffn_dim d_ff hidden_dim encoder_ffn_dim
        decoder_ffn_dim""",
    256: "vocab_size",
    0: """pad_token_id attention_dropout hidden_dropout dropout resid_pdrop attn_pdrop embd_pdrop hidden_dropout_prob
        attention_probs_dropout_prob activation_dropout dropout_rate attention_dropout_prob layerdrop""",
}
OPTIONAL = ("rotary_dim", "q_lora_rank", "sliding_window")  # None turns the feature off
LARGEST, SECONDS = 30_000_000, 150
LEAST_OUTPUT, LEAST_GRADIENT = 8.0, 2.0  # dB; a mixture of experts may route a token to other experts, a sum may cancel


class TooLong(Exception):
    pass


def main(kinds: list[str]) -> int:
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    runtime.compile_inductor = runtime.compile_without_codegen
    signal.signal(signal.SIGALRM, _too_long)
    console, counts = Console(), Counter[str]()
    for kind in kinds or KINDS:
        for name, classes in KINDS[kind].items():
            verdict, text = looked_at(kind, name, classes if isinstance(classes, str) else classes[0])
            counts[verdict] += 1
            console.print(f"{verdict:5} {kind:8} {name:24} {text}", markup=False, highlight=False, soft_wrap=True)
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(counts["WRONG"] > 0)


def looked_at(kind: str, name: str, cls: str) -> tuple[str, str]:
    """("ok", "skip" or "WRONG", why)."""
    signal.alarm(SECONDS)
    doing = "configuration"
    try:
        torch.manual_seed(0)
        torch.compiler.reset()
        config = tiny(configuration_auto.CONFIG_MAPPING[name])
        doing = "model"
        model = made(getattr(transformers, cls), config)
        inputs = inputs_of(kind, model)
        doing = "eager mode"
        output, gradients = trained(model, model, inputs)
        doing = "AOTAutograd"
        graphs: list[Any] = []
        compiled = torch.compile(
            model, backend=lambda gm, given: graphs.append(gm) or runtime.compile_without_codegen(gm, given, Options())
        )
        trained(compiled, model, inputs)
        torch.compiler.reset()
        doing = "te_fp8"
        sites: list[list[Site]] = []
        with observing(lambda gm, found, _: sites.append(found.taken())):
            compiled = torch.compile(model, backend=te_fp8, options={"recipe": "current"})
            found, made_gradients = trained(compiled, model, inputs)
    except TooLong:
        return "skip", f"{doing}: more than {SECONDS} s"
    except Exception as error:
        return "WRONG" if doing == "te_fp8" else "skip", f"{doing}: {type(error).__name__} {str(error).strip()[:150]!r}"
    finally:
        signal.alarm(0)
    quality = sqnr(output, found), sqnr(gradients, made_gradients)
    kinds = dict(Counter(site.kind for group in sites for site in group))
    right = len(graphs) == len(sites) and quality[0] > LEAST_OUTPUT and quality[1] > LEAST_GRADIENT
    text = f"{len(graphs)} and {len(sites)} graphs, output {quality[0]:.1f} dB, gradients {quality[1]:.1f} dB, {kinds}"
    return "ok" if right else "WRONG", text


def tiny(cls: Any) -> Any:
    default = cls()
    names = {name: size for size, text in SIZES.items() for name in text.split()}
    values = {n: size for n, size in names.items() if hasattr(default, n) and not isinstance(getattr(cls, n, None), property)}
    for name in OPTIONAL:
        if getattr(default, name, None) is None:
            values.pop(name, None)
    if getattr(default, "kv_lora_rank", None):  # latent attention has no grouped heads
        values["num_key_value_heads"] = 4
    if kinds := list(dict.fromkeys(getattr(default, "layer_types", None) or ())):
        values["layer_types"] = (2 * kinds)[: max(2, len(kinds))]
        values["num_hidden_layers"] = len(values["layer_types"])
    return cls(**values)


def made(cls: Any, config: Any) -> nn.Module:
    """A model in eval mode, since each run would draw other dropout masks; with weights large enough for every part to matter."""
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters: sizes in a configuration of its own")
    model: nn.Module = cls._from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.08)
    return model


def inputs_of(kind: str, model: Any) -> dict[str, Any]:
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    ids = torch.randint(3, 200, (2, 32))
    inputs: dict[str, Any] = {"input_ids": ids}
    if "use_cache" in type(model).forward.__code__.co_varnames:
        inputs["use_cache"] = False
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def trained(call: Callable[..., Any], model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The output, and all gradients in one vector."""
    result = call(**inputs)
    output = result.logits if getattr(result, "logits", None) is not None else result[0]
    wanted = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True)
    whole = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(wanted, gradients, strict=True)])
    return output.detach(), whole


def _too_long(*_: Any) -> None:
    raise TooLong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
