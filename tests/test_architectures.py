"""The sweep over transformers' architectures says what is so."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
from tools import architectures


@pytest.fixture(autouse=True)
def quick(no_codegen: None) -> None:
    """AOTAutograd without code generation, as the sweep's own `main` has it."""


def test_right() -> None:
    verdict, text = architectures.looked_at("masked", "bert", "BertForMaskedLM")
    assert verdict == "ok" and text.startswith("1 and 1 graphs") and "'attention': 2" in text


def test_a_failure_and_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(gm: Any, inputs: Any, **_: Any) -> Any:
        raise RuntimeError("planted")

    def negates(gm: Any, inputs: Any, **_: Any) -> Any:
        return lambda *args: [-result if i == 0 else result for i, result in enumerate(gm(*args))]

    for backend, said in ((fails, "planted"), (negates, "1 and 0 graphs, output -6.0 dB")):
        monkeypatch.setattr(architectures, "te_fp8", backend)
        verdict, text = architectures.looked_at("masked", "bert", "BertForMaskedLM")
        assert verdict == "WRONG" and said in text


def test_what_cannot_be_made_is_skipped() -> None:
    assert architectures.looked_at("causal", "bert", "NoSuchModel")[0] == "skip"
