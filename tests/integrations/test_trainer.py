"""transformers' Trainer: training, evaluation, checkpoints, and a run that was killed and resumed."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

import te_dynamo
from te_dynamo.backend import observing
from te_dynamo.integrations.transformers import TEFP8Callback
from tests.integrations.programs import run
from tests.integrations.trainer_program import SAVED, STEPS, arguments, digest, model, tokens
from tests.models import VOCABULARY

pytestmark = pytest.mark.usefixtures("no_codegen")


def test_killed_and_resumed_is_bit_equal_to_never_killed_and_differs_without_scales(hf_forks, tmp_path):
    whole, _ = run(hf_forks, "trainer_program", tmp_path / "whole")
    run(hf_forks, "trainer_program", tmp_path / "killed", dies=True)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [f"checkpoint-{SAVED}"]
    shutil.copytree(tmp_path / "killed", tmp_path / "without")
    (tmp_path / "without" / f"checkpoint-{SAVED}" / "scale_state.safetensors").unlink()

    resumed, said = run(hf_forks, "trainer_program", tmp_path / "killed", resumes=True)
    assert resumed == whole
    assert len(whole["losses"]) == STEPS
    assert "scale_state" not in said

    without, said = run(hf_forks, "trainer_program", tmp_path / "without", resumes=True)
    assert without["digest"] != whole["digest"]
    assert without["losses"][:SAVED] == whole["losses"][:SAVED]
    assert f"checkpoint-{SAVED} has no scale_state.safetensors" in said


def test_one_argument_compiles_trains_evaluates_and_keeps_the_model(tmp_path):
    """Checkpointing, accumulation, clipping, evaluation; and the saved model loads like one trained without te_fp8."""
    args = arguments(
        tmp_path,
        max_steps=2,
        save_steps=2,
        eval_steps=1,
        eval_strategy="steps",
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        max_grad_norm=0.5,
        load_best_model_at_end=True,
    )
    made = model()
    graphs = []
    trainer = Trainer(made, args, train_dataset=tokens(8), eval_dataset=tokens(2), callbacks=[TEFP8Callback(recipe="delayed")])
    with observing(lambda gm, sites, options: graphs.append(sites)):
        trainer.train()
    assert all(sites.taken() for sites in graphs)
    assert {"eval_loss", "loss"} <= set().union(*trainer.state.log_history)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in loaded.state_dict().items())
    saved = load_file(tmp_path / "checkpoint-2" / "scale_state.safetensors")
    torch.testing.assert_close(te_dynamo.scale_state(made).state_dict(), saved, rtol=0, atol=0)  # the best model's
    assert len([name for name in saved if name.endswith("grad_output.scale")]) == 7


def test_the_name_in_the_arguments_compiles_too(tmp_path):
    args = arguments(tmp_path, max_steps=1, save_strategy="no", torch_compile_backend="te_fp8")
    graphs = []
    with observing(lambda gm, sites, options: graphs.append(sites)):
        Trainer(model(), args, train_dataset=tokens(2)).train()
    assert graphs and graphs[0].taken()


def test_evaluation_alone_is_in_fp8(tmp_path):
    graphs = []
    trainer = Trainer(model(), arguments(tmp_path), eval_dataset=tokens(2), callbacks=[TEFP8Callback(recipe="current")])
    with observing(lambda gm, sites, options: graphs.append(options)):
        assert trainer.evaluate()["eval_loss"] > 0
    assert graphs[0].recipe.name == "current"


def test_another_backend_is_refused(tmp_path):
    with pytest.raises(ValueError, match="torch_compile_backend='inductor'.*another backend.*leave out one"):
        Trainer(model(), arguments(tmp_path, torch_compile_backend="inductor"), callbacks=[TEFP8Callback()])


def test_a_callback_that_is_added_later_says_that_it_is_late(tmp_path):
    trainer = Trainer(model(), arguments(tmp_path), train_dataset=tokens(2))
    trainer.add_callback(TEFP8Callback())
    with pytest.raises(RuntimeError, match="too late to compile.*Trainer\\(callbacks=\\["):
        trainer.train()


def test_options_without_compiling_are_refused():
    with pytest.raises(ValueError, match="no use for recipe"):
        TEFP8Callback(compile=False, recipe="current")


def test_another_run_s_checkpoint_is_refused_and_one_elsewhere_is_named(tmp_path):
    """Both runs have a `checkpoint-2`; the second is resumed in the first's folder."""
    for name, seed in (("mine", 0), ("other", 1)):
        made = model()
        with torch.no_grad():
            made.lm_head.weight += seed
        args = arguments(tmp_path / name, max_steps=2, save_steps=2)
        Trainer(made, args, train_dataset=tokens(8), callbacks=[TEFP8Callback()]).train()

    def resumed(**callback):
        args = arguments(tmp_path / "mine", max_steps=3, save_strategy="no")
        made = model()
        Trainer(made, args, train_dataset=tokens(8), callbacks=[TEFP8Callback(**callback)]).train(
            resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2")
        )
        return digest(made)

    with pytest.raises(ValueError, match="belongs to another run.*resume_from="):
        resumed()
    assert resumed(resume_from=tmp_path / "other" / "checkpoint-2")


def test_layers_that_you_compile_yourself_are_kept(tmp_path):
    made = model()
    for layer in made.model.layers:
        layer.compile(backend="te_fp8")
    args = arguments(tmp_path, max_steps=1, save_steps=1)
    Trainer(made, args, train_dataset=tokens(2), callbacks=[TEFP8Callback(compile=False)]).train()
    assert load_file(tmp_path / "checkpoint-1" / "scale_state.safetensors").keys() == te_dynamo.scale_state(made).state_dict().keys()


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_optimizers(optimizer, tmp_path):
    made = model()
    before = copy.deepcopy(made.state_dict())
    args = arguments(tmp_path, max_steps=2, save_strategy="no", optim=optimizer)
    Trainer(made, args, train_dataset=tokens(4), callbacks=[TEFP8Callback()]).train()
    changed = made.state_dict()
    assert all(not torch.equal(before[name], changed[name]) for name in before if "proj" in name)
    made.eval()
    ids = torch.randint(3, VOCABULARY, (2, 16))
    with torch.no_grad():  # weights that were quantized before are not used after this
        torch.testing.assert_close(torch.compile(made, backend="te_fp8")(ids).logits, made(ids).logits, rtol=0.2, atol=0.2)
