"""Unmodified Hugging Face models on the device: one graph, every linear and attention a site, FP8's error and no more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf

from te_dynamo.backend import te_fp8
from te_dynamo.state import STATE
from tests.gpu.device import DEVICE
from tests.gpu.helpers import sites_of
from tests.models import CASES, DECODER, output
from tests.numerics import sqnr
from tests.test_models import check_sites, weights_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("small_sites_too")]
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
MOE = {"mixtral": ("MixtralForCausalLM", "MixtralConfig"), "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig")}


def step(run: Any, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model.zero_grad()
    y = output(run(**inputs))
    (y.float() * weights_of(y).to(DEVICE)).mean().backward()
    return y.detach()


def compare(model: Any, inputs: dict[str, torch.Tensor], least: float, **options: Any) -> list[Any]:
    """Compares two training steps and one inference step with the eager model. Returns the sites of the training graph."""
    reference = copy.deepcopy(model)
    run = torch.compile(model, backend=te_fp8, fullgraph=True, dynamic=False, options={"provider": "native"} | options)
    sites = sites_of(lambda: step(run, model, inputs))
    y, exact = step(run, model, inputs), step(reference, reference, inputs)
    assert sqnr(exact, y) > 17
    pairs = list(zip(reference.named_parameters(), model.parameters(), strict=True))
    gradients = {path: (a.grad, b.grad) for (path, a), b in pairs if a.grad is not None}
    largest = max(a.norm() for a, _ in gradients.values())
    far = {path: sqnr(a, b) for path, (a, b) in gradients.items() if a.norm() > 1e-5 * largest and sqnr(a, b) < least}
    assert not far, far
    model.eval(), reference.eval()
    with torch.no_grad():
        assert sqnr(output(reference(**inputs)), output(run(**inputs))) > 17
    return sites


def on_device(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.to(DEVICE) for name, t in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_models(name, dtype):
    case = CASES[name]
    check_sites(case, compare(case.model(dtype=dtype).to(DEVICE), on_device(case.inputs(dtype, length=64)), 7))


@pytest.mark.parametrize("memory", ["speed", "balanced", "saving"])
@pytest.mark.parametrize("recipe", ["delayed", "current", "rowwise"])
def test_what_is_kept(memory, recipe):
    case = CASES["qwen3"]
    model = case.model(dtype=torch.bfloat16).to(DEVICE)
    check_sites(case, compare(model, on_device(case.inputs(length=600)), 7, memory=memory, recipe=recipe))


@pytest.mark.parametrize("recipe", ["delayed", "current", "rowwise"])
@pytest.mark.parametrize("name", list(MOE))
def test_mixtures_of_experts(name, recipe):
    """Every token goes to every expert: else FP8's error in a router's input would route some tokens elsewhere."""
    model_name, config = MOE[name]
    torch.manual_seed(0)
    sizes = DECODER | EXPERTS | {"hidden_size": 128, "intermediate_size": 256}
    model = getattr(hf, model_name)(getattr(hf, config)(**sizes, num_hidden_layers=2)).to(DEVICE, torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    sites = compare(model, on_device(CASES["llama"].inputs(length=64)), 5, recipe=recipe)
    experts = [site for site in sites if "grouped" in site.kind]
    assert len(experts) == 4 and all(site.provider == "native" for site in experts)


@pytest.mark.parametrize(
    ("attention", "recipe"), [("fp8", "delayed"), ("fp8", "current"), ("fp8_both", "delayed"), ("fp8_both", "current")]
)
def test_attention_in_fp8_by_te(attention, recipe, te):
    """Heads of 128, which Hopper's kernels can train."""
    case, config = CASES["llama"], hf.LlamaConfig(**DECODER | {"hidden_size": 512}, num_hidden_layers=2)
    model = hf.LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    sites = compare(model, on_device(case.inputs(length=128)), 5, provider="auto", attention=attention, recipe=recipe)
    found = [site for site in sites if site.kind == "attention"]
    assert len(found) == 2 and all(site.provider == "te" for site in found), [(s.provider, s.reason) for s in found]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_generation_with_a_static_cache(mode):
    """Token by token. Of two tokens that are about equally likely FP8 may choose the other, so the logits are compared."""
    model = CASES["llama"].model(dtype=torch.bfloat16).to(DEVICE).eval()
    ids = on_device(CASES["llama"].inputs(batch=2, length=16))["input_ids"]
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        with STATE.set_aside(), torch.no_grad():
            cache = hf.StaticCache(config=model.config, max_cache_len=32)
            model(input_ids=ids[:, :8], past_key_values=cache, use_cache=True)
            run = torch.compile(model, backend=te_fp8, dynamic=False, options={"mode": mode}) if compiled else model
            logits = []
            for i in range(8, 16):
                torch.compiler.cudagraph_mark_step_begin()
                at = torch.tensor([i], device=DEVICE)
                y = run(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True, position_ids=at[None].expand(2, 1))
                logits.append(y.logits.clone())
            found.append(torch.cat(logits, 1))
    assert sqnr(found[0], found[1]) > 17
