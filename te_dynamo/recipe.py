"""Recipes: how the scales of FP8 tensors are computed. Names and defaults are Transformer Engine's.

    options={"recipe": DelayedScaling(amax_history_len=16)}                        # for all sites
    options={"recipe": {"*.mlp.*": "rowwise", "*.q_proj": None, "*": "delayed"}}   # by pattern; None: high precision

A recipe is a frozen value. What the kernels need to know is its `key`, a text that graphs and operators carry across
processes; `from_key` reads it.

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

AmaxAlgorithm: TypeAlias = "str | Callable[[Tensor], Tensor]"
ScaleAlgorithm: TypeAlias = "Callable[[Tensor, Tensor, Tensor, Any], Tensor]"


class Format(Enum):
    """The dtypes of a recipe: (forward, gradients). As in TE there is no pure E5M2: no hardware multiplies E5M2 by E5M2."""

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
    """The base of every recipe.

    fp8_format: a `Format`, its name, or a pair of names (forward, gradients).
    """

    name: ClassVar[str]  # in options and reports
    stateful: ClassVar[bool] = False  # whether scales come from earlier steps
    kernel_fields: ClassVar[tuple[str, ...]]  # the fields in `key`

    fp8_format: Any = Format.E4M3

    def __post_init__(self) -> None:
        object.__setattr__(self, "fp8_format", Format.of(self.fp8_format))

    @property
    def key(self) -> str:
        """What the kernels need, as a text that is the same in every process."""
        values = {"recipe": self.name} | {f: getattr(self, f) for f in self.kernel_fields}
        return json.dumps(values, default=lambda value: value.name)  # of a Format

    @property
    def fp8_attention(self) -> bool:
        """Whether attention is computed in FP8 if the option `attention` is "auto"."""
        return bool(getattr(self, "fp8_dpa", False))

    @property
    def mixes_tokens(self) -> bool:
        """Whether the scale of an activation depends on more than one of a call's tokens: the result for a token then depends, within FP8's
        rounding, on the tokens that follow it."""
        return False

    def _check(self, field: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"te_fp8: {type(self).__name__}({field}={getattr(self, field)!r}) is not allowed; it must be {allowed}")


def _dtype(name: str) -> torch.dtype:
    import torch  # only when needed: choosing a recipe must not cost the import

    return getattr(torch, name)


# Powers of two that delayed scaling leaves unused, by role. FP8 formats are floating: a scale that is 4 times too small costs nothing
# measurable, one that is 2 times too large 2 to 13 dB, since the largest values saturate. Gradients change most from step to step,
# weights least (but double, where they began at zero), and softmax's results are at most 1.
MARGINS: Mapping[str, float] = {"weight": 1.0, "s": 0.0}
FORWARD_MARGIN, GRADIENT_MARGIN = 2.0, 3.0


def margin_of(margin: float | None, role: str, *, gradient: bool) -> float:
    """A recipe's margin for a role. None: the role's in `MARGINS`, else its direction's default."""
    if margin is not None:
        return margin
    return MARGINS.get(role.rpartition(".")[2], GRADIENT_MARGIN if gradient else FORWARD_MARGIN)


