"""FP8 training and inference of unmodified PyTorch models: `torch.compile(model, backend="te_fp8")`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from te_dynamo import recipe
from te_dynamo.config import Options, set_options

if TYPE_CHECKING:
    from te_dynamo.integrations.generation import compile_config
    from te_dynamo.lab.estimate import estimate
    from te_dynamo.release import release_high_precision
    from te_dynamo.report.explain import explain
    from te_dynamo.state.saved import scale_state
    from te_dynamo.weight_cache import weights_changed

__all__ = [
    "Options",
    "__version__",
    "compile_config",
    "estimate",
    "explain",
    "recipe",
    "release_high_precision",
    "scale_state",
    "set_options",
    "weights_changed",
]
__version__ = "0.1.0"

# Imported at first use: setting options must not cost the import of the compiler.
_LAZY = {
    "compile_config": "te_dynamo.integrations.generation",
    "estimate": "te_dynamo.lab.estimate",
    "explain": "te_dynamo.report.explain",
    "release_high_precision": "te_dynamo.release",
    "scale_state": "te_dynamo.state.saved",
    "weights_changed": "te_dynamo.weight_cache",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
