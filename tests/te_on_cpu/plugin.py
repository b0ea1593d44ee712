"""A pytest plugin that runs TE's own tests on the stand-in: `pytest -p tests.te_on_cpu.plugin TEST_FILE`.

Attention's scores of one head of one sample are a tensor of their own here: lengths and heads are cut to 256 and 4.
"""

from __future__ import annotations

import contextlib

import pytest

from tests import te_on_cpu

_open = contextlib.ExitStack()
LENGTH, HEADS = 256, 4


def pytest_configure(config: pytest.Config) -> None:
    te_on_cpu.install()
    _open.enter_context(te_on_cpu.cuda_is_cpu())


def pytest_unconfigure(config: pytest.Config) -> None:
    _open.close()