@dataclass(frozen=True, kw_only=True)
class DelayedScaling(Recipe):
    """One scale per tensor, from the amaxes of earlier steps: fp8_max / amax / 2**margin.

    A step whose amax saturates is a sign of growth: the next scale allows for as much growth again, up to 16 times.

    Attributes:
        margin: Headroom between the largest magnitude and the format's, in powers of two. None: 1 for weights, 2 for activations, 3
            for gradients; 0 for all with `like_te` or a `scaling_factor_compute_algo`, as in TE.
        amax_history_len: The number of steps in the history.
        amax_compute_algo: "max" over the history, "most_recent", or a function of the history f32 [length, n] (entry 0: this
            step; entry 1: the oldest) that returns the amax f32 [n].
        scaling_factor_compute_algo: None, or a function (amax [n], old scale [n], fp8_max 0-d or [n], recipe) -> scale [n].
        reduce_amax: Whether to max-reduce amaxes over the ranks of a data-parallel group (the option `amax_group`).
        fp8_dpa: FP8 attention. fp8_mha: also FP8 between the linears and the attention.
        like_te: Match TE bit for bit. The first scale is 1.0 (ours comes from the first batch). An infinite value saturates (ours
            becomes NaN, which a GradScaler sees) and its amax enters the history, freezing the scale until it leaves (ours is
            not recorded). Linears are not merged.
    """

    name = "delayed"
    stateful = True
    kernel_fields = ("fp8_format", "margin", "like_te")

    fp8_format: Any = Format.HYBRID
    margin: float | None = None
    amax_history_len: int = 1024
    amax_compute_algo: AmaxAlgorithm = "max"
    scaling_factor_compute_algo: ScaleAlgorithm | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    like_te: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("amax_history_len", type(self.amax_history_len) is int and self.amax_history_len > 0, "a number of steps, 1 or more")
        valid = self.margin is None or (isinstance(self.margin, (int, float)) and abs(self.margin) < 64)
        self._check("margin", valid, "a number of powers of two, or None")
        algorithm = self.amax_compute_algo
        self._check("amax_compute_algo", callable(algorithm) or algorithm in ("max", "most_recent"), "'max', 'most_recent' or a function")
        custom = self.scaling_factor_compute_algo
        self._check("scaling_factor_compute_algo", custom is None or callable(custom), "None or a function")
        if self.margin is None and (self.like_te or custom is not None):
            object.__setattr__(self, "margin", 0)

    @property
    def extrapolates(self) -> bool:
        """Whether growth is expected to continue: not if the user's functions, or TE's rules, make the scale."""
        return not (self.like_te or callable(self.amax_compute_algo) or self.scaling_factor_compute_algo is not None)


@dataclass(frozen=True, kw_only=True)
class Float8CurrentScaling(Recipe):
    """One scale per tensor, from its own amax: fp8_max / amax.

    power_2_scale: round scales down to powers of two; amax_epsilon: the smallest amax; like_te: as in TE, infinite values saturate
    (ours become NaN) and linears are not merged.
    """

    name = "current"
    kernel_fields = ("fp8_format", "power_2_scale", "amax_epsilon", "like_te")

    fp8_format: Any = Format.HYBRID
    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    fp8_dpa: bool = False
    fp8_mha: bool = False
    like_te: bool = False

    @property
    def mixes_tokens(self) -> bool:
        return True

    @property
    def delayed(self) -> DelayedScaling:
        """The recipe of a site whose kernels need scales in advance. With `like_te`, TE's for NVTE_DPA_FP8_RECIPE="DelayedScaling"."""
        as_te: dict[str, Any] = {"amax_history_len": 1, "amax_compute_algo": "most_recent", "like_te": True} if self.like_te else {}
        return DelayedScaling(fp8_format=self.fp8_format, **as_te)


@dataclass(frozen=True, kw_only=True)
class Float8RowwiseScaling(Recipe):
    """One scale per row of a GEMM's operand (along the summed dimension), from its own amax: torchao's "rowwise".

    high_precision_wgrad: torchao's "rowwise_with_gw_hp": wgrad in high precision, and one scale for the whole weight in dgrad;
    power_2_scale: round scales down to powers of two.
    """

    name = "rowwise"
    kernel_fields = ("fp8_format", "high_precision_wgrad", "power_2_scale")

    high_precision_wgrad: bool = False
    power_2_scale: bool = True


