"""`te_dynamo.estimate` and its command: a whole step of a small model for a GPU that is not present, against plain arithmetic."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import te_dynamo
from te_dynamo.__main__ import main
from te_dynamo.lab import command, pretend
from te_dynamo.lab.estimate import EstimateFailed
from te_dynamo.lab.isolated import isolated
from te_dynamo.lab.stand_in import building
from te_dynamo.lab.step import _differentiable
from te_dynamo.lowering.devices import GPUS, PEAKS, gpu_named
from tests.lab import factories

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENS, HIDDEN = 4096, 2048
FORWARD = 2 * 2 * TOKENS * HIDDEN * 2 * HIDDEN / 1e12  # TFLOPs of both linears
reason = pretend.unavailable()
possible = pytest.mark.skipif(reason is not None, reason=str(reason))


@possible
def test_the_command(forks):
    """With all its options, in a separate process; the FLOPs are those of the two linears."""
    arguments = ["--device", "h100", "--set", f"tokens={TOKENS}", "--recipe", "delayed", "--json", "--kernels"]
    command = ["estimate", "tests.lab.factories:mlp", *arguments]
    (found,) = json.loads(forks.run(f"from te_dynamo.__main__ import main; assert main({command}) == 0", path=[str(ROOT)]))
    inductor, fp8 = found["sides"]
    assert found["device"] == "NVIDIA H100 80GB HBM3" and found["training"]
    for side in (inductor, fp8):
        assert side["tflop"] == pytest.approx(3 * FORWARD)
        assert side["gemms"] == 6
        assert side["kernels"] == len(side["launches"])
        assert side["ms"] == pytest.approx(sum(launch["us"] for launch in side["launches"]) / 1e3)
        assert side["ms"] == pytest.approx(sum(side["groups"].values()) / 1e3)
        assert side["ms"] == pytest.approx(side["forward_ms"] + side["backward_ms"])
        # The norm's gradient, with its weight's as partial sums: four matrices, and the sums once.
        (both,) = [launch for launch in side["launches"] if " ws:f32[524288]" in launch["detail"]]
        assert both["bytes"] == pytest.approx(4 * 2 * TOKENS * HIDDEN + 4 * 524288, rel=1e-3)
    assert inductor["fp8_tflop"] == 0 and fp8["fp8_tflop"] == fp8["tflop"]
    peak = PEAKS["NVIDIA H100 80GB HBM3"]
    overhead = 6 * 1.5e-3
    assert inductor["groups"]["GEMMs"] / 1e3 == pytest.approx(3 * FORWARD / (0.75 * peak.bf16_tflops) * 1e3 + overhead, rel=1e-3)
    assert fp8["groups"]["GEMMs"] / 1e3 == pytest.approx(3 * FORWARD / (0.70 * peak.fp8_tflops) * 1e3 + overhead, rel=1e-3)
    weights = [launch for launch in fp8["launches"] if launch["role"] == "weight"]
    each = (2 + 1 + 1) * HIDDEN * 2 * HIDDEN  # read, written both ways
    assert sum(launch["bytes"] for launch in weights) == pytest.approx(2 * each, rel=0.01)
    # Kept by Inductor: the norm's reciprocal deviation, the normed rows, and `up`'s output in bf16, GELU's in bf16.
    rows = TOKENS * HIDDEN
    assert inductor["saved"] == pytest.approx(2 * rows + 2 * 2 * rows + 2 * 2 * rows, rel=0.01)
    assert {site["path"] for site in found["sites"] if site["provider"]} == {"up", "down"}
    assert 1 < found["speedup"] < 2 and "roofline" in found["how_far"]


@possible
@pytest.mark.parametrize(("memory", "hidden"), [("balanced", HIDDEN), ("speed", HIDDEN), ("balanced", HIDDEN + 64)])
def test_between_experts_gemms_one_kernel_stores_only_fp8(memory, hidden, forks):
    """Forward: the activation, with what is kept of its inputs. Backward: its gradient, with a scale for each row. Whatever the number of
    columns: Inductor would pad the rows of what it stores to 128 bytes, and then copy them for each GEMM."""
    sizes = ["--set", f"tokens={TOKENS}", "--set", f"hidden={hidden}", "--set", f"inner={2 * hidden}"]
    arguments = ["--device", "h100", *sizes, "--option", f'memory="{memory}"', "--json", "--kernels"]
    command = ["estimate", "tests.lab.factories:experts", *arguments]
    (found,) = json.loads(forks.run(f"from te_dynamo.__main__ import main; assert main({command}) == 0", path=[str(ROOT)]))
    launches = [SimpleNamespace(**launch) for launch in found["sides"][1]["launches"]]
    generated = [launch for launch in launches if launch.kind == "triton" and launch.bytes > TOKENS * hidden]
    assert [launch.phase for launch in generated] == ["forward"] * 2 + ["backward"] * 2  # the others cast x and the gradient
    assert not any(f"out:bf16[{TOKENS}x" in launch.detail for launch in generated)
    activation, gradient = generated[1], generated[3]
    inner = TOKENS * 2 * hidden  # the elements of gate, and of up
    kept = 2 * inner if memory == "balanced" else 0
    assert activation.bytes == pytest.approx(2 * 2 * inner + inner + kept, rel=0.04)
    assert gradient.bytes == pytest.approx(2 * inner + (kept or 2 * 2 * inner) + 2 * inner, rel=0.04)


@possible
def test_a_generated_attention_computes_what_its_window_shows(forks):
    command = ["estimate", "tests.lab.factories:windowed", "--device", "h100", "--json", "--kernels"]
    (found,) = json.loads(forks.run(f"from te_dynamo.__main__ import main; assert main({command}) == 0", path=[str(ROOT)]))
    generated = [launch for launch in found["sides"][1]["launches"] if launch["attention"] == "generated"]
    products = 2 * 2 * 8 * 1024 * 1024 * 64 * (8 + 7 + 6) // 64  # of 8 x 8 blocks
    assert [(launch["kind"], launch["flops"]) for launch in generated] == [("attention", 2 * products), ("attention", 5 * products)]
    assert any("counts as hiding nothing" in note for note in found["notes"])


@possible
def test_a_model_as_it_is_here():
    """Real tensors on the CPU, after autograd has run in this process: nothing changes. In inference, weights are quantized once."""
    model, x = factories.mlp(tokens=4096, hidden=256)
    model(x).sum().backward()
    before = {name: (p, p.device, p.grad.clone()) for name, p in model.named_parameters()}
    found = te_dynamo.estimate(model, x, device="rtx4090", train=False, options={"recipe": "current"})
    assert {name: (p, p.device) for name, p in model.named_parameters()} == {name: kept[:2] for name, kept in before.items()}
    assert all(torch.equal(p.grad, before[name][2]) for name, p in model.named_parameters())
    assert model.training and x.device.type == "cpu" and not torch.cuda.is_available()
    assert found.device == "NVIDIA GeForce RTX 4090" and not found.training
    assert found.inductor.gemms == found.fp8.gemms == 2 and found.inductor.saved == 0 and found.inductor.backward_ms == 0
    assert found.fp8.fp8_tflop == found.fp8.tflop and not found.fp8.groups["weights to FP8"]
    for text in (str(found), found.to_markdown()):
        assert "Predicted, not measured" in text and "current" in text and "down" in text


@possible
def test_opaque_operators_are_looked_into():
    """When emulated, the products are in float32, and every operator around them is a kernel."""
    with torch.device("meta"):
        model, x = factories.mlp()
    found = te_dynamo.estimate(model, x, train=False, options={"provider": "reference", "recipe": "mxfp8"})
    assert found.fp8.gemms == 2 and found.fp8.fp8_tflop == 0
    assert found.fp8.kernels > 5 * found.inductor.kernels and found.speedup < 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["factories.mlp"], "'factories.mlp' is not MODULE:FACTORY"),
        (["no_such_module:make"], "'no_such_module' cannot be imported"),
        (["tests.lab.factories:nothing"], "has no function 'nothing'"),
        (["tests.lab.factories:NUMBER"], "is a int, not a function"),
        (["tests.lab.factories:mlp", "--device", "h9"], "knows no device 'h9'; it knows h100"),
        (["tests.lab.factories:mlp", "--recipe", "delaid"], "Did you mean 'delayed'?"),
        (["tests.lab.factories:mlp", "--option", "skip"], "--option 'skip' is not KEY=JSON"),
        (["tests.lab.factories:mlp", "--option", "skipp=[]"], "unknown option 'skipp'. Did you mean 'skip'?"),
        (["tests.lab.factories:model_alone", "--real"], "gives no example inputs, only a Linear: it must return (model, args)"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(arguments, says, capsys):
    assert main(["estimate", *arguments]) == 1
    said = capsys.readouterr()
    assert says in said.err and "Traceback" not in said.err and not said.out


@possible
def test_factories_on_fake_tensors():
    def work() -> None:
        pretend.pretend(gpu_named("h100"))
        with FakeTensorMode():
            model, (x,), kwargs = command._build("tests.lab.factories:mlp", {"hidden": 64}, real=False)()
            assert {t.device.type for t in [*model.parameters(), x, model.tables[0]]} == {"cuda"} and not kwargs
            assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and x.requires_grad and x.is_leaf
            _, args, kwargs = command._build("tests.lab.factories:by_keywords", {}, real=False)()
            assert args == () and kwargs["input"].shape == (2, 16)
            for name, says in WRONG.items():
                with pytest.raises(ValueError, match=says):
                    command._build(f"tests.lab.factories:{name}", {}, real=False)()
            with building():
                tied = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
                tied[2].weight = tied[0].weight
                tied.requires_grad_(False).bfloat16()
                nn.init.trunc_normal_(tied[0].weight, std=0.02)  # samples until all values are within bounds
            assert tied[0].weight is tied[2].weight and tied[0].weight.dtype == torch.bfloat16 and not tied[0].weight.requires_grad
            assert tied[1].running_mean.dtype == torch.bfloat16 and tied[1].num_batches_tracked.dtype == torch.int64

    isolated(work)


WRONG = {
    "model_alone": "gives no example inputs",
    "needs_values": "failed: .*Remedy, if fake tensors are the reason: --real",
    "keywords_of_no_dict": "must return keywords as a dict, not a list",
}


@possible
def test_a_model_that_reads_values_is_told_so():
    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float(x.sum().numpy())

    with pytest.raises(EstimateFailed, match="does not run on fake tensors.*estimate a part of the model"):
        te_dynamo.estimate(Reads(16, 16), torch.ones(2, 16), train=False)
    with pytest.raises(ValueError, match="no output requires grad.*--eval"):
        _differentiable({"logits": torch.ones(2), "hidden": [torch.ones(2)]})
    with pytest.raises(TypeError, match="takes an nn.Module, not function"):
        te_dynamo.estimate(test_a_process_of_its_own, torch.ones(2))


@possible
def test_after_a_backward_with_threads_it_says_what_to_do(monkeypatch):
    """Where there is a GPU, the process that forks has autograd's threads, and its forks cannot run a backward."""

    def measure(*args, **kwargs):
        raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing.")

    monkeypatch.setattr("te_dynamo.lab.estimate.measure", measure)
    with pytest.raises(EstimateFailed, match="already run a backward.*before the first backward, or use `python -m te_dynamo estimate`"):
        te_dynamo.estimate(nn.Linear(16, 16), torch.ones(2, 16))


def test_a_process_of_its_own():
    kept: list[int] = []

    def work() -> int:
        kept.append(1)
        print("to stderr")
        return 42

    assert isolated(work) == 42 and not kept
    with pytest.raises(ValueError, match="as it was raised"):
        isolated(lambda: (_ for _ in ()).throw(ValueError("as it was raised")))
    with pytest.raises(RuntimeError, match="ended with 7 before it had a result"):
        isolated(lambda: os._exit(7))

    class Local(Exception):
        pass

    with pytest.raises(RuntimeError, match="Local: what cannot be sent"):
        isolated(lambda: (_ for _ in ()).throw(Local("what cannot be sent")))


def test_devices_have_sources_and_names():
    assert {"h100", "h200", "b200", "gb200", "l40s", "rtx4090", "rtx5090"} <= {gpu.short for gpu in GPUS}
    assert len({gpu.short for gpu in GPUS}) == len({gpu.name for gpu in GPUS}) == len(GPUS)
    assert all(gpu.source and gpu.peak.source and gpu.multiprocessors and gpu.memory for gpu in GPUS)
    assert gpu_named("H100").peak is PEAKS["NVIDIA H100 80GB HBM3"]
