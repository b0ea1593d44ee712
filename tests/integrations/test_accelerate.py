"""Accelerate: the plugin, the names of backends, its own FP8 settings, and a run that was killed and resumed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from safetensors.torch import load_file

import te_dynamo
from te_dynamo.backend import observing
from te_dynamo.integrations.accelerate import TEFP8Plugin, checkpoint_scales
from te_dynamo.recipe import DelayedScaling
from tests.integrations.accelerate_program import batches, train
from tests.integrations.programs import run
from tests.integrations.trainer_program import model

pytestmark = pytest.mark.usefixtures("no_codegen")


def prepared(accelerator: Accelerator):
    made = model()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return made, accelerator.prepare(made, optimizer, schedule, batches(count=4))


# -- the names of backends


def test_each_name_that_torch_knows_is_a_member():
    member = DynamoBackend("TE_FP8")
    assert member is DynamoBackend("TE_FP8") is DynamoBackend("te_fp8") is DynamoBackend["TE_FP8"]
    assert member.value == str(member) == member.name == "TE_FP8"
    assert isinstance(member, str) and "TE_FP8" in DynamoBackend and "TE_FP8" in DynamoBackend.list()
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    assert DynamoBackend("AOT_EAGER_DECOMP_PARTITION").value == "AOT_EAGER_DECOMP_PARTITION"


def test_other_names_stay_unknown():
    with pytest.raises(ValueError, match="'TE_FP9' is not a valid DynamoBackend"):
        DynamoBackend("TE_FP9")
    assert "TE_FP9" not in DynamoBackend and "TE_FP9" not in DynamoBackend.list()
    assert DynamoBackend("INDUCTOR") is DynamoBackend.INDUCTOR


@pytest.mark.parametrize("how", ["argument", "plugin", "environment"])
def test_the_name_compiles(how, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "te_fp8")
    settings = {"argument": {"dynamo_backend": "te_fp8"}, "plugin": {"dynamo_plugin": TorchDynamoPlugin(backend="te_fp8")}}
    accelerator = Accelerator(cpu=True, **settings.get(how, {}))
    trained = accelerator.prepare(model())
    graphs = []
    with observing(lambda gm, sites, options: graphs.append(sites)):
        trained(input_ids=next(iter(batches())))
    assert len(graphs) == 1 and graphs[0].taken()


# -- the plugin


def test_options_reach_the_backend():
    plugin = TEFP8Plugin(recipe=DelayedScaling(amax_history_len=7), skip=["*.q_proj"], mode="max-autotune-no-cudagraphs", dynamic=False)
    accelerator = Accelerator(cpu=True, dynamo_plugin=plugin)
    seen = []
    with observing(lambda gm, sites, options: seen.append(options)):
        accelerator.prepare(model())(input_ids=next(iter(batches())))
    assert seen[0].recipe == DelayedScaling(amax_history_len=7)
    assert (seen[0].skip, seen[0].mode) == (("*.q_proj",), "max-autotune-no-cudagraphs")


def test_a_wrong_option_is_an_error_at_once():
    with pytest.raises(ValueError, match="Did you mean 'recipe'"):
        TEFP8Plugin(recipie="current")
    with pytest.raises(ValueError, match="recipe='fp9' is not allowed"):
        TEFP8Plugin(recipe="fp9")


def test_what_accelerate_launch_says_is_heard(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "max-autotune-no-cudagraphs")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "True")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "True")
    plugin = TEFP8Plugin()
    assert plugin.use_regional_compilation
    assert plugin.to_kwargs()["fullgraph"] and plugin.options["mode"] == "max-autotune-no-cudagraphs"


# -- what a program does with a prepared model


@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_model_trains(regional, precision):
    plugin = TEFP8Plugin(use_regional_compilation=regional)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2, dynamo_plugin=plugin)
    made, (trained, optimizer, schedule, data) = prepared(accelerator)
    before = copy.deepcopy(made.state_dict())
    losses = train(accelerator, trained, optimizer, schedule, data)
    assert all(loss == loss for loss in losses)
    unwrapped = accelerator.unwrap_model(trained, keep_torch_compile=False)
    assert unwrapped is made and made.state_dict().keys() == before.keys()
    assert all(not torch.equal(before[name], value) for name, value in made.state_dict().items() if "proj" in name)
    state = te_dynamo.scale_state(made).state_dict()  # not the head's: its logits stay in high precision, compiled by itself or not
    assert len([name for name in state if name.endswith("grad_output.scale")]) == 7
    assert te_dynamo.scale_state(trained).state_dict().keys() == state.keys()


# -- checkpoints


def test_killed_and_resumed_is_bit_equal_to_never_killed(hf_forks, tmp_path):
    whole, _ = run(hf_forks, "accelerate_program", tmp_path / "whole")
    run(hf_forks, "accelerate_program", tmp_path / "killed", dies=True)
    resumed, said = run(hf_forks, "accelerate_program", tmp_path / "killed", resumes=True)
    assert resumed == whole
    assert "scale_state" not in said
    (tmp_path / "killed" / "checkpoint" / "scale_state.safetensors").unlink()
    without, said = run(hf_forks, "accelerate_program", tmp_path / "killed", resumes=True)
    assert without["digest"] != whole["digest"]
    assert "has no scale_state.safetensors" in said


def test_each_model_has_a_file(tmp_path):
    accelerator = Accelerator(cpu=True, dynamo_plugin=TEFP8Plugin())
    first, _second = accelerator.prepare(model(), model())
    ids = next(iter(batches()))
    first(input_ids=ids).logits.sum().backward()
    accelerator.save_state(tmp_path)
    saved = load_file(tmp_path / "scale_state.safetensors")
    assert saved.keys() == te_dynamo.scale_state(first).state_dict().keys() and saved
    assert load_file(tmp_path / "scale_state_1.safetensors") == {}
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_a_model_that_you_compile_yourself_is_kept_on_demand(tmp_path):
    accelerator = Accelerator(cpu=True)
    made = model()
    made.compile(backend="te_fp8")
    trained = accelerator.prepare(made)
    trained(input_ids=next(iter(batches()))).logits.sum().backward()
    accelerator.save_state(tmp_path)
    assert not (tmp_path / "scale_state.safetensors").exists()
    checkpoint_scales(accelerator)
    checkpoint_scales(accelerator)
    accelerator.save_state(tmp_path)
    expected = te_dynamo.scale_state(made).state_dict()
    te_dynamo.scale_state(made).reset()
    accelerator.load_state(tmp_path)
    torch.testing.assert_close(te_dynamo.scale_state(made).state_dict(), expected, rtol=0, atol=0)
    assert len(accelerator._load_model_state_pre_hook) == 1
