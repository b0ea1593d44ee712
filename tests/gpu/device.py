"""The device of these tests, or why there is none."""

from __future__ import annotations

import sys

import torch

from te_dynamo.lowering import native
from te_dynamo.lowering.te import library

DEVICE = torch.device("cuda", 0)
PROVIDERS = ("native", "te", "reference")


def no_device() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return native.unavailable(DEVICE)


def no_te() -> str | None:
    if getattr(sys.modules.get(library.EXTENSION), "__stand_in__", False):
        return "other tests have put a stand-in in Transformer Engine's place: run `pytest -m gpu` by itself"
    return library.unavailable(DEVICE)
