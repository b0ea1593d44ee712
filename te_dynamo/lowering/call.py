"""`Call`: everything that an implementation is told besides tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from te_dynamo.ir.op import SemanticOp, op_named
from te_dynamo.recipe import Recipe, from_key

# Inductor's C++ wrapper puts a string argument between quotation marks without escaping it, so a key contains no quotation marks or
# backslashes.
_PLAIN, _JSON = str.maketrans('"\\', "'~"), str.maketrans("'~", '"\\')
# An operation's inputs, by position: a dtype, None for an absent input, or a tuple of these for a list.
Spec = Any


@dataclass(frozen=True)
class Call:
    """One computation of an operation by a provider. Hashable; `key` is its text, `Call.parse` reads it.

    A graph holds the text, so that what is compiled from it can be cached and printed.

    op: the operation's name; provider: "te", "native", "reference"; device: its type.
    inputs: the dtypes of the operation's tensor inputs (see `Spec`).
    recipe: the recipe's key, "" for high precision.
    amax_group: the name of the process group whose ranks share first scales, "" for none.
    calibrating: whether an unset scale, which is 0, is computed from the tensor itself.
    records: whether its amaxes are wanted: a site with slots, in training.
    cached: "training" or "inference" if the weights are passed in quantized, for both directions or for forward only.
    keeps_fp8: whether its result, which an activation reads, is kept for backward in FP8 (see `lowering.kept_inputs`); for a producer, an
        activation: whether it keeps its own inputs that way.
    remakes: what backward recomputes instead of keeping: "weights", the FP8 copies that dgrad reads; "input", the FP8 input.
    producer: the computation of the first input, if a kernel of its own writes that quantized.
    in_memory: roles ("input", "grad_output") whose tensor is already in memory: no kernel computes it that could also write it in FP8.
    takes_gradient: how the gradient of a linear's output comes quantized from the site that reads it (see `lowering.handed`), or {};
    hands_gradient: the same for that site.
    attributes: the operation's, plus those of `SemanticOp.attributes_of`.
    """

    op: str
    provider: str
    device: str
    inputs: Spec
    recipe: str = ""
    amax_group: str = ""
    calibrating: bool = False
    records: bool = False
    cached: str = ""
    keeps_fp8: bool = False
    remakes: tuple[str, ...] = ()
    producer: Call | None = None
    in_memory: tuple[str, ...] = ()
    takes_gradient: Mapping[str, Any] = field(default_factory=dict)
    hands_gradient: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Call) and self.key == other.key

    def __getitem__(self, attribute: str) -> Any:
        return self.attributes[attribute]

    @cached_property
    def key(self) -> str:
        return json.dumps(_encoded(self)).translate(_PLAIN)

    def __str__(self) -> str:
        scaling = f"{self.scaling.name} scaling" if self.recipe else "high precision"
        return f"{self.op} by {self.provider}, {scaling}" + (", calibrating" if self.calibrating else "")

    @staticmethod
    @cache
    def parse(key: str) -> Call:
        return _decoded(json.loads(key.translate(_JSON)))

    @property
    def operation(self) -> SemanticOp:
        return op_named(self.op)

    @property
    def scaling(self) -> Recipe:
        """The recipe, as far as kernels need it. Raises if there is none."""
        return from_key(self.recipe)

    @property
    def remakes_weights(self) -> bool:
        """Whether backward recomputes the FP8 copies of weights: cached ones are there anyway."""
        return "weights" in self.remakes and not self.cached

    def but(self, **changes: Any) -> Call:
        """A copy with these fields changed."""
        return replace(self, **changes)

    # -- the inputs as one flat list, as autograd and operators take them

    @property
    def spec(self) -> Spec:
        """`inputs`, with the producer's inputs in place of the operand that it makes."""
        return self.inputs if self.producer is None else (self.producer.spec, *self.inputs[1:])

    def nested(self, flat: Sequence[Any]) -> Any:
        """One value for each tensor of `spec`, nested the same way."""
        values = iter(flat)
        return _arranged(self.spec, values)

    @cached_property
    def count(self) -> int:
        return len(flattened(self.spec))


def flattened(nested: Any) -> list[Any]:
    """The leaves of nested lists and tuples, in order."""
    return [leaf for part in nested for leaf in flattened(part)] if isinstance(nested, (list, tuple)) else [nested]


def _arranged(spec: Spec, values: Iterator[Any]) -> Any:
    return [_arranged(part, values) for part in spec] if isinstance(spec, tuple) else next(values)


def spec_of(values: Any) -> Spec:
    """The `Spec` of tensors, fake or real."""
    if isinstance(values, (list, tuple)):
        return tuple(spec_of(v) for v in values)
    return values.dtype if isinstance(values, Tensor) else None


def _encoded(value: Any) -> Any:
    if isinstance(value, Call):
        values = {name: getattr(value, name) for name in Call.__dataclass_fields__}
        return {name: _encoded(v) for name, v in values.items() if v or name == "inputs"}
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _encoded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(v) for v in value]
    if value is None or isinstance(value, (int, float, bool)) or (isinstance(value, str) and not set("'~") & set(value)):
        return value
    kinds = "a number, a dtype, a text without ' and ~, or a sequence of these"
    raise TypeError(f"te_fp8: an attribute of an operation must be {kinds}, not {value!r}")


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        decoded = {key: _decoded(v) for key, v in value.items()}
        return Call(**decoded) if {"op", "provider", "inputs"} <= value.keys() else decoded
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return tuple(map(_decoded, value)) if isinstance(value, list) else value
