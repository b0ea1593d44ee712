"""A pytest plugin that runs TE's own tests on the stand-in, from their directory.

    cd TransformerEngine/tests/pytorch && python -m pytest -p tests.te_on_cpu.plugin test_recipe.py

Attention's scores are materialized here, so its tests are cut down to 2 samples, lengths up to 256 and 4 heads.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import te_on_cpu

SAMPLES, LENGTH, HEADS = 2, 256, 4
_open = contextlib.ExitStack()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--capability", default="9.0", help="the compute capability to pretend")


def pytest_configure(config: pytest.Config) -> None:
    te_on_cpu.install()
    major, minor = config.getoption("--capability").split(".")
    _open.enter_context(te_on_cpu.cuda_is_cpu((int(major), int(minor))))
    sys.path.insert(0, str(Path.cwd()))
    utils = importlib.import_module("utils")
    _cut_down(utils.ModelConfig)
    _give_bias_shapes(utils)


def pytest_unconfigure(config: pytest.Config) -> None:
    _open.close()


def _cut_down(model_config: Any) -> None:
    """Reduces sizes; keeps the ratio of key heads to query heads, and unequal lengths unequal."""
    build = model_config.__init__

    def cut(self: Any, batch_size: int, max_seqlen_q: int, num_heads: int, head_dim_qk: int, **rest: Any) -> None:
        groups, keys = rest.get("num_gqa_groups"), rest.get("max_seqlen_kv")
        if groups is not None:
            rest["num_gqa_groups"] = max(1, min(num_heads, HEADS) * groups // num_heads)
        if keys is not None:
            rest["max_seqlen_kv"] = min(keys, LENGTH)
        queries = min(max_seqlen_q, LENGTH)
        if keys is not None and keys != max_seqlen_q and queries == rest["max_seqlen_kv"]:
            queries //= 2
        build(self, min(batch_size, SAMPLES), queries, min(num_heads, HEADS), head_dim_qk, **rest)

    model_config.__init__ = cut


def _give_bias_shapes(utils: Any) -> None:
    """Tests from shortly before 2.20.2 give a bias's shape by name, "1hss"; the package now expects sizes."""
    build = utils.AttentionParams

    def with_sizes(**fields: Any) -> Any:
        name = fields.get("core_attention_bias_shape")
        if isinstance(name, str):
            sizes = {"b": fields["batch_size"], "h": fields["num_heads"], "1": 1}
            lengths = (fields["max_seqlen_q"], fields["max_seqlen_kv"])
            pairs = zip(name[2:], lengths, strict=True)
            fields["core_attention_bias_shape"] = (*(sizes[c] for c in name[:2]), *(1 if c == "1" else length for c, length in pairs))
        return build(**fields)

    utils.AttentionParams = with_sizes
