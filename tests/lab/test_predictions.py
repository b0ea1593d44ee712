"""The recorded predictions are what the code now gives: a slower kernel, or one more, is found here and in no numeric test."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from te_dynamo.lab import pretend
from tests.forks import Forks

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDED = json.loads((ROOT / "benchmarks" / "results" / "lab-h100.json").read_text())
VERSIONS = {name: version(name) for name in RECORDED["versions"]}
RECORD = "`python -m benchmarks --only lab` records them anew"
AGAIN = """
import json, sys
from benchmarks.lab import built
from benchmarks.lab_models import CASES
from te_dynamo.lab.estimate import estimate_of

case = next(case for case in CASES if [case.name, case.shape] == sys.argv[1:])
print(json.dumps([[side.ms, side.kernels, side.gemms, side.saved] for side in estimate_of(built(case)).sides]))
"""


@pytest.mark.skipif((reason := pretend.unavailable()) is not None, reason=str(reason))
@pytest.mark.skipif(VERSIONS != RECORDED["versions"], reason="another Inductor generates other code, and the models are others")
@pytest.mark.parametrize("case", ["Llama-3-8B layer", "Mixtral-8x7B layer"])
def test_a_layer(case: str, forks: Forks) -> None:
    (recorded,) = [row for row in RECORDED["cases"] if (row["case"], row["shape"]) == (case, "1x4096")]
    found = json.loads(forks.run(AGAIN, case, "1x4096", path=[str(ROOT)]).splitlines()[-1])
    for (ms, *counts), side in zip(found, recorded["sides"], strict=True):
        assert counts == [side["kernels"], side["gemms"], side["saved"]], RECORD
        assert ms == pytest.approx(side["ms"], rel=1e-3), RECORD
