"""The tables that benchmarks make from their figures, and the lab's page from its cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import figures, lab
from benchmarks.figures import Figure
from benchmarks.lab_models import CASES

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_a_figure_is_a_median_with_its_extremes():
    found = Figure.of("cpu", "a step", [1.5, 0.5, 0.7], 0.6)
    assert (found.value, found.low, found.high, found.met) == (0.7, 0.5, 1.5, False)
    assert str(found) == "   0.70x [0.50 to 1.50]  (target 0.6x) a step"
    assert Figure.of("cpu", "once", [0.5], 0.6).spread == "" and Figure.of("cpu", "once", [0.5], 0.6).met
    assert str(Figure("ptxas", "spills", 0, 0, unit="")) == "   0.00  (target 0) spills"


def test_files(tmp_path):
    found = [Figure.of("cpu", "a step (4 ms against 8 ms)", [0.5, 0.6, 0.4], 0.75), Figure("ptxas", "spills", 0, 0, unit="")]
    pytest.importorskip("matplotlib")
    written = figures.write(found, tmp_path, "here")
    assert [p.name for p in written] == ["here.json", "here.md", "here.png"] and written[2].read_bytes()[:4] == b"\x89PNG"
    whole = json.loads(written[0].read_text())
    assert whole["versions"]["torch"] and whole["processor"] and whole["figures"][0]["low"] == 0.4 and whole["figures"][0]["met"]
    assert "| cpu | a step (4 ms against 8 ms) | 0.50x | 0.40 to 0.60 | 0.75x | yes |" in written[1].read_text()


def test_sections_write_what_they_find(tmp_path, monkeypatch, capsys):
    measured = {"inductor": {"bytes": 100.0}, "te_fp8": {"bytes": 40.0}}
    monkeypatch.setattr(benchmarks, "child", lambda kind, backend, *_, **__: measured[backend])
    monkeypatch.setattr("sys.argv", ["benchmarks", "--only", "saved", "--output", str(tmp_path)])
    benchmarks.main()
    assert "   0.40x  (target 0.55x) bytes saved for backward" in capsys.readouterr().out
    assert json.loads((tmp_path / "benchmarks.json").read_text())["figures"][0]["value"] == 0.4


def side(label, ms, **changed):
    made = {"label": label, "kernels": 10, "gemms": 4, "tflop": 1.0, "fp8_tflop": 0.0, "gigabytes": 1.0, "saved": 1 << 20, "ms": ms}
    return made | {"groups": dict.fromkeys(lab.GROUPS, ms)} | changed


def test_the_lab_s_page_names_what_is_slower_and_what_missed():
    left = {"kind": "linear", "path": "up", "provider": None, "recipe": None, "reason": "too small | to pay", "bf16_us": 3.0, "us": 3.0}
    quick, slow = [side("Inductor", 2.0), side("te_fp8", 1.0)], [side("Inductor", 1.0), side("te_fp8", 2.0)]
    rows = [
        {"case": "fast", "shape": "1x1", "target": 1.5, "speedup": 2.0, "sides": quick, "sites": []},
        {"case": "slow", "shape": "2x1", "target": 1.2, "speedup": 0.5, "sides": slow, "sites": [left]},
    ]
    text = lab.markdown(lab.result("a GPU", rows, {"torch": "1"}))
    assert "Below 1.0x: slow 2x1 (0.50x). Below their target: slow 2x1 (0.50x)." in text
    assert "| fast | 1x1 | te_fp8 | 10 | 4 | 0.0% | 1.00 | 1.0 | 1.000 | 2.000 | 1.50 |" in text
    assert "| slow | 2x1 | up | 3 | too small \\| to pay |" in text


def test_the_recorded_page_is_that_of_the_recorded_figures():
    path = RESULTS / "lab-h100.json"
    found = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == lab.markdown(found)
    assert {(r["case"], r["shape"]) for r in found["cases"]} <= {(c.name, c.shape) for c in CASES}
