"""The contenders: each builds the same transformer layer in its own way, in bf16, with weights that require grad."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.model import LayerSize, llama_layer, rotary
from te_dynamo.lowering.te import library

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Built:
    """A layer that can run: the module of its parameters; `forward(length)`, which returns x [B, S, hidden] -> [B, S, hidden] for
    inputs of that length; and how many of its linears are in FP8 so far (None if not counted)."""

    module: nn.Module
    forward: Callable[[int], Forward]
    fp8_linears: Callable[[], int | None] = lambda: None


@dataclass(frozen=True)
class Case:
    """name: as in the tables; family: what the bars compare; lab: its name in the predictions, if there are any."""

    name: str
    family: str
    build: Callable[[LayerSize, torch.device], Built]
    missing: Callable[[torch.device], str | None] = lambda device: None
    lab: str | None = None


# --- what each needs


def needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"for CUDA devices, not {device.type}"


def needs_te(device: torch.device) -> str | None:
    return library.unavailable(device) or needs_cuda(device)


def needs_torchao(device: torch.device) -> str | None:
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed (pip install torchao)"
    return needs_cuda(device)


# --- Hugging Face's layer, compiled in one way or another


def compiled(size: LayerSize, device: torch.device, layer: nn.Module, run: Any) -> Built:
    def forward(length: int) -> Forward:
        cos, sin = rotary(size, length, device)
        return lambda x: run(x, cos, sin)

    return Built(layer, forward)


def inductor(size: LayerSize, device: torch.device) -> Built:
    layer = llama_layer(size, device)
    return compiled(size, device, layer, torch.compile(layer, dynamic=False))


def inductor_cudnn(size: LayerSize, device: torch.device) -> Built:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    layer = llama_layer(size, device)
    compiled_layer = torch.compile(layer, dynamic=False)

    def run(*args: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return compiled_layer(*args)

    return compiled(size, device, layer, run)


def torchao(recipe: str, size: LayerSize, device: torch.device) -> Built:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    layer = llama_layer(size, device)
    convert_to_float8_training(layer, config=Float8LinearConfig.from_recipe_name(recipe))
    return compiled(size, device, layer, torch.compile(layer, dynamic=False))


def te_linear(size: LayerSize, device: torch.device) -> Built:
    """TE's linears in Hugging Face's layer, with TE's own support for torch.compile (2.20.2: for recipes without state)."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    layer, recipe = llama_layer(size, device), Float8CurrentScaling()
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                swapped = te.Linear(child.in_features, child.out_features, bias=False, params_dtype=torch.bfloat16, device=device)
                with torch.no_grad():
                    swapped.weight.copy_(child.weight)
                setattr(parent, name, swapped)

    def run(*args: Tensor) -> Tensor:
        with te.autocast(enabled=True, recipe=recipe):
            return layer(*args)

    return compiled(size, device, layer, torch.compile(run, dynamic=False))


def te_fp8(provider: str, recipe: str, size: LayerSize, device: torch.device) -> Built:
    from te_dynamo.backend import observers
    from te_dynamo.backend import te_fp8 as backend

    layer, linears = llama_layer(size, device), []

    def count(gm: Any, sites: Any, options: Any) -> None:
        linears.append(sum("linear" in site.kind for site in sites.taken()))

    observers.append(count)  # never removed: the process measures nothing else
    run = torch.compile(layer, backend=backend, dynamic=False, options={"provider": provider, "recipe": recipe})
    built = compiled(size, device, layer, run)
    return Built(layer, built.forward, lambda: linears[-1] if linears else None)


# --- TE's own layer


def te_modules(recipe: str | None, size: LayerSize, device: torch.device) -> Built:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling

    torch.manual_seed(0)
    layer = te.TransformerLayer(
        size.hidden,
        size.ffn,
        size.heads,
        num_gqa_groups=size.kv_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        self_attn_mask_type="causal",
        params_dtype=torch.bfloat16,
        fuse_qkv_params=True,
        bias=False,
        activation="swiglu",
        normalization="RMSNorm",
        attn_input_format="bshd",
        device=device,
    )
    chosen = {"delayed": DelayedScaling, "current": Float8CurrentScaling}[recipe]() if recipe else None
    frequencies = te.RotaryPositionEmbedding(size.head_size, rotary_base=500_000.0)

    def forward(length: int) -> Forward:
        embedding = frequencies(length)

        def run(x: Tensor) -> Tensor:
            with te.autocast(enabled=True, recipe=chosen) if chosen is not None else nullcontext():
                return layer(x, rotary_pos_emb=embedding)

        return run

    return Built(layer, forward)


BASELINE = "Inductor bf16"
CASES = (
    Case(BASELINE, "bf16", inductor, lab="bf16 Inductor"),
    Case("Inductor bf16, cuDNN attention", "bf16", inductor_cudnn, needs_cuda),
    Case("TE modules, bf16", "te bf16", partial(te_modules, None), needs_te),
    Case("TE modules, FP8 delayed", "te", partial(te_modules, "delayed"), needs_te),
    Case("TE modules, FP8 current", "te", partial(te_modules, "current"), needs_te),
    Case("te.Linear compiled, FP8 current", "te", te_linear, needs_te),
    Case("torchao tensorwise + Inductor", "torchao", partial(torchao, "tensorwise"), needs_torchao),
    Case("torchao rowwise + Inductor", "torchao", partial(torchao, "rowwise"), needs_torchao),
    Case("te_fp8 native, delayed", "ours", partial(te_fp8, "native", "delayed"), lab="te_fp8 native"),
    Case("te_fp8 native, current", "ours", partial(te_fp8, "native", "current")),
    Case("te_fp8 te, delayed", "ours", partial(te_fp8, "te", "delayed"), needs_te),
    Case("te_fp8 te, current", "ours", partial(te_fp8, "te", "current"), needs_te),
)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
