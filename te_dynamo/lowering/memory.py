"""The option `memory`: what is kept from forward to backward, and what backward recomputes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Memory:
    """What one setting of the option keeps.

    copies: the transposed FP8 weights of a linear with N output features and T tokens: "kept"; "small": kept where N <= 2 T; "remade":
        quantized again.
    inputs: the FP8 inputs of linears: "kept", or "remade" by the kernels that compute their backward or by kernels next to them. An input
        that is in memory in high precision anyway, such as an attention's result, is kept: reading it again would save the least.
    activations: what an activation between two linears reads: in the "model" dtype or in "fp8".
    """

    copies: str
    inputs: str
    activations: str

    def remakes(self, features: int, tokens: Any, *, in_memory: bool) -> tuple[str, ...]:
        """What backward recomputes (`Call.remakes`) for the linears of one input. features: their total N; tokens: may be symbolic;
        in_memory: whether the input is in memory anyway."""
        small = isinstance(tokens, int) and features <= 2 * tokens
        copies = self.copies == "remade" or (self.copies == "small" and not small)
        return (*(["weights"] if copies else []), *(["input"] if self.inputs == "remade" and not in_memory else []))


MEMORY: Mapping[str, Memory] = {
    "speed": Memory(copies="kept", inputs="kept", activations="model"),
    "balanced": Memory(copies="small", inputs="kept", activations="fp8"),
    "saving": Memory(copies="remade", inputs="remade", activations="fp8"),
}
