"""`generate` in FP8: `model.generate(..., cache_implementation="static", compile_config=te_dynamo.compile_config())`."""

from __future__ import annotations

from typing import Any

from transformers import CompileConfig

from te_dynamo.config import Options


def compile_config(*, fullgraph: bool = False, dynamic: bool | None = None, mode: str | None = None, **options: Any) -> CompileConfig:
    """Makes `generate` compile its decoding step with te_fp8 and these options: for a static cache, on any device.

        model.generate(**inputs, cache_implementation="static", compile_config=te_dynamo.compile_config(recipe="current"))

    fullgraph, dynamic: as in `torch.compile`; mode, options: te_fp8's (see `te_dynamo.Options`). CompileConfig's own `mode` is
    None, since torch rejects a mode together with options. A GenerationConfig is printed as JSON: to print one with this config, give
    recipes by name, not as objects; `generate` accepts both.

    Raises ValueError for an option that is unknown or not allowed.
    """
    if mode is not None:
        options["mode"] = mode
    Options.from_user(options)  # an error now, not at the first token
    given: dict[str, Any] = {"fullgraph": fullgraph, "dynamic": dynamic, "mode": None, "options": options}
    config: Any = CompileConfig(backend="te_fp8", **given)
    config._compile_all_devices = True  # else `generate` on a CPU logs that it does not compile, and computes in high precision
    made: CompileConfig = config
    return made
