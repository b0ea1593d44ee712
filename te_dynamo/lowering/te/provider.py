"""Transformer Engine as a provider."""

from __future__ import annotations

import torch

from te_dynamo.lowering.registry import provider
from te_dynamo.lowering.te import library
from te_dynamo.lowering.te.hardware import unavailable_recipe
from te_dynamo.recipe import DelayedScaling


def unavailable(device: torch.device) -> str | None:
    return library.unavailable(device) or unavailable_recipe(DelayedScaling(), device)  # what current scaling needs too


provider("te", unavailable)

from te_dynamo.lowering.te import attention, block_linears, grouped, linear, norm  # noqa: E402, F401  (register themselves)
