"""Registers te_fp8 with Dynamo in the lab's process, where the package need not be installed."""

import torch

from te_dynamo.backend import te_fp8

torch._dynamo.register_backend(te_fp8, name="te_fp8")
