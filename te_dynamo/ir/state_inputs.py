"""The scale state's inputs of a graph that trains, in their order; one that infers has the first alone."""

from __future__ import annotations

from enum import IntEnum


class StateInput(IntEnum):
    """`StateInput.SCALE.value` is the input's place among those of the state, `.placeholder` its name in the graph."""

    SCALE = 0  # f32 [F]: the scales of the forward tensors
    GRAD_SCALE = 1  # f32 [G]: those of the gradients
    SINK = 2  # f32 [G], requires grad, and used for nothing: its "gradient" carries the amaxes out of backward

    @property
    def placeholder(self) -> str:
        return f"te_{self.name.lower()}"
