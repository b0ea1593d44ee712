"""PEFT's adapters, averaged weights, and optimizers that write them in other ways."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import te_dynamo
from te_dynamo.backend import observing
from te_dynamo.lowering.per_tensor import PerTensorLinears
from tests.models import SMALL, output
from tests.numerics import sqnr

peft = pytest.importorskip("peft", reason="needs peft: pip install -e .[peft]")
pytestmark = [
    pytest.mark.usefixtures("no_codegen"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning:transformers"),  # peft reads it
]
KINDS = pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lora", "dora"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def adapted(*, dora: bool = False) -> nn.Module:
    return peft.get_peft_model(SMALL["llama"].model(), peft.LoraConfig(r=16, target_modules="all-linear", use_dora=dora, lora_dropout=0.0))


def step(call, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    ids = SMALL["llama"].inputs()["input_ids"]
    loss = call(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def learning(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@KINDS
def test_adapters_learn_as_they_do_in_float32(dora):
    model = adapted(dora=dora)
    reference = copy.deepcopy(model)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    call = torch.compile(model, backend="te_fp8")
    optimizers = [torch.optim.AdamW(learning(m), lr=5e-3) for m in (model, reference)]
    graphs = []
    with observing(lambda gm, sites, options: graphs.append(sites)):
        losses = [(step(call, model, optimizers[0]), step(reference, reference, optimizers[1])) for _ in range(5)]
    assert len(graphs) == (25 if dora else 1)  # Dynamo does not trace all of DoRA
    assert sum(len(sites.taken()) for sites in graphs) == 22  # 7 linears, two for each one's adapter, and the attention
    assert all(abs(fp8 - exact) < 0.01 * exact for fp8, exact in losses)
    assert losses[-1][0] < losses[0][0] - 0.02
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


@KINDS
def test_adapters_are_right_from_the_first_step(dora):
    """B starts at zero: its gradient must not vanish, nor A's in the second step, where B is no longer zero."""
    model = adapted(dora=dora)
    reference = copy.deepcopy(model)
    call = torch.compile(model, backend="te_fp8")
    ids = SMALL["llama"].inputs()["input_ids"]
    for _ in range(2):
        for run, m in ((call, model), (reference, reference)):
            m.zero_grad()
            run(input_ids=ids, labels=ids).loss.backward()
        exact = dict(reference.named_parameters())
        errors = {n: sqnr(exact[n].grad, p.grad) for n, p in model.named_parameters() if p.requires_grad and exact[n].grad.norm() > 0}
        assert any("lora_B" in name for name in errors)
        assert {name: error for name, error in errors.items() if error < 18} == {}
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p -= 0.1 * exact[name].grad
                    exact[name].copy_(p)
    assert any("lora_A" in name for name in errors)


def test_the_frozen_base_is_quantized_once(monkeypatch):
    """With the provider that keeps weights on a CPU."""
    model = adapted()
    call = torch.compile(model, backend="te_fp8", options={"provider": "reference"})
    optimizer = torch.optim.AdamW(learning(model), lr=1e-3)
    quantized: list[set[int]] = []
    original = PerTensorLinears.quantize_weights

    def noting(self, call, weights):
        quantized[-1].update(w.data_ptr() for w in weights if not isinstance(w, FakeTensor))
        return original(self, call, weights)

    monkeypatch.setattr(PerTensorLinears, "quantize_weights", noting)
    for _ in range(5):
        quantized.append(set())
        step(call, model, optimizer)
    base = {p.data_ptr() for name, p in model.named_parameters() if "base_layer.weight" in name}
    assert len(base) == 7 and base <= quantized[2]  # until then an adapter that was zero is calibrating
    assert not any(base & ids for ids in quantized[3:])


def test_adapters_are_saved_and_merged_as_without(tmp_path):
    model = adapted()
    call = torch.compile(model, backend="te_fp8")
    optimizer = torch.optim.AdamW(learning(model), lr=5e-3)
    for _ in range(2):
        step(call, model, optimizer)
    model.save_pretrained(tmp_path)
    ids = SMALL["llama"].inputs()
    model.eval()
    expected = output(model(**ids))
    loaded = peft.PeftModel.from_pretrained(SMALL["llama"].model(), tmp_path).eval()
    torch.testing.assert_close(output(loaded(**ids)), expected, rtol=0, atol=0)
    with torch.no_grad():
        merged = torch.compile(loaded.merge_and_unload(), backend="te_fp8")
        assert 20 < sqnr(expected, output(merged(**ids)))


# -- averaged weights


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["swa", "ema"])
def test_averaged_weights_have_scales_of_their_own(average):
    model = SMALL["llama"].model()
    averaged = AveragedModel(model, multi_avg_fn=average)
    call = torch.compile(model, backend="te_fp8")
    in_fp8 = torch.compile(averaged, backend="te_fp8")
    ids = SMALL["llama"].inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = SWALR(optimizer, swa_lr=0.5)
    for _ in range(2):
        step(call, model, optimizer)
        averaged.update_parameters(model)
        schedule.step()
        averaged.eval()
        with torch.no_grad():
            assert 20 < sqnr(output(averaged(**ids)), output(in_fp8(**ids)))  # uses the current average
    assert te_dynamo.scale_state(averaged).sites() == []
    assert len(te_dynamo.scale_state(model).sites()) == 7


# -- optimizers


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_an_optimizer_s_writes_are_noticed_in_eval(how):
    model = SMALL["llama"].model()
    call = torch.compile(model, backend="te_fp8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **{how: True})
    ids = SMALL["llama"].inputs()
    for _ in range(2):
        model.train()
        loss = call(**ids, labels=ids["input_ids"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=how == "foreach")
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            assert 15 < sqnr(output(model(**ids)), output(call(**ids)))
