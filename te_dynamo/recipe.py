"""The recipes: how the scales of a site's FP8 tensors are found. Names and defaults are Transformer Engine's.

    options={"recipe": DelayedScaling(amax_history_len=16)}                        # one for all sites
    options={"recipe": {"*.mlp.*": "rowwise", "*.q_proj": None, "*": "delayed"}}   # by pattern; None: high precision

A recipe is a frozen value. What of it the kernels need is its `key`, a text that stands in graphs and reaches the
operators, in whichever process they run; `from_key` reads it.

Sources: TE's `transformer_engine.common.recipe` (2.20); for row-wise scaling torchao's `Float8LinearConfig.from_recipe_name`;
for blocks of 128 the DeepSeek-V3 report (arXiv 2412.19437, section 3.3); for MXFP8 the OCP Microscaling specification 1.0;
for NVFP4 arXiv 2509.25149.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "RECIPES",
    "DelayedScaling",
    "Float8BlockScaling",
    "Float8CurrentScaling",
    "Float8RowwiseScaling",
    "Format",
    "MXFP8BlockScaling",
    "NVFP4BlockScaling",
    "Recipe",
    "from_key",
    "named",
]


class Format(Enum):
    """The dtypes of a recipe: (forward, gradients).

    E5M2 alone is not among them: as in TE, pure E5M2 training is not supported, since no hardware multiplies E5M2 by E5M2.
    """

    HYBRID = ("float8_e4m3fn", "float8_e5m2")
    E4M3 = ("float8_e4m3fn", "float8_e4m3fn")

    @property
    def forward(self) -> torch.dtype:
        return _dtype(self.value[0])

    @property
    def gradient(self) -> torch.dtype:
        return _dtype(self.value[1])

    @classmethod
    def of(cls, value: object) -> Format:
        """A Format from itself, its name, TE's own `Format`, or a pair of names (forward, gradients)."""
        pairs = {("E4M3", "E5M2"): "HYBRID", ("E4M3", "E4M3"): "E4M3"}
        name = pairs.get(tuple(value), "") if isinstance(value, (tuple, list)) else str(getattr(value, "name", value))
        if name in cls.__members__:
            return cls[name]
        raise ValueError(
            f"te_fp8: fp8_format={value!r} is not allowed; it must be HYBRID (E4M3 forward, E5M2 gradients), E4M3, or the pair "
            "(forward, gradients) of one of these. E5M2 in forward is not supported: no GPU multiplies E5M2 by E5M2"
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every recipe has.

    fp8_format: a `Format`, or its name, or the pair of names (forward, gradients).
    """

    name: ClassVar[str]  # as a user may write it, and as reports do
    stateful: ClassVar[bool] = False  # whether scales come from earlier steps
    kernel_fields: ClassVar[tuple[str, ...]]  # what the kernels must know

    fp8_format: Any = Format.E4M3

    def __post_init__(self) -> None:
        object.__setattr__(self, "fp8_format", Format.of(self.fp8_format))

    @property
    def key(self) -> str:
        """What the kernels must know, as a text that is the same in every process."""
        values = {f: getattr(self, f) for f in self.kernel_fields}
        return json.dumps({"recipe": self.name} | {f: v.name if isinstance(v, Format) else v for f, v in values.items()})

    @property
    def fp8_attention(self) -> bool:
        """Whether attention is computed in FP8 where the option `attention` is "auto"."""
        return bool(getattr(self, "fp8_dpa", False))

    def _check(self, field: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"te_fp8: {type(self).__name__}({field}={getattr(self, field)!r}) is not allowed; it must be {allowed}")


def _dtype(name: str) -> torch.dtype:
    import torch  # not before it is needed: choosing a recipe must not cost the import

    return getattr(torch, name)


AmaxAlgorithm: TypeAlias = "str | Callable[[Tensor], Tensor]"
ScaleAlgorithm: TypeAlias = "Callable[[Tensor, Tensor, Tensor, Any], Tensor]"


@dataclass(frozen=True, kw_only=True)
class DelayedScaling(Recipe):
    """One scale a tensor, from the amaxes of earlier steps: fp8_max / amax / 2**margin.

    Attributes:
        margin: Powers of two that are left between the largest magnitude and the format's.
        amax_history_len: How many steps are remembered.
        amax_compute_algo: "max" over the history, "most_recent", or a function of the history f32 [length, n] (entry 0 is
            this step's, entry 1 the oldest) that returns the amax f32 [n].
        scaling_factor_compute_algo: None, or a function (amax [n], old scale [n], fp8_max 0-d or [n], recipe) -> scale [n].
        reduce_amax: Whether amaxes are max-reduced over the ranks of a data-parallel group (the option `amax_group`).
        fp8_dpa: FP8 attention too. fp8_mha: what lies between the linears and the attention in FP8 too.
        like_te: TE's way to the bit. The first scale is 1.0 (ours comes from the first batch); an infinite value saturates (ours
            becomes NaN, for a GradScaler to find), and its amax enters the history and freezes the scale until it has left it
            (ours is not recorded); linears are not merged.
    """

    name = "delayed"
    stateful = True
    kernel_fields = ("fp8_format", "margin", "like_te")

    fp8_format: Any = Format.HYBRID
    margin: int = 0
    amax_history_len: int = 1024
    amax_compute_algo: AmaxAlgorithm = "max"
    scaling_factor_compute_algo: ScaleAlgorithm | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    like_te: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.amax_history_len, int) and not isinstance(self.amax_history_len, bool)
        self._check("amax_history_len", whole and self.amax_history_len > 0, "a number of steps, 1 or more")
        self._check("margin", isinstance(self.margin, (int, float)) and abs(self.margin) < 64, "a number of powers of two")
        algorithm = self.amax_compute_algo
        self._check("amax_compute_algo", callable(algorithm) or algorithm in ("max", "most_recent"), "'max', 'most_recent' or a function")
        custom = self.scaling_factor_compute_algo
        self._check("scaling_factor_compute_algo", custom is None or callable(custom), "None or a function")


@dataclass(frozen=True, kw_only=True)
class Float8CurrentScaling(Recipe):
    """One scale a tensor, from its own amax: fp8_max / amax.

    power_2_scale: scales are rounded down to powers of two; amax_epsilon: the least amax; like_te: an infinite value saturates,
    as in TE (ours becomes NaN), and linears are not merged.
    """

    name = "current"
    kernel_fields = ("fp8_format", "power_2_scale", "amax_epsilon", "like_te")

    fp8_format: Any = Format.HYBRID
    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    fp8_dpa: bool = False
    fp8_mha: bool = False
    like_te: bool = False


@dataclass(frozen=True, kw_only=True)
class Float8RowwiseScaling(Recipe):
    """One scale for each row of a GEMM's operand (along the dimension that is summed over), from its own amax: torchao's
    "rowwise".

    high_precision_wgrad: its "rowwise_with_gw_hp": the weight's gradient is computed in high precision, and dgrad reads
    the weight with one scale a tensor.
    power_2_scale: scales are rounded down to powers of two.
    """

    name = "rowwise"
    kernel_fields = ("fp8_format", "high_precision_wgrad", "power_2_scale")

    high_precision_wgrad: bool = False
    power_2_scale: bool = True


@dataclass(frozen=True, kw_only=True)
class Float8BlockScaling(Recipe):
    """One scale for each block: 1 x 128 along the summed dimension for activations and gradients, 128 x 128 for weights.

    x_block_scaling_dim, w_block_scaling_dim, grad_block_scaling_dim: 1 for blocks of 1 x 128, 2 for 128 x 128; no two
    operands of one GEMM may both be 2. power_2_scale: scales are rounded down to powers of two; amax_epsilon: the least amax.
    """

    name = "block"
    kernel_fields = ("fp8_format", "x_block_scaling_dim", "w_block_scaling_dim", "grad_block_scaling_dim", "power_2_scale", "amax_epsilon")

    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    power_2_scale: bool = True
    amax_epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        dims = ("x_block_scaling_dim", "w_block_scaling_dim", "grad_block_scaling_dim")
        for f in dims:
            self._check(f, getattr(self, f) in (1, 2), "1 (1 x 128) or 2 (128 x 128)")
        if sum(getattr(self, f) == 2 for f in dims) > 1:
            raise ValueError(
                "te_fp8: Float8BlockScaling: two operands with blocks of 128 x 128 have no GEMM; at most one *_block_scaling_dim may be 2"
            )


@dataclass(frozen=True, kw_only=True)
class MXFP8BlockScaling(Recipe):
    """One E8M0 scale (a power of two in 8 bits) for each 32 values along the summed dimension.

    enable_2d_quantization: weights have one for each 32 x 32.
    """

    name = "mxfp8"
    kernel_fields = ("fp8_format", "enable_2d_quantization")

    enable_2d_quantization: bool = False


@dataclass(frozen=True, kw_only=True)
class NVFP4BlockScaling(Recipe):
    """E2M1 values, one E4M3 scale for each 16 of them along the summed dimension, and one float32 scale a tensor: emulated by
    its definition.

    disable_rht: no random Hadamard transform of wgrad's operands; disable_stochastic_rounding: gradients are rounded to
    nearest; disable_2d_quantization: weights have a scale for each 16 values instead of each 16 x 16.
    """

    name = "nvfp4"
    kernel_fields = ("disable_rht", "disable_stochastic_rounding", "disable_2d_quantization")

    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("fp8_format", self.fp8_format is Format.E4M3, "E4M3, the format of its scales")


CLASSES: tuple[type[Recipe], ...] = (
    DelayedScaling,
    Float8CurrentScaling,
    Float8RowwiseScaling,
    Float8BlockScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
)
RECIPES = {cls.name: cls for cls in CLASSES}


@lru_cache
def from_key(key: str) -> Recipe:
    """The recipe of a `key`, as far as the kernels need it."""
    values = json.loads(key)
    return RECIPES[values.pop("recipe")](**values)


def named(value: object) -> Recipe:
    """A recipe from itself, a name ("delayed", "current", ...), or a recipe object of Transformer Engine.

    Raises ValueError for anything else, and for what a TE recipe asks that has no counterpart here.
    """
    if isinstance(value, Recipe):
        return value
    if isinstance(value, str) and value in RECIPES:
        return RECIPES[value]()
    if type(value).__module__.startswith("transformer_engine."):
        return _from_te(value)
    raise ValueError(
        f"te_fp8: {value!r} is no recipe; it must be one of {', '.join(map(repr, RECIPES))}, an object of te_dynamo.recipe, or one "
        "of transformer_engine.common.recipe"
    )


# What TE's objects keep elsewhere: our field -> where it is there.
_NESTED: dict[str, tuple[str, ...]] = {
    "power_2_scale": ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"),
    "amax_epsilon": ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"),
}
# What TE can ask and we cannot do: field -> the value that asks nothing.
_UNSUPPORTED: Mapping[str, Any] = {"backward_override": None, "row_scaled_activation": False, "nvfp4_4over6": "none"}


def _from_te(theirs: Any) -> Recipe:
    name = type(theirs).__name__
    cls = next((c for c in CLASSES if c.__name__ == name), None)
    if cls is None:
        raise ValueError(
            f"te_fp8: transformer_engine's recipe {name} has no counterpart here; those that have: {', '.join(c.__name__ for c in CLASSES)}"
        )
    for field, nothing in _UNSUPPORTED.items():
        if getattr(theirs, field, nothing) != nothing:
            raise ValueError(
                f"te_fp8: {name}({field}={getattr(theirs, field)!r}) of transformer_engine is not supported here; leave it at {nothing!r}"
            )
    values: dict[str, Any] = {}
    for f in fields(cls):
        if f.name in _NESTED:
            found = {getattr(getattr(theirs, where), f.name) for where in _NESTED[f.name]}
            if len(found) > 1:
                raise ValueError(f"te_fp8: {name} of transformer_engine has a {f.name} for each tensor ({found}); here it is one for all")
            values[f.name] = found.pop()
        elif hasattr(theirs, f.name):
            values[f.name] = getattr(theirs, f.name)
    return cls(**values)
