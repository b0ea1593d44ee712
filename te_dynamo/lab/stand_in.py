"""Replaces the tensors of a model and its inputs by fake ones on the GPU, in place: for a process that ends with the estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only


class StandIns:
    """The fake tensor for each real one: shared tensors stay shared. Use inside a FakeTensorMode."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, so that its id is not reused

    def of(self, t: Tensor) -> Tensor:
        """A fake tensor with the same sizes, strides and dtype, on "cuda"; `t` itself if it is one already."""
        if isinstance(t, FakeTensor) and t.device.type == "cuda":
            return t
        found = self.made.get(id(t))
        if found is None:
            fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            own = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake.requires_grad_(t.requires_grad)
            found = self.made[id(t)] = (t, own)
        return found[1]

    def tree(self, tree: Any) -> Any:
        return tree_map_only(Tensor, self.of, tree)

    def module(self, module: nn.Module) -> None:
        """Replaces parameters, buffers, and tensors in a module's other attributes."""
        for m in module.modules():
            for held in _held(m):
                held.update({name: None if t is None else self.of(t) for name, t in held.items()})
            for name, value in vars(m).items():
                if name not in ("_parameters", "_buffers", "_modules") and isinstance(value, (Tensor, list, tuple, dict)):
                    vars(m)[name] = self.tree(value)


def _held(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


@contextmanager
def building() -> Iterator[None]:
    """While open, inside a FakeTensorMode, a model can be built from fake tensors on the GPU: it takes no memory, and `.to()` and
    truncated normal initialization work."""
    convert, truncated = nn.Module._apply, nn.init._no_grad_trunc_normal_
    nn.Module._apply = _apply  # type: ignore[method-assign]
    nn.init._no_grad_trunc_normal_ = lambda t, *_, **__: t
    try:
        with torch.device("cuda"):
            yield
    finally:
        nn.Module._apply = convert  # type: ignore[method-assign]
        nn.init._no_grad_trunc_normal_ = truncated


def _apply(self: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replaces `nn.Module._apply`, which cannot swap fake parameters: this one replaces them, and tied ones stay tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def converted(t: Tensor) -> Tensor:
        if id(t) not in made:
            with torch.no_grad():
                new = convert(t)
            made[id(t)] = (t, nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new)
        return made[id(t)][1]

    for m in self.modules() if recurse else [self]:
        for held in _held(m):
            held.update({name: None if t is None else converted(t) for name, t in held.items()})
    return self
