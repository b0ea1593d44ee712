"""The options of the backend: typed and validated. `Options` documents each key."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

from te_dynamo.recipe import RECIPES, DelayedScaling, Float8CurrentScaling, Recipe, named

CHOICES: dict[str, tuple[str, ...]] = {
    "provider": ("auto", "te", "native", "reference"),
    "attention": ("auto", "fp8", "fp8_both", "high_precision", "off"),
    "memory": ("speed", "balanced", "saving"),
    "padding": ("exact", "skip"),
}
SWITCHES = ("include_logits", "include_routers", "like_te", "keep_weights", "verify", "strict")
REPLACED = {"recompute_inputs": "memory='saving'"}


@dataclass(frozen=True, eq=False)
class Options:
    """What `torch.compile(model, backend="te_fp8", options={...})` accepts.

    An invalid value raises ValueError with the key, the value and what is allowed.

    Attributes:
        recipe: How scales are computed. "delayed": from the amaxes of earlier steps. "current": from the tensor itself.
            "rowwise", "block", "mxfp8", "nvfp4": one scale per row or block. "auto": delayed in training; in inference the
            trained scales if there are any, else current. None: high precision. An object of `te_dynamo.recipe` or of
            `transformer_engine.common.recipe` sets more. A dict maps fnmatch patterns (as in `skip`) to any of these: the first
            pattern that matches a site's path decides; a site that none matches gets "auto".
        provider: Whose kernels compute a site. "te": Transformer Engine's. "native": on a GPU PyTorch's `_scaled_mm`, and
            quantization that Inductor generates; on a CPU C++. "reference": quantize, dequantize, compute in high precision.
            "auto": native; on a GPU with Transformer Engine, "te" for what native has no kernel for. A provider requested by
            name that cannot run is an error that says what is missing.
        skip: fnmatch patterns of the sites to keep in high precision, for example `("lm_head", "*.mlp.*")`. They match a site's
            path inside the compiled module, as `named_modules()` spells it; for a raw weight, the path plus the parameter's
            name. `("*",)` leaves everything to Inductor.
        attention: "fp8": attention's forward in FP8, its backward in high precision: on Hopper an FP8 backward is no faster.
            "fp8_both": both in FP8, as Transformer Engine's `fp8_dpa`. "high_precision": fused high-precision attention in the
            layout that suits its length. "off": attention is left alone (an nn.MultiheadAttention entirely, with its linears).
            "auto": what the recipe's `fp8_dpa` says: "fp8_both", or "high_precision", as by default.
        padding: What attention gives for the tokens that an `attention_mask` marks as padding. "exact": what eager mode gives, which no
            loss should read. "skip": 0; on a GPU attention then packs the other tokens (thd) and computes nothing for these.
        short_sequence: Self-attention up to this many tokens gets a packed layout (bs3hd), longer an interleaved one (bsh3d).
        include_logits: Compute the logits in FP8 too, instead of high precision.
        include_routers: Compute the routers of mixtures of experts in FP8 too: the linears that choose experts, by a top-k.
        like_te: Match Transformer Engine bit for bit, at every site with delayed or current scaling (see
            `te_dynamo.recipe.DelayedScaling`; set it on a recipe for some sites only).
        memory: What is kept from forward to backward (see docs/memory.md for bytes and time). "speed": whatever saves time, FP8
            copies of weights included. "balanced": fewer bytes than in high precision, for a layer with its MLP in FP8; what an
            activation between two FP8 linears reads is kept in FP8, except with `like_te`. "saving": FP8 inputs of linears and
            copies of weights are recomputed in backward too.
        keep_weights: Keep the FP8 copies of trained weights across training steps until the weights change: across the
            microbatches of gradient accumulation. Costs two bytes per element; scale state is unaffected. On a GPU, or with the
            provider "reference". Those of frozen weights are kept there anyway, except with `like_te`.
        amax_group: The process group whose ranks share amaxes and therefore have equal scales; None: the world, if
            torch.distributed is initialized.
        debug_dir: A folder for each graph after each stage, as numbered, runnable scripts.
        verify: Compare each high-precision stage with its input graph on the real inputs, and name the pass that diverged.
        strict: Raise where the backend would otherwise undo a failed rule, or warn that no site could be taken.
        mode: An Inductor mode, as in `torch.compile(mode=...)`. It is here because torch refuses `mode=` together with `options=`.
        inductor: Options passed on to Inductor, as in `torch.compile(backend="inductor", options=...)`. They override `mode`.
    """

    recipe: Any = "auto"
    provider: str = "auto"
    skip: tuple[str, ...] = ()
    attention: str = "auto"
    padding: str = "exact"
    short_sequence: int = 512
    include_logits: bool = False
    include_routers: bool = False
    like_te: bool = False
    memory: str = "balanced"
    keep_weights: bool = False
    amax_group: Any = None
    debug_dir: str | None = None
    verify: bool = False
    strict: bool = False
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, allowed in CHOICES.items():
            _check_choice(key, getattr(self, key), allowed)
        for key in SWITCHES:
            if not isinstance(getattr(self, key), bool):
                raise _invalid(key, getattr(self, key), "True or False")
        if self.verify and self.padding == "skip":
            raise ValueError("te_fp8: verify compares graphs that compute padding with graphs that skip it: set padding='exact' to verify")
        if type(self.short_sequence) is not int or self.short_sequence < 0:
            raise _invalid("short_sequence", self.short_sequence, "a number of tokens, 0 or more")
        if not isinstance(self.inductor, Mapping) or not all(isinstance(key, str) for key in self.inductor):
            raise _invalid("inductor", self.inductor, "a dict of Inductor's options")
        if self.mode is not None:
            from torch._inductor import list_mode_options

            _check_choice("mode", self.mode, tuple(list_mode_options()))
        # Copied, so that later changes to the caller's list or dict have no effect here.
        object.__setattr__(self, "skip", _patterns(self.skip))
        object.__setattr__(self, "recipe", _recipes(self.recipe))
        object.__setattr__(self, "debug_dir", _folder(self.debug_dir))
        object.__setattr__(self, "inductor", dict(self.inductor))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.cache_key())

    @classmethod
    def from_user(cls, options: Mapping[str, Any] | Options | None = None, mode: str | None = None) -> Options:
        """The options of one compile, from the arguments of `torch.compile`.

        A dict's keys override the process-wide defaults (`set_options`); an `Options` sets every key.

        Raises:
            ValueError: an unknown key (the message suggests the nearest), an invalid value, or a `mode` that contradicts
                `options["mode"]`.
        """
        asked = _as_dict(options)
        if mode is not None:
            if asked.get("mode") not in (None, mode):
                raise ValueError(f"te_fp8: mode={mode!r} contradicts options['mode']={asked['mode']!r}; give one of them")
            asked["mode"] = mode
        return cls(**{**_as_dict(_defaults), **asked})

    def recipe_of(self, path: str) -> Recipe | None:
        """The recipe of the site at `path`; None for high precision."""
        found: Any = next((recipe for pattern, recipe in self._recipe_patterns() if fnmatchcase(path, pattern)), "auto")
        chosen: Recipe | None = DelayedScaling() if found == "auto" else found
        if self.like_te and isinstance(chosen, (DelayedScaling, Float8CurrentScaling)):
            return replace(chosen, like_te=True)
        return chosen

    def leaves_everything(self) -> bool:
        """Whether the user asked for no FP8 at all."""
        return "*" in self.skip or all(recipe is None for _, recipe in self._recipe_patterns())

    def patterns(self) -> tuple[str, ...]:
        """All patterns, each meant to match some site."""
        return (*self.skip, *(pattern for pattern, _ in self._recipe_patterns()))

    def _recipe_patterns(self) -> tuple[tuple[str, Any], ...]:
        return tuple(self.recipe.items()) if isinstance(self.recipe, dict) else (("*", self.recipe),)

    def inductor_config(self) -> dict[str, Any]:
        """The `config_patches` for Inductor's compile_fx: those of `mode`, then `inductor`.

        Raises:
            ValueError: an unknown key (the message suggests the nearest).
        """
        from torch._inductor import config, list_mode_options

        patches = dict(list_mode_options(self.mode)) if self.mode else {}
        known = config.get_config_copy()
        for key, value in self.inductor.items():
            name = key.replace("-", "_")
            if name not in known:
                raise ValueError(f"te_fp8: options['inductor'] has the unknown key {key!r}{_nearest(name, known)}")
            patches[name] = value
        return patches

    def cache_key(self) -> str:
        """The same text in every process for equal options, without those that do not affect generated code."""
        values = {key: value for key, value in vars(self).items() if key not in ("debug_dir", "amax_group")}
        values["recipe"] = [(pattern, r if isinstance(r, str) or r is None else r.key) for pattern, r in self._recipe_patterns()]
        values["inductor"] = {key: _stable(value) for key, value in sorted(self.inductor.items())}
        return repr(values)


class _Previous(Options):
    """The defaults before a `set_options`; as a context manager it restores them on exit."""

    def __enter__(self) -> Options:
        return _defaults

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        set_options(self)


def set_options(options: Options | Mapping[str, Any] | None = None, /, **changes: Any) -> Options:
    """Set process-wide defaults, for code that passes `torch.compile` a backend's name but no options.

    Keywords change single keys; an `Options` replaces all. Returns the previous defaults: pass them to `set_options` to restore
    them, or use a `with` block::

        with te_dynamo.set_options(recipe="current", skip=("lm_head",)):
            train(model)

    Defaults are read when a graph is compiled, so set them before the first step.

    Raises:
        ValueError: as `Options.from_user`.
    """
    global _defaults
    previous = _defaults
    _defaults = Options(**{**_as_dict(previous), **_as_dict(options), **_as_dict(changes)})
    return _Previous(**_as_dict(previous))


def _as_dict(options: Mapping[str, Any] | Options | None) -> dict[str, Any]:
    """The given keys, after checking that each is known."""
    if options is None or isinstance(options, Options):
        return dict(vars(options)) if options else {}
    if not isinstance(options, Mapping):
        raise ValueError(f"te_fp8: options must be a dict or te_dynamo.Options, not {type(options).__name__}")
    for key in options:
        if key in REPLACED:
            raise ValueError(f"te_fp8: the option {key!r} is now {REPLACED[key]}.")
        if key not in KEYS:
            raise ValueError(f"te_fp8: unknown option {key!r}{_nearest(key, KEYS)} The options are: {', '.join(KEYS)}.")
    return dict(options)


def _invalid(key: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"te_fp8: option {key}={value!r} is not allowed; it must be {allowed}")


def _check_choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        near = _nearest(value, allowed) if isinstance(value, str) else ""
        raise _invalid(key, value, "one of " + ", ".join(map(repr, allowed)) + near)


def _nearest(word: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f". Did you mean {near[0]!r}?" if near else "."


def _patterns(skip: object) -> tuple[str, ...]:
    # A bare string is iterable: it would become one pattern per letter.
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        raise _invalid("skip", skip, f"a sequence of fnmatch patterns, as in skip=({str(skip)!r},)")
    patterns = tuple(sorted(skip) if isinstance(skip, (set, frozenset)) else skip)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise _invalid("skip", patterns, "a sequence of fnmatch patterns, each a str")
    return patterns


def _recipes(given: object) -> Any:
    """None, "auto" or a Recipe; or a dict from patterns to these."""
    if isinstance(given, Mapping):
        if not all(isinstance(pattern, str) for pattern in given):
            raise _invalid("recipe", given, "a dict from fnmatch patterns, each a str, to recipes")
        return {pattern: _recipes(value) for pattern, value in given.items()}
    if given is None or given == "auto":
        return given
    if isinstance(given, str):
        _check_choice("recipe", given, ("auto", *RECIPES))
    return named(given)


def _folder(path: object) -> str | None:
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if path is not None and not (isinstance(name, str) and name):
        raise _invalid("debug_dir", path, "None or the path of a folder")
    return name


def _stable(value: Any) -> str:
    """`repr`, without the address that a function's repr contains."""
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name else repr(value)


KEYS = tuple(f.name for f in fields(Options))
_defaults = Options()