@dataclass(frozen=True, kw_only=True)
class Float8BlockScaling(Recipe):
    """One scale per block: 1 x 128 along the summed dimension for activations and gradients, 128 x 128 for weights.

    x_block_scaling_dim, w_block_scaling_dim, grad_block_scaling_dim: 1 for blocks of 1 x 128, 2 for 128 x 128, which at most one
    of them may have; power_2_scale: round scales down to powers of two; amax_epsilon: the smallest amax.
    """

    name = "block"
    kernel_fields = ("fp8_format", "x_block_scaling_dim", "w_block_scaling_dim", "grad_block_scaling_dim", "power_2_scale", "amax_epsilon")

    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    power_2_scale: bool = True
    amax_epsilon: float = 0.0

    @property
    def mixes_tokens(self) -> bool:
        return self.x_block_scaling_dim == 2

    def __post_init__(self) -> None:
        super().__post_init__()
        dims = ("x_block_scaling_dim", "w_block_scaling_dim", "grad_block_scaling_dim")
        for f in dims:
            self._check(f, getattr(self, f) in (1, 2), "1 (1 x 128) or 2 (128 x 128)")
        if sum(getattr(self, f) == 2 for f in dims) > 1:
            raise ValueError("te_fp8: no GEMM takes two operands with blocks of 128 x 128; at most one *_block_scaling_dim may be 2")


@dataclass(frozen=True, kw_only=True)
class MXFP8BlockScaling(Recipe):
    """One E8M0 scale (a power of two in 8 bits) per 32 values along the summed dimension.

    enable_2d_quantization: for weights one per 32 x 32.
    """

    name = "mxfp8"
    kernel_fields = ("fp8_format", "enable_2d_quantization")

    enable_2d_quantization: bool = False


@dataclass(frozen=True, kw_only=True)
class NVFP4BlockScaling(Recipe):
    """E2M1 values with one E4M3 scale per 16 along the summed dimension and one float32 scale per tensor; emulated.

    disable_rht: no random Hadamard transform of wgrad's operands; disable_stochastic_rounding: round gradients to nearest;
    disable_2d_quantization: for weights one scale per 16 values instead of per 16 x 16.
    """

    name = "nvfp4"
    kernel_fields = ("disable_rht", "disable_stochastic_rounding", "disable_2d_quantization")

    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False

    @property
    def mixes_tokens(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("fp8_format", self.fp8_format is Format.E4M3, "E4M3, the format of its scales")


RECIPES: dict[str, type[Recipe]] = {
    cls.name: cls
    for cls in (DelayedScaling, Float8CurrentScaling, Float8RowwiseScaling, Float8BlockScaling, MXFP8BlockScaling, NVFP4BlockScaling)
}
CLASSES = tuple(RECIPES.values())


@lru_cache
def from_key(key: str) -> Recipe:
    """The recipe of a `key`: fields that the kernels do not need have their defaults."""
    values = json.loads(key)
    return RECIPES[values.pop("recipe")](**values)


def named(value: object) -> Recipe:
    """A recipe from itself, its name ("delayed", "current", ...), or a recipe object of Transformer Engine.

    Raises ValueError for anything else, and for a TE recipe that asks for what is not supported here.
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


# What TE has once per operand and we once per recipe.
_PER_OPERAND = ("power_2_scale", "amax_epsilon")
_OPERANDS = ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad")
# TE's features that are not supported here: field -> the value that leaves it off.
_UNSUPPORTED: Mapping[str, Any] = {"backward_override": None, "row_scaled_activation": False, "nvfp4_4over6": "none"}


def _from_te(theirs: Any) -> Recipe:
    name = type(theirs).__name__
    supported = {cls.__name__: cls for cls in CLASSES}
    if name not in supported:
        raise ValueError(f"te_fp8: transformer_engine's recipe {name} has no counterpart here; use one of {', '.join(supported)}")
    for field, off in _UNSUPPORTED.items():
        if (value := getattr(theirs, field, off)) != off:
            raise ValueError(f"te_fp8: transformer_engine's {name}({field}={value!r}) is not supported here; leave it at {off!r}")
    cls = supported[name]
    values: dict[str, Any] = {}
    for f in fields(cls):
        if f.name in _PER_OPERAND:
            found = {getattr(getattr(theirs, operand), f.name) for operand in _OPERANDS}
            if len(found) > 1:
                raise ValueError(f"te_fp8: transformer_engine's {name} has several values of {f.name} ({found}); set one for all operands")
            values[f.name] = found.pop()
        elif hasattr(theirs, f.name):
            values[f.name] = getattr(theirs, f.name)
    return cls(**values)
