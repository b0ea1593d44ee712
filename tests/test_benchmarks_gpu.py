"""The benchmarks for a GPU, as far as a CPU can test them: the whole path with tiny sizes, the tables, and failures."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import lab
from benchmarks.gpu import cases, gemm, layer, run, worker
from benchmarks.gpu.bars import bars
from benchmarks.gpu.cases import BASELINE, CASES
from benchmarks.gpu.devices import DeviceInfo, describe
from benchmarks.gpu.model import LLAMA_3_8B, TINY, inputs, llama_layer, rotary
from benchmarks.gpu.reasons import Failed, reason_of
from benchmarks.gpu.report import markdown, predictions, result
from benchmarks.gpu.timing import WARM_UP, CUDAClock, clock_of, interleaved
from benchmarks.gpu.workers import ROOT, Worker
from te_dynamo.lowering.devices import PEAKS, Peak
from tests import te_on_cpu
from tests.numerics import sqnr

CPU = torch.device("cpu")
H100 = Peak(1979, 989.5, 3350, "a datasheet")


class Here:
    """A worker in this process."""

    def __init__(self, name: str, device: torch.device, tiny: bool) -> None:
        make = worker.Sweep if name in worker.SWEEPS else worker.LayerSteps
        self.target = make(name, device, tiny)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ask(self, method: str, timeout: float = 0.0, **arguments: Any) -> Any:
        return json.loads(json.dumps(getattr(self.target, method)(**arguments)))


@pytest.fixture
def at_hand(monkeypatch):
    """Runs everything in this process, without compilation."""
    monkeypatch.setattr("te_dynamo.backend.observers", [])
    monkeypatch.setattr(run, "Worker", Here)
    monkeypatch.setattr(layer, "Worker", Here)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)


def test_the_whole_path(at_hand, tmp_path, capsys):
    run.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "cpu.json").read_text())
    text = (tmp_path / "cpu.md").read_text()
    assert text in capsys.readouterr().out
    assert [row["case"] for row in found["layer"]] == [case.name for case in CASES]
    measured = {row["case"] for row in found["layer"] if "ms" in row}
    assert measured == {BASELINE, "te_fp8 native, delayed", "te_fp8 native, current"}
    assert all(row["reason"] for row in found["layer"] if "ms" not in row)
    assert {row["contender"] for row in found["gemm"] if "tflops" in row} == {gemm.BF16, gemm.FP8_NATIVE}
    assert {row["contender"] for row in found["bandwidth"] if "gbs" in row} == {"Triton kernel", "Inductor"}
    assert found["device"]["peak"] is None and not any(row["share_of_peak"] for row in found["layer"])
    assert found["versions"]["torch"] == torch.__version__
    assert "not available: for CUDA devices, not cpu" in text
    assert found["layer"][0]["ratio"] == 1.0


def test_one_section(at_hand, tmp_path):
    run.main(["--device", "cpu", "--tiny", "--only", "gemm", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert found["gemm"] and not found["layer"] and not found["bandwidth"]


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--gpu", "--device", "cpu", "--tiny", "--only", "layer", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    rows = {row["case"]: row for row in json.loads((tmp_path / "cpu.json").read_text())["layer"]}
    assert rows["te_fp8 native, delayed"]["fp8_linears"] == 7


def test_without_a_device_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(SystemExit):
        run.main([])
    assert "there is no CUDA device here" in capsys.readouterr().err


# --- processes


def test_a_process_answers_fails_and_dies():
    with Worker("gemm", CPU, True) as process:
        assert process.ask("rows")[0]["contender"] == gemm.BF16
        with pytest.raises(Failed, match="AttributeError.*nothing_such"):
            process.ask("nothing_such")
        assert process.ask("rows")
        process.process.kill()
        with pytest.raises(Failed, match="its process ended with -9"):
            process.ask("rows")
        with pytest.raises(Failed, match="its process ended with -9"):
            process.ask("rows")


def test_a_process_that_takes_too_long_is_ended():
    with Worker("gemm", CPU, True) as process:
        for _ in range(2):
            with pytest.raises(Failed, match="took longer than 0 s to rows"):
                process.ask("rows", timeout=0.01)
        assert process.process.wait() != 0


def test_who_fails_is_a_row_with_the_reason(at_hand, monkeypatch):
    def broken(size: Any, device: Any) -> Any:
        raise RuntimeError("out of order")

    class Recording(Here):
        def __init__(self, name: str, device: torch.device, tiny: bool) -> None:
            self.name = name
            if name != "broken":
                super().__init__(name, device, tiny)

        def ask(self, method: str, timeout: float = 0.0, **arguments: Any) -> Any:
            if self.name == "broken":
                raise Failed("out of order")
            return super().ask(method, timeout, **arguments)

    monkeypatch.setattr(layer, "Worker", Recording)
    both = [cases.case_named(BASELINE), cases.Case("broken", "ours", broken)]
    first, second = layer.rows(CPU, True, both, say=lambda text: None)
    assert first["ratio"] == 1.0 and second["reason"] == "out of order" and "ms" not in second
    assert first["peak_mib"] is None and first["extra_mib"] is None


def test_who_fails_when_its_turn_comes_drops_out():
    turns = []

    def breaks() -> list[float]:
        turns.append(1)
        if len(turns) == 2:
            raise ValueError("second\nturn")
        return [1.0]

    found, failed = interleaved({"fine": lambda: [3.0, 1.0, 2.0], "breaks": breaks}, 5)
    assert found == {"fine": 2.0} and failed == {"breaks": "ValueError: second turn"} and len(turns) == 2


def test_reasons_are_short():
    assert len(reason_of(RuntimeError("x" * 1000))) == 200
    assert reason_of(KeyError()) == "KeyError"


def test_a_clock_counts_each_call():
    calls = []
    assert len(clock_of(CPU).samples(lambda: calls.append(1), 4)) == 4 and len(calls) == 5
    assert clock_of(CPU).host_ms(lambda: None, 3) >= 0


class FakeEvent:
    """A clock that counts what was done before it."""

    done: list[str] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.done.append("record")
        self.at = len(self.done)

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.at - self.at)


def test_a_cuda_clock_times_the_run_and_nothing_else(monkeypatch):
    done: list[str] = []
    monkeypatch.setattr(FakeEvent, "done", done)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    monkeypatch.setattr(CUDAClock, "_flush", lambda self: done.append("flush"))
    clock = CUDAClock(torch.device("cuda"))
    step = ["record", "run", "record"]
    assert clock.samples(lambda: done.append("run"), 2) == [2.0, 2.0]
    assert done == ["run"] * WARM_UP + ["wait", *step, *step, "wait"]
    done.clear()
    clock.samples(lambda: done.append("run"), 2, cold=True, queued=True)
    assert done == ["run"] * WARM_UP + ["wait", *["flush", "sleep", *step] * 2, "wait"]
    done.clear()
    assert clock.host_ms(lambda: done.append("run"), 2) >= 0
    assert done == ["wait", "run", "wait", "run", "wait"]


def test_a_device_is_described(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    about = describe(torch.device("cuda"))
    assert about == DeviceInfo("NVIDIA H200", "9.0", 141.0, PEAKS["NVIDIA H200"]) and about.slug == "nvidia-h200"
    monkeypatch.setattr(properties, "name", "NVIDIA X9")
    assert describe(torch.device("cuda")).peak is None


def test_without_a_gpu_each_test_for_one_says_why_it_is_skipped(forks):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    arguments = ["-m", "gpu", str(ROOT / "tests/gpu/test_kernels.py"), "-q", "-rs", "-p", "no:cacheprovider"]
    printed = forks.run(f"import pytest; print('exit', int(pytest.main({arguments})))", path=[str(ROOT)])
    assert printed.endswith("exit 0\n") and "there is no CUDA device" in printed and "passed" not in printed


# --- the layer


def test_the_layer_and_its_flops():
    layer_, (x, dy) = llama_layer(TINY, CPU), inputs(TINY, (2, 32), CPU)
    y = layer_(x, *rotary(TINY, 32, CPU))
    assert y.shape == x.shape == dy.shape and y.dtype == torch.bfloat16
    y.backward(dy)
    assert x.grad is not None
    weights = sum(p.numel() for p in layer_.parameters() if p.dim() == 2)
    assert sum(n * k for n, k in TINY.gemms.values()) == weights
    assert TINY.flops((2, 32)) == 3 * (2 * 64 * weights + 2 * 2 * 2 * 32 * 32 * 64 // 2)
    assert sum(n * k for n, k in LLAMA_3_8B.gemms.values()) == 218_103_808


def test_the_rotary_embedding_is_hugging_face_s():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1, 32, 64, dtype=torch.bfloat16), torch.arange(32)[None])
    for a, b in zip(rotary(TINY, 32, CPU), theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("recipe", [None, "delayed", "current"])
def test_te_s_layer_is_of_the_same_size(recipe):
    if (reason := te_on_cpu.missing()) is not None:
        pytest.skip(reason)
    with te_on_cpu.cuda_is_cpu():
        built = cases.te_modules(recipe, TINY, CPU)
        x, dy = inputs(TINY, (2, 32), CPU)
        y = built.forward(32)(x)
        y.backward(dy)
    assert y.shape == x.shape and x.grad is not None
    assert sum(p.numel() for p in built.module.parameters()) == sum(p.numel() for p in llama_layer(TINY, CPU).parameters())


def test_te_s_linears_take_the_place_of_others(monkeypatch):
    if (reason := te_on_cpu.missing()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    x, dy = inputs(TINY, (2, 32), CPU)
    with te_on_cpu.cuda_is_cpu():
        built = cases.te_linear(TINY, CPU)
        y = built.forward(32)(x)
        y.backward(dy)
    exact = llama_layer(TINY, CPU)(x, *rotary(TINY, 32, CPU))
    assert sqnr(exact, y) > 20
    assert sum(type(m).__name__ == "Linear" and type(m) is not torch.nn.Linear for m in built.module.modules()) == 7


# --- what is said about the figures


def layer_row(case: str, family: str, shape: str = "1x4096", **figures: Any) -> dict[str, Any]:
    measured = {"ms": 9.0, "ratio": 1.0, "device_ms": 9.0, "host_ms": 1.0, "tflops": 600.0, "fp8_linears": None, "peak_mib": 100.0}
    return {"case": case, "family": family, "shape": shape} | measured | {"extra_mib": 0.0} | figures


def test_bars():
    rows = [
        layer_row(BASELINE, "bf16"),
        layer_row("TE modules, FP8 delayed", "te", ms=7.2),
        layer_row("torchao tensorwise + Inductor", "torchao", ms=5.4),
        layer_row("te_fp8 native, delayed", "ours", ms=6.0, extra_mib=-5.0),
        layer_row("te_fp8 te, delayed", "ours", ms=7.0, extra_mib=50.0),
        layer_row("te_fp8 native, delayed", "ours", "1x512", device_ms=2.0, host_ms=0.5),
        {"case": "te_fp8 te, delayed", "family": "ours", "shape": "1x512", "reason": "no"},
    ]
    gemms = [
        {"gemm": "8192 cubed", "contender": gemm.BF16, "ms": 0.5, "tflops": 2000.0},
        {"gemm": "8192 cubed", "contender": gemm.FP8_NATIVE, "ms": 1.0, "tflops": 1200.0},
        {"gemm": "8192 cubed", "contender": gemm.FP8_TE, "reason": "no"},
    ]
    found = {bar.what: (bar.value, bar.met) for bar in bars(rows, gemms, H100)}
    assert found == {
        "1x4096: te_fp8 over Inductor bf16": (1.5, True),
        "1x4096: te_fp8 over TE's FP8 modules": (pytest.approx(1.2), True),
        "1x4096: te_fp8 over torchao's best": (pytest.approx(0.9), False),
        "1x4096: MiB more than Inductor bf16": (-5.0, True),
        "1x512: te_fp8's host time a call over its device time": (0.5, True),
        "FP8 GEMM of 8192 cubed, share of the dense peak": (pytest.approx(1200 / 1979), False),
    }


def test_bars_without_anything():
    assert all(bar.value is None and bar.met is None for bar in bars([], [], None))
    alone = bars([layer_row("te_fp8 native, delayed", "ours", extra_mib=None)], [], None)
    assert [bar.met for bar in alone] == [None] * 6


def test_predictions_stand_beside_the_times(tmp_path):
    path = tmp_path / "lab.json"
    assert predictions(path) == {}
    rows = [{"case": lab.LAYER, "shape": "1x4096", "speedup": 1.5, "sides": [{"ms": 9.0}, {"ms": 6.0}]}]
    path.write_text(json.dumps({"layer": lab.predictions(rows)}))
    device = DeviceInfo("NVIDIA H100 80GB HBM3", "9.0", 79.1, H100)
    layers = [layer_row(BASELINE, "bf16"), layer_row("te_fp8 native, delayed", "ours", ms=6.2), layer_row("other", "te")]
    found = result(device, {"torch": "2.13.0", "torchao": None}, "2026-01-01", {"layer": layers}, predictions(path))
    base, ours, other = found["layer"]
    assert (ours["predicted_ms"], ours["predicted_ratio"], base["predicted_ratio"], other["predicted_ms"]) == (6.0, 1.5, 1.0, None)
    assert ours["share_of_peak"] == pytest.approx(600 / 1979)
    text = markdown(json.loads(json.dumps(found)))
    assert "# NVIDIA H100 80GB HBM3, 2026-01-01" in text and "torchao none" in text and "1979 TFLOP/s in dense FP8" in text
    assert "| 1x4096 | te_fp8 native, delayed | 6.2 | 1.00x | 9 | 1 | 600 | 30% |  | 100 | 0 | 6 | 1.50x |" in text


def test_the_lab_s_names_are_those_of_the_cases():
    assert {case.lab for case in CASES if case.lab} <= {*lab.predictions([]), None}


def test_a_table_escapes_reasons():
    device = DeviceInfo("cpu", "", 0.0, None)
    row = {"case": "a", "family": "te", "shape": "1x1", "reason": "this | that"}
    text = markdown(result(device, {}, "", {"layer": [row]}, {}))
    assert "| 1x1 | a | not available: this \\| that |  |" in text


def test_peaks():
    for name, peak in PEAKS.items():
        assert peak.fp8_tflops == pytest.approx(2 * peak.bf16_tflops, rel=0.02), name
        assert peak.source
    assert PEAKS.get("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
