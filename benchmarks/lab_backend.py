"""Registers te_fp8 with Dynamo in gpulab's process, where te_dynamo may not be installed."""

import torch

from te_dynamo.backend import te_fp8

torch._dynamo.register_backend(te_fp8, name="te_fp8")
