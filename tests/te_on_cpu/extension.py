"""The module `transformer_engine_torch`: enums and names as in the built one, and the existing stand-ins."""

from __future__ import annotations

import enum
import inspect
import json
import re
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.te_on_cpu import activation, device, grouped, norm, permute, quantize, rope, sequence, softmax
from tests.te_on_cpu.attention import fused_attn_bwd, fused_attn_fwd
from tests.te_on_cpu.attention_support import get_fused_attn_backend
from tests.te_on_cpu.gemm import generic_gemm
from tests.te_on_cpu.mx import swizzle_scales_for_gemm_
from tests.te_on_cpu.scaling import fused_amax_and_scale_update_after_reduction

NAME = "transformer_engine_torch"
FACTS = json.loads(Path(__file__).with_name("signatures.json").read_text())
VERSION: str = FACTS["transformer_engine"]
STAND_INS: tuple[Callable[..., Any], ...] = (
    quantize.bgrad_quantize,
    quantize.compute_amax,
    quantize.create_empty_quantized_tensor,
    quantize.dequantize,
    quantize.fp8_transpose,
    quantize.multi_tensor_quantize,
    quantize.quantize,
    quantize.split_quantize,
    swizzle_scales_for_gemm_,
    generic_gemm,
    grouped.get_grouped_gemm_setup_workspace_size,
    grouped.te_general_grouped_gemm,
    grouped.te_general_grouped_gemm_for_discrete_in,
    grouped.te_general_grouped_gemm_for_discrete_out,
    grouped.te_general_grouped_gemm_for_grouped_tensor,
    fused_amax_and_scale_update_after_reduction,
    permute.fused_multi_row_padding,
    permute.fused_multi_row_unpadding,
    permute.moe_permute_bwd,
    permute.moe_permute_fwd,
    permute.moe_unpermute_bwd,
    permute.moe_unpermute_fwd,
    norm.layernorm_bwd,
    norm.layernorm_fwd,
    norm.rmsnorm_bwd,
    norm.rmsnorm_bwd_add,
    norm.rmsnorm_fwd,
    activation.clamped_dswiglu,
    activation.clamped_swiglu,
    *activation.stand_ins(),
    fused_attn_bwd,
    fused_attn_fwd,
    get_fused_attn_backend,
    rope.fused_rope_backward,
    rope.fused_rope_forward,
    sequence.convert_bshd_to_thd,
    sequence.convert_thd_to_bshd,
    sequence.fa_prepare_bwd,
    sequence.fa_prepare_fwd,
    softmax.scaled_aligned_causal_masked_softmax_forward,
    softmax.scaled_masked_softmax_forward,
    softmax.scaled_softmax_forward,
    softmax.scaled_upper_triang_masked_softmax_forward,
    *softmax.BACKWARD,
    device.get_cublasLt_version,
    device.get_cudnn_version,
    device.get_num_cublas_streams,
)
_POSITIONAL = re.compile(r"arg\d+")  # pybind's names for unnamed parameters


def extension() -> ModuleType:
    """A new module. A function without a stand-in raises NotImplementedError when it is called."""
    tex = ModuleType(NAME)
    tex.__spec__ = ModuleSpec(NAME, None)
    tex.__stand_in__ = True  # type: ignore[attr-defined]
    for name, values in FACTS["enums"].items():
        setattr(tex, name, enum.IntEnum(name, values))
    for name in FACTS["classes"]:
        setattr(tex, name, type(name, (), {}))
    for name in FACTS["functions"]:
        setattr(tex, name, _absent(name))
    for function in STAND_INS:
        check_signature(function, FACTS["functions"][function.__name__])
        setattr(tex, function.__name__, function)
    return tex


def check_signature(function: Callable[..., Any], built: str) -> None:
    """Raises TypeError if a stand-in's parameters differ from the built function's in names, order or defaults."""
    ours = [(p.name, p.default is not p.empty) for p in inspect.signature(function).parameters.values()]
    theirs = parameters(built)
    same = len(ours) == len(theirs) and all(
        optional == their_optional and (name == their_name or _POSITIONAL.fullmatch(their_name))
        for (name, optional), (their_name, their_optional) in zip(ours, theirs, strict=True)
    )
    if not same:
        raise TypeError(f"the stand-in {function.__name__}{inspect.signature(function)} is not {built}")


def parameters(built: str) -> list[tuple[str, bool]]:
    """(name, whether it has a default) of each parameter of a pybind signature."""
    inside = built[built.index("(") + 1 : built.rindex(") ->")]
    return [(name, " = " in rest) for name, rest in re.findall(r"(\w+): ((?:[^,\[]|\[[^\]]*\])+)", inside)]


def _absent(name: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"tex.{name} has no stand-in")

    call.__name__ = name
    return call
