"""`python -m te_dynamo doctor`: on this machine as it is, and on pretended machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from te_dynamo.__main__ import main
from te_dynamo.lowering.te import attention, hardware, library
from te_dynamo.recipe import RECIPES
from te_dynamo.report import doctor, trials
from te_dynamo.report.doctor import OPERATIONS, Device, as_json, as_text, diagnose
from te_dynamo.report.trials import Trial

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
ROOT = Path(__file__).resolve().parent.parent.parent
TE = {
    "transformer_engine": "2.20.2",
    "transformer_engine_torch": "2.20.2",
    "transformer_engine_cu13": "2.20.2",
    "triton": "3.7.0",
    "torch": "2.13.0",
    "nvidia-cudnn-cu13": "9.24.0.43",
}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "te_dynamo", *arguments]
    where = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, capture_output=True, text=True, env=where)


# --- as it is


def test_this_machine(forks):
    text = forks.run("from te_dynamo.__main__ import main; assert main(['doctor']) == 0", path=[str(ROOT)])
    for title in ("Devices", "Packages", "Who computes what on cpu", "By name on cpu", "Missing", "Tried"):
        assert title in text
    assert torch.__version__.split("+")[0] in text and "pytorch 188841, triton 11111" in text
    assert "te_dynamo.backend:te_fp8" in text
    if not torch.cuda.is_available():
        assert "not tried: it is about kernels for CUDA devices, not cpu" in text
        assert "no CUDA device: what runs here has FP8's numerics; docs/memory-and-speed.md has its speed on CPUs" in text


def test_json_without_packages_that_are_optional(tmp_path):
    """Optional packages are hidden, as if they were not installed; nothing but JSON may be printed."""
    for name in ("triton", "transformer_engine", "transformer_engine_torch", "rich"):
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(__name__)")
    process = run("doctor", "--json", PYTHONPATH=f"{tmp_path}:{ROOT}", CUDA_VISIBLE_DEVICES="")
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert found["devices"][0]["name"] == "cpu"
    by = {(p["provider"], p["recipe"]): p["choices"] for p in found["plans"]}
    assert {recipe for _, recipe in by} == set(RECIPES) and set(by["auto", "delayed"]) == set(OPERATIONS)
    assert by["auto", "delayed"]["linear"] == {"provider": "native", "note": ""}
    assert by["te", "delayed"]["linear"]["provider"] is None


def test_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda: pytest.fail("not asked for"))
    for arguments in ([], ["nurse"], ["doctor", "--color"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0 and "doctor" in capsys.readouterr().out


# --- pretended


@pytest.fixture
def machine(monkeypatch):
    """Pretends that there are a GPU and packages; kernels are not tried."""
    assert not isinstance(doctor.sample(), str)  # Dynamo looks at devices, so it must run before one is pretended

    def pretend(
        capability: tuple[int, int] | None, installed: dict[str, str] = TE, *, cuda: str | None = "13.0", cudnn: int | None = 92400
    ) -> None:
        def version(name: str) -> str:
            if name not in installed:
                raise PackageNotFoundError(name)
            return installed[name]

        extension = "transformer_engine_torch" in installed
        properties = SimpleNamespace(name="a GPU", total_memory=80 << 30)
        for module in (doctor, library):
            monkeypatch.setattr(module, "version", version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(doctor, "cudnn", lambda: cudnn)
        monkeypatch.setattr(doctor, "driver", lambda: "580.95" if cuda else None)
        monkeypatch.setattr(doctor, "trials", lambda device: [Trial("a kernel", "ok", "bit for bit")])
        monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(library, "api", lambda: None)
        monkeypatch.setattr(attention, "cudnn_version", lambda: cudnn)
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)  # nothing of TE is imported
        monkeypatch.setattr(hardware, "unavailable_library", lambda device: "it is pretended")
        if extension:
            monkeypatch.setitem(sys.modules, library.EXTENSION, SimpleNamespace())
        else:
            monkeypatch.delitem(sys.modules, library.EXTENSION, raising=False)

    return pretend


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in TE.items() if name not in names}


def provider(found: doctor.Diagnosis, asked: str, recipe: str, operation: str = "linear", device: str = "cuda:0") -> str | None:
    (made,) = [p for p in found.plans if (p.device, p.provider, p.recipe) == (device, asked, recipe)]
    return made.choices[operation].provider


def test_a_hopper_without_te(machine):
    machine((9, 0), without("transformer_engine", "transformer_engine_torch", "transformer_engine_cu13"))
    found = diagnose()
    assert [(d.name, d.capability) for d in found.devices] == [("cpu", None), ("cuda:0", (9, 0)), ("cuda:1", (9, 0))]
    assert {p.device for p in found.plans} == {"cpu", "cuda:0"}  # equal devices once
    assert provider(found, "auto", "delayed") == provider(found, "native", "rowwise") == "native"
    assert provider(found, "te", "delayed") is None
    (lacks,) = found.missing
    assert "the package transformer_engine is not installed" in lacks.what and not lacks.needed
    assert lacks.remedy == "pip install --no-build-isolation 'transformer_engine[pytorch]'"
    text = as_text(found)
    assert "cuda:0   a GPU, compute capability 9.0, 80 GiB" in text and "NVIDIA driver: 580.95" in text
    assert "cuDNN 9.24.0" in text and "(optional) the provider 'te'" in text


def test_te_without_its_extension(machine):
    machine((9, 0), without("transformer_engine_torch"))
    found = diagnose()
    assert "without its extension for PyTorch" in found.missing[0].what
    assert provider(found, "te", "current") is None


def test_a_hopper_with_te(machine):
    machine((9, 0))
    found = diagnose()
    assert found.missing == []
    assert provider(found, "te", "delayed") == provider(found, "te", "delayed", "norm + linear") == "te"
    assert "Missing\n  nothing" in as_text(found)
    assert {name for name, reason in found.te_recipes["cuda:0"].items() if reason is None} == {"delayed", "current", "block"}
    assert "not mxfp8: it needs compute capability 10.0 or newer, this device has 9.0" in as_text(found)


def test_a_blackwell(machine):
    machine((10, 0))
    found = diagnose()
    assert provider(found, "auto", "delayed") == "native"
    assert not [m for m in found.missing if m.needed]
    assert [name for name, reason in found.te_recipes["cuda:0"].items() if reason is not None] == ["rowwise"]


def test_an_ada_has_no_rowwise_gemm(machine):
    machine((8, 9), without("transformer_engine"))
    found = diagnose()
    assert provider(found, "auto", "current") == "native"
    assert provider(found, "auto", "rowwise") == "reference" and provider(found, "native", "rowwise") is None
    assert "9.0" in next(p for p in found.plans if p.recipe == "rowwise" and p.device == "cuda:0").choices["linear"].note


def test_an_old_gpu(machine):
    machine((8, 0))
    found = diagnose()
    assert {provider(found, asked, "delayed") for asked in ("auto", "native")} == {None}
    assert provider(found, "reference", "delayed") == "reference"
    (lacks,) = found.missing
    assert "compute capability 8.0: FP8 needs 8.9" in lacks.what and "Inductor" in lacks.remedy


@pytest.mark.parametrize(
    ("changes", "words", "remedy"),
    [
        ({"transformer_engine_torch": "2.20.1"}, "different versions", "'transformer_engine[pytorch]==2.20.2'"),
        (
            {"transformer_engine_cu13": None, "transformer_engine_cu12": "2.20.2"},
            "built for CUDA 13.0",
            "pip uninstall transformer_engine_cu12",
        ),
        ({"triton": None}, "triton", "pip install triton"),
        ({"transformer_engine": "1.13.0"}, "1.13.0 is not supported", "--no-build-isolation"),
    ],
)
def test_what_does_not_fit(machine, changes, words, remedy):
    machine((9, 0), {name: version for name, version in (TE | changes).items() if version is not None})
    assert any(words in m.what and remedy in m.remedy for m in diagnose().missing)


def test_libraries_that_te_refuses_or_does_not_find(machine, monkeypatch):
    machine((9, 0), cudnn=91001)
    (lacks,) = diagnose().missing
    assert "cuDNN 9.10.1: Transformer Engine needs 9.12.0 or newer" in lacks.what and lacks.remedy == "pip install -U nvidia-cudnn-cu13"

    def fails() -> None:
        raise RuntimeError("cudnn shared object not found.\nand more")

    machine((9, 0))
    monkeypatch.setattr(library, "api", fails)
    (lacks,) = diagnose().missing
    assert lacks.what == "transformer_engine cannot be imported: cudnn shared object not found."


def test_a_torch_without_cuda_beside_a_driver(machine, monkeypatch):
    machine(None, cuda=None)
    monkeypatch.setattr(doctor, "driver", lambda: "580.95")
    (lacks,) = diagnose().missing
    assert "PyTorch is built without CUDA" in lacks.what and "pip install --force-reinstall torch==" in lacks.remedy


def test_a_torch_with_cuda_and_no_device(machine):
    machine(None)
    (lacks,) = diagnose().missing
    assert "finds no device" in lacks.what and not lacks.needed


def test_a_device_that_does_not_answer(machine, monkeypatch):
    machine((9, 0))

    def fails(device: object = None) -> None:
        raise RuntimeError("CUDA error: device kernel image is invalid")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fails)
    found = diagnose()
    assert [d.name for d in found.devices] == ["cpu"]
    assert [m.what for m in found.missing][:2] == [f"cuda:{i} does not answer: CUDA error: device kernel image is invalid" for i in (0, 1)]


def test_a_machine_without_a_compiler(machine, monkeypatch):
    machine(None, cuda=None)
    monkeypatch.setattr(doctor, "compiler", lambda: None)
    monkeypatch.setattr(doctor, "registered", lambda: None)
    found = diagnose()
    assert [m.remedy for m in found.missing] == [f"pip install -e {ROOT}", "apt-get install g++ (or set CXX)"]
    assert "C++ compiler: none" in as_text(found) and "not registered" in as_text(found)


def test_a_version_of_torch(monkeypatch):
    for found, fits in (("2.10.1", False), ("2.11.0+cu130", True), ("2.15.1", True), ("2.16.0a0+git1", False), ("3.0", False)):
        assert doctor._within(found, ">=2.11,<2.16") == fits, found


def test_json_is_the_diagnosis(machine):
    machine((9, 0))
    found = diagnose()
    back = json.loads(as_json(found))
    assert back["devices"][1] == {"name": "cuda:0", "model": "a GPU", "capability": [9, 0], "memory": 80 << 30}
    assert back["trials"]["cuda:0"] == [{"what": "a kernel", "result": "ok", "detail": "bit for bit"}]
    assert back["packages"]["transformer_engine"] == "2.20.2" and back["cudnn"] == 92400


def test_cudnn_as_text():
    assert [doctor._cudnn_text(n) for n in (None, 8902, 90300, 91002)] == ["none", "8.9.2", "9.3.0", "9.10.2"]


# --- the trials themselves


def test_a_trial_tells_right_from_wrong(monkeypatch):
    monkeypatch.setattr(trials, "why_no_triton", lambda device: None)
    monkeypatch.setattr(trials, "SHAPES", ((32, 48),))
    monkeypatch.setattr(trials.torch, "compile", lambda function, **_: function)
    inductor, own, _ = trials.trials(CPU)
    assert (inductor.result, own.result) == ("ok", "ok")

    def corrupt(function, **_):
        def changed(*args):
            plain, across, peaks = function(*args)
            across = across.clone()
            across.view(torch.uint8)[0, :3] = 0x7F
            return plain, across, peaks

        return changed

    monkeypatch.setattr(trials.torch, "compile", corrupt)
    monkeypatch.setattr(trials, "cast_transpose", corrupt(trials.cast_transpose))
    inductor, own, _ = trials.trials(CPU)
    assert inductor.result == own.result == "wrong"
    assert "3 wrong values of [32, 48] in E4M3" in inductor.detail and "a kernel of its own, which avoids it" in inductor.detail

    def fails(function, **_):
        raise RuntimeError("ptxas died\nat length")

    monkeypatch.setattr(trials.torch, "compile", fails)
    assert trials.trials(CPU)[0] == Trial(trials.MISCOMPILE, "failed", "RuntimeError: ptxas died")


def test_what_cannot_be_tried_says_why(monkeypatch):
    assert trials.why_no_triton(CPU) == "it is about kernels for CUDA devices, not cpu"
    monkeypatch.setattr(trials.importlib.util, "find_spec", lambda name: None)
    assert trials.why_no_triton(CUDA) == "triton is not installed"


def test_te_on_its_stand_in():
    from tests import te_on_cpu

    reason = te_on_cpu.missing()
    if reason is not None:
        pytest.skip(reason)
    te_on_cpu.install()
    trial = trials.trials(CPU)[2]
    assert trial.result == "ok" and "te_quantize bit for bit" in trial.detail


def test_a_dynamo_that_does_not_run(monkeypatch):
    monkeypatch.setattr(doctor, "sample", lambda: "Dynamo does not run: no g++")
    choices = doctor.plan(CPU, "auto", "delayed").choices
    assert {(c.provider, c.note) for c in choices.values()} == {(None, "Dynamo does not run: no g++")}


def test_the_sample_has_each_operation_once():
    choices = doctor.plan(CPU, "auto", "delayed").choices
    assert list(choices) == list(OPERATIONS)
    assert all(choice.provider == "native" for choice in choices.values())
    assert Device("cpu", "a CPU", None, None).capability is None
