"""Which recipes Transformer Engine supports on which GPU: the table row by row, and against TE's own answers."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from te_dynamo.lowering.te import hardware
from te_dynamo.lowering.te.hardware import GATES, NOT_IN_TE, unavailable_recipe
from te_dynamo.lowering.te.library import EXTENSION
from te_dynamo.recipe import CLASSES, RECIPES
from tests import te_on_cpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
AMPERE, ADA, HOPPER, BLACKWELL, BLACKWELL_300, RTX_BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)
WHERE = {
    "delayed": {ADA, HOPPER, BLACKWELL, BLACKWELL_300, RTX_BLACKWELL},
    "current": {ADA, HOPPER, BLACKWELL, BLACKWELL_300, RTX_BLACKWELL},
    "rowwise": set(),
    "block": {HOPPER, BLACKWELL, BLACKWELL_300, RTX_BLACKWELL},
    "mxfp8": {BLACKWELL, BLACKWELL_300},
    "nvfp4": {BLACKWELL, BLACKWELL_300, RTX_BLACKWELL},
}
ALL = (AMPERE, ADA, HOPPER, BLACKWELL, BLACKWELL_300, RTX_BLACKWELL)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU, and no Transformer Engine."""

    def pretend(capability: tuple[int, int], cuda: str | None = "13.0") -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(hardware, "unavailable_library", lambda device: "it is not there")
        monkeypatch.delitem(sys.modules, EXTENSION, raising=False)

    return pretend


def test_every_recipe_has_an_answer():
    assert {*GATES, *NOT_IN_TE} == set(CLASSES) and not set(GATES) & set(NOT_IN_TE)


@pytest.mark.parametrize("capability", ALL)
@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_on_each_gpu(gpu, name, capability):
    gpu(capability)
    reason = unavailable_recipe(RECIPES[name](), CUDA)
    assert (reason is None) == (capability in WHERE[name]), reason
    if reason is not None and name != "rowwise":
        assert f"this device has {capability[0]}.{capability[1]}" in reason


@pytest.mark.parametrize(
    ("name", "capability", "words"),
    [
        ("delayed", AMPERE, "it needs compute capability 8.9 or newer, this device has 8.0"),
        ("current", AMPERE, "it needs compute capability 8.9 or newer, this device has 8.0"),
        ("block", ADA, "it needs compute capability 9.0 or newer, this device has 8.9"),
        ("mxfp8", HOPPER, "it needs compute capability 10.0 or newer, this device has 9.0"),
        ("mxfp8", RTX_BLACKWELL, "it needs a compute capability below 12.0, this device has 12.0"),
        ("nvfp4", HOPPER, "it needs compute capability 10.0 or newer, this device has 9.0"),
        ("rowwise", HOPPER, "Transformer Engine has no row-wise recipe"),
    ],
)
def test_the_reason(gpu, name, capability, words):
    gpu(capability)
    assert unavailable_recipe(RECIPES[name](), CUDA) == words


@pytest.mark.parametrize(
    ("name", "capability", "cuda", "enough"),
    [
        ("delayed", ADA, "12.0", False),
        ("delayed", ADA, "12.1", True),
        ("block", HOPPER, "12.8", False),
        ("block", HOPPER, "12.9", True),
        ("mxfp8", BLACKWELL, "12.6", False),
        ("nvfp4", BLACKWELL, "12.8", True),
    ],
)
def test_the_version_of_cuda(gpu, name, capability, cuda, enough):
    gpu(capability, cuda)
    reason = unavailable_recipe(RECIPES[name](), CUDA)
    assert reason is None if enough else f"or newer, this PyTorch is built for {cuda}" in reason


def test_other_devices(gpu):
    gpu(HOPPER, None)  # ROCm's devices are called cuda too
    assert "built without it" in unavailable_recipe(RECIPES["delayed"](), CUDA)
    assert unavailable_recipe(RECIPES["delayed"](), CPU) == "Transformer Engine's kernels are for CUDA devices, not cpu"


def test_what_te_says_counts(gpu, monkeypatch):
    gpu(ADA)
    answers = SimpleNamespace(is_fp8_available=lambda return_reason: (False, "CublasLt version 12.1.3.x or higher required."))
    monkeypatch.setattr(hardware, "unavailable_library", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace(pytorch=answers))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", answers)
    assert unavailable_recipe(RECIPES["current"](), CUDA) == "Transformer Engine says: CublasLt version 12.1.3.x or higher required"
    answers.is_fp8_available = lambda return_reason: (True, "")
    assert unavailable_recipe(RECIPES["current"](), CUDA) is None
    del answers.is_fp8_available  # a version without it
    assert unavailable_recipe(RECIPES["current"](), CUDA) is None
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    assert "transformer_engine cannot be imported" in unavailable_recipe(RECIPES["current"](), CUDA)


def test_a_stand_in_without_a_capability_is_a_hopper(monkeypatch):
    monkeypatch.setitem(sys.modules, EXTENSION, SimpleNamespace(__stand_in__=True))
    assert unavailable_recipe(RECIPES["block"](), CPU) is None
    assert "10.0" in unavailable_recipe(RECIPES["mxfp8"](), CPU)


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="transformer_engine is not installed")
@pytest.mark.parametrize("capability", ALL)
def test_the_table_is_what_te_answers(capability):
    """Compared with TE's own functions, on its stand-in's device."""
    reason = te_on_cpu.missing()
    if reason is not None:
        pytest.skip(reason)
    te = te_on_cpu.install()
    with te_on_cpu.cuda_is_cpu(capability):
        for cls, gate in GATES.items():
            assert (unavailable_recipe(cls(), CPU) is None) == getattr(te, gate.ask)(), cls.name
