"""Transformer Engine's `_extra_state`: a module's scales and histories, pickled into a uint8 tensor or an io.BytesIO.

`scale_fwd` f32 [3 n] and `amax_history_fwd` f32 [length, 3 n] for n GEMMs: input, weight, output of each; `scale_bwd` f32
[2 n] and `amax_history_bwd`: the gradients of output and input. (TE 2.20, pytorch/module/base.py, get_extra_state.)
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from te_dynamo.ir import linear
from te_dynamo.state.names import join

SUFFIX = "_extra_state"
# By pass: the roles that we keep for each GEMM, and how many scales TE has for it (those of the roles come first).
PER_GEMM = {"fwd": (linear.FORWARD, 3), "bwd": (linear.GRADIENT, 2)}

Names = Mapping[str, Any] | Callable[[str], Any] | None


def entries_of_te(state_dict: Mapping[str, Any], names: Names) -> dict[str, Tensor]:
    """A TE model's `state_dict()` -> scale-state entries, named as in `ModelScaleState.state_dict`."""
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key != SUFFIX and not key.endswith("." + SUFFIX):
            continue
        path = key.removesuffix(SUFFIX).removesuffix(".")
        state, ours = _read(key, value), _renamed(path, names)
        if not state or "scale_fwd" not in state or ours is None:
            continue
        for gemm, name in enumerate([ours] if isinstance(ours, str) else ours):
            for pass_, (roles, stride) in PER_GEMM.items():
                scales, history = state[f"scale_{pass_}"], state[f"amax_history_{pass_}"]
                first, needed = gemm * stride, (gemm + 1) * stride
                if scales.numel() < needed:
                    raise ValueError(
                        f"te_fp8: {key} holds {scales.numel()} scales in scale_{pass_}, but GEMM {gemm} ({name!r}) would need {needed}; "
                        "`names` must give one path for each GEMM of the module"
                    )
                for place, role in enumerate(roles, first):
                    slot = join(name, role)
                    result[f"{slot}.scale"] = scales[place].clone()
                    result[f"{slot}.amax_history"] = history[:, place].clone()
    return result


def _renamed(path: str, names: Names) -> Any:
    if names is None:
        return path
    return names(path) if callable(names) else names.get(path, path)


def _read(key: str, value: Any) -> dict[str, Any] | None:
    """What an entry holds; None if it is empty."""
    if value is None:
        return None
    if isinstance(value, io.BytesIO):
        data = value.getvalue()
    elif isinstance(value, Tensor) and value.dtype == torch.uint8:
        data = value.detach().cpu().numpy().tobytes()
    else:
        raise ValueError(f"te_fp8: {key} is a {type(value).__name__}, but Transformer Engine stores a uint8 tensor or an io.BytesIO there")
    if not data:
        return None
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):  # torch.save's form, in older checkpoints
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False, pickle_module=_Restricted)
        else:
            loaded = _Unpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"te_fp8: {key} cannot be read: {error}; remove this entry if its scales are not needed") from error
    return loaded if isinstance(loaded, dict) else None


class _Inert:
    """Stands in for one of Transformer Engine's own objects (the recipe), and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_ADMITTED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "FloatStorage"),
    ("torch", "ByteStorage"),
    ("torch", "Size"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "TypedStorage"),
    ("torch.storage", "_load_from_bytes"),
}


class _Unpickler(pickle.Unpickler):
    """Admits tensors and plain containers. The recipe, which TE stores with them, becomes an inert object."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage  # torch's own would unpickle anything
        if (module, name) in _ADMITTED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("transformer_engine."):
            return _Inert
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no tensor and no plain container")


def _load_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class _Restricted:
    """What `torch.load` requires of a pickle module."""

    Unpickler = _Unpickler
    load = staticmethod(lambda file, **kwargs: _Unpickler(file, **kwargs).load())
