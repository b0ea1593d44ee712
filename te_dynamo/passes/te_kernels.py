"""Which sites Transformer Engine's own kernels for norms and attention compute: where they win, and are there.

Elsewhere a norm is left to Inductor, which writes FP8 as well, and attention to torch's, which is fused too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from te_dynamo import ops
from te_dynamo.config import Options
from te_dynamo.ir.graph import is_call, tensor
from te_dynamo.lowering.providers import provider_named
from te_dynamo.lowering.te.attention_limits import Case, refused
from te_dynamo.lowering.te.library import capability, cudnn_version, unavailable
from te_dynamo.passes.layout import packed_in_memory
from te_dynamo.passes.weights import is_view
from te_dynamo.recipe import DelayedScaling, Recipe


def why_no_norm_kernel(node: Node, provider: str, recipe: Recipe, options: Options, trains: bool) -> str | None:
    """Why a norm before linears is left to Inductor, as a clause; None where the provider's own kernel is to compute it."""
    x, weight, bias = node.args[:3]
    if not trains:
        return "Inductor writes it in FP8 as well"
    if options.recompute_inputs:
        return "recompute_inputs: what Inductor generates can be made again in backward"
    if any(output.args[1] == 0 and output.users for output in node.users):
        return "its result is wanted in high precision too"
    if not lies_in_memory(x):
        return "Inductor fuses it with what makes its input"
    return provider_named(provider).unsupported_norm(*(tensor(t) for t in (x, weight, bias)), node.kwargs["kind"], recipe)


def lies_in_memory(node: Any) -> bool:
    """Whether a value is an input of the graph or made by a GEMM: there is nothing that a kernel could be fused with."""
    while is_view(node):
        if is_call(node.args[0], ops.linears, ops.norm_linears):
            return True
        node = node.args[0]
    return node.op == "placeholder"


def te_beside(options: Options, device: torch.device) -> bool:
    """Whether what the chosen provider has no kernel for may go to TE: FP8 attention on a GPU, which else is its definition."""
    return options.provider == "auto" and device.type == "cuda" and unavailable(device) is None


def why_no_te_attention(node: Node, precision: Recipe | None, device: torch.device, trains: bool) -> str | None:
    """Why TE's fused attention does not compute a site, as a clause; None where it does."""
    q, k, v = (tensor(a) for a in node.args[:3])
    case = Case(
        dtype=q.dtype,
        head_qk=int(q.shape[3]),
        head_v=int(v.shape[3]),
        s_q=q.shape[2],
        s_kv=k.shape[2],
        causal=node.kwargs.get("causal", False),
        mask=len(node.args) > 3 and node.args[3] is not None,
        dropout=node.kwargs.get("dropout_p", 0.0),
        trains=trains,
        in_fp8=precision is not None,
        capability=capability(device),
        cudnn=cudnn_version(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    if precision is None and packed_in_memory(node) is None:
        return "q, k and v are made apart, and torch's attention takes them as they lie"
    if precision is not None and not isinstance(precision, DelayedScaling):
        return f"its kernels have delayed scales for S and dP, and {precision.name!r} scaling has none"
    return refused(case)
