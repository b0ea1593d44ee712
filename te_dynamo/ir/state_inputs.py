"""The inputs that a training graph has for the scale state, in order; an inference graph has only the first."""

from __future__ import annotations

from enum import IntEnum


class StateInput(IntEnum):
    """`StateInput.SCALE.value` is the input's position among the state inputs, `.placeholder` its name in the graph."""

    SCALE = 0  # f32 [F]: the scales of the forward tensors
    GRAD_SCALE = 1  # f32 [G]: the scales of the gradients
    SINK = 2  # f32 [G], requires grad, otherwise unused: its "gradient" carries the amaxes out of backward

    @property
    def placeholder(self) -> str:
        return f"te_{self.name.lower()}"
