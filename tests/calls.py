"""Calls sites directly, without a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from te_dynamo.lowering.call import Call, spec_of
from te_dynamo.lowering.quantized import Quantized
from te_dynamo.lowering.registry import implementation_of, load
from te_dynamo.lowering.site import site
from te_dynamo.recipe import DelayedScaling, Recipe

load()  # the operators


def linears_call(
    provider: str,
    inputs: Sequence[Any],
    *,
    recipe: Recipe | None = None,
    merged: bool = False,
    interleave: int = 0,
    out_dtype: torch.dtype | None = None,
    sizes: Sequence[int] = (),
    **fields: Any,
) -> Call:
    """provider: "native:cuda" is the implementation that is generated for a GPU, on whatever device it runs here."""
    name, _, device = provider.partition(":")
    x, weights, _ = inputs
    recipe = recipe or DelayedScaling()
    attributes = {"merged": merged, "interleave": interleave, "out_dtype": out_dtype or x.dtype}
    attributes["sizes"] = tuple(sizes) or tuple(w.shape[0] for w in weights)
    attributes["in_features"] = x.shape[-1]
    return Call("linears", name, device or "cpu", spec_of(list(inputs)), recipe.key, attributes=attributes, **fields)


def linears(
    provider: str, x: Tensor, weights: Any, biases: Any, *, scales: Any = None, grad_scales: Any = None, sink: Any = None, **call: Any
) -> list[Tensor]:
    """The outputs, and the amaxes if the call records them."""
    inputs = [x, list(weights), list(biases)]
    return site(linears_call(provider, inputs, **call).key, inputs, scales, grad_scales, sink)


def quantized_weights(provider: str, weights: Sequence[Tensor], cached: str = "inference", **call: Any) -> list[Quantized]:
    made = linears_call(provider, [weights[0], list(weights), [None] * len(weights)], cached=cached, **call)
    return implementation_of(made).quantize_weights(made, weights)


def inference(provider: str, x: Tensor, quantized: Sequence[Quantized], biases: Any, *, sizes: Sequence[int], **call: Any) -> list[Tensor]:
    """Linears with weights that are already quantized, one for each GEMM."""
    inputs = [x, [], list(biases)]
    return site(linears_call(provider, inputs, sizes=sizes, cached="inference", **call).key, inputs, cached=quantized)


def attention_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **given: Any) -> Call:
    attributes = {
        "causal": False,
        "scale": None,
        "dropout_p": 0.0,
        "enable_gqa": q.shape[1] != k.shape[1],
        "form": "bshd",
        "qkv_layout": "bshd_bshd_bshd",
        "window": -1,
        "attends": (),
        "softcap": 0.0,
        "quantize_output": False,
        "quantize_gradients": False,
    }
    attributes["scale"] = given.pop("softmax_scale", None)
    fields = {name: given.pop(name) for name in ("provider", "recipe", "records", "calibrating") if name in given}
    defaults = {"provider": "reference", "recipe": DelayedScaling().key, "records": True, "calibrating": True}
    op = given.pop("op", "attention")
    return Call(op=op, device="cpu", inputs=spec_of([q, k, v, mask, None, ()]), attributes=attributes | given, **(defaults | fields))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    sink: Tensor | None = None,
    grad_scale: Tensor | None = None,
    *,
    start: int = 0,
    grad_start: int = 0,
    **given: Any,
) -> list[Tensor]:
    """FP8 attention by definition: [o, amax]. scale, grad_scale: packed; the site's own start at `start` and `grad_start`."""
    scales = None if scale is None else (scale, start)
    packed = grad_scale if grad_scale is not None else scale
    grad_scales = None if packed is None else (packed, grad_start)
    return site(attention_call(q, k, v, mask, **given).key, [q, k, v, mask, None, ()], scales, grad_scales, sink)
