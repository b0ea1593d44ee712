"""A weight whose only copy is in FP8 (see `te_dynamo.release_high_precision`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

RELEASED = (
    "te_fp8: the high-precision values of this weight were let go by te_dynamo.release_high_precision: only its FP8 copy is left, which "
    "cannot {what}. Remedy: load the model's weights again (load_state_dict)"
)
UNSAVED = RELEASED.format(what="be saved as the weight") + ", or save `.dequantize()` of it: FP8 values, in its dtype."


class _NoMemory:
    """A storage whose memory may not be read: libraries that save a model first ask for its address."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self.storage, name)

    def data_ptr(self) -> int:
        raise RuntimeError(UNSAVED)


class FP8Weight(Tensor):
    """Has the shape, dtype and device of the weight that it stands for; whatever reads it gets the values of the FP8 copy, in that dtype.

    fp8: the copy: the weight's elements in their order or, if `across`, in the order with its last two dimensions exchanged.
    scale_inv: f32, 0-d or one for each row of the copy, multiplies the elements.
    top: what the amax was scaled to, and that number rounded to FP8; None if the scale is a power of two.
    kept: what must live as long as this does.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    fp8: Tensor
    scale_inv: Tensor
    across: bool
    top: tuple[float, float] | None
    kept: Any

    @staticmethod
    def __new__(
        cls, fp8: Tensor, scale_inv: Tensor, size: Any, stride: Any, dtype: torch.dtype, across: bool, top: tuple[float, float] | None
    ) -> FP8Weight:
        how = {"strides": stride, "dtype": dtype, "device": fp8.device, "requires_grad": False}
        made = Tensor._make_wrapper_subclass(cls, size, **how)
        made.fp8, made.scale_inv, made.across, made.top, made.kept = fp8, scale_inv, across, top, None
        return made

    def values(self) -> Tensor:
        """float32. Quantized again by their own amax, they give the same FP8 values: the largest elements are exactly the amax."""
        data = self.fp8.float()
        values = data * self.scale_inv
        if self.top is not None:
            top, rounded = self.top
            values = torch.where(data.abs() == rounded, data.sign() * top * self.scale_inv, values)
        *lead, rows, columns = self.shape
        return values.reshape(*lead, columns, rows).mT if self.across else values.reshape(self.shape)

    def dequantize(self) -> Tensor:
        """The values in the weight's dtype."""
        return self.values().to(self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["fp8", "scale_inv"], (self.dtype, self.across, self.top)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> FP8Weight:
        return FP8Weight(inner["fp8"], inner["scale_inv"], size, stride, *context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]._with(args[0].fp8, args[0].scale_inv)
        writes = [declared.alias_info is not None and declared.alias_info.is_write for declared in func._schema.arguments]
        if any(isinstance(given, FP8Weight) for given, written in zip(args, writes, strict=False) if written):
            raise RuntimeError(RELEASED.format(what="be written") + ".")
        args, kwargs = tree_map_only(FP8Weight, FP8Weight.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _stable_hash_for_caching(self) -> str:
        """Covers what a compiled graph depends on."""
        return repr([(t.shape, t.stride(), t.dtype, t.device) for t in (self, self.fp8, self.scale_inv)] + [self.across, self.top])

    def _with(self, fp8: Tensor, scale_inv: Tensor) -> FP8Weight:
        made = FP8Weight(fp8, scale_inv, self.shape, self.stride(), self.dtype, self.across, self.top)
        made.kept = self.kept
        return made

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, given: Tensor) -> None:
        """A cast, as `module.bfloat16()` sets it, changes only the dtype: the values stay in FP8. Other values cannot be set."""
        if given.shape != self.shape or given.device != self.device or not torch.equal(given, self.dequantize().to(given.dtype)):
            raise RuntimeError(RELEASED.format(what="be written") + ".")
        cast = FP8Weight(self.fp8, self.scale_inv, self.shape, self.stride(), given.dtype, self.across, self.top)
        Tensor.data.__set__(self, cast)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> FP8Weight:
        made = self._with(self.fp8.clone(), self.scale_inv.clone())
        made.kept = None
        result = memo[id(self)] = torch.nn.Parameter(made, requires_grad=False)
        return result  # type: ignore[return-value]

    def untyped_storage(self) -> Any:
        return _NoMemory(super().untyped_storage())

    def storage(self) -> Any:
        raise RuntimeError(UNSAVED)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(UNSAVED)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FP8Weight({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
