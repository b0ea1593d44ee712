"""`generate` in FP8: `model.generate(..., cache_implementation="static", compile_config=te_dynamo.compile_config())`."""

from __future__ import annotations

from typing import Any

from transformers import CompileConfig

from te_dynamo.config import Options


def compile_config(*, fullgraph: bool = False, dynamic: bool | None = None, mode: str | None = None, **options: Any) -> CompileConfig:
    """How `generate` compiles its decoding step: with te_fp8 and these options. It does so for a static cache, on any device.

        model.generate(**inputs, cache_implementation="static", compile_config=te_dynamo.compile_config(recipe="current"))

    fullgraph, dynamic: as in `torch.compile`; mode, options: te_fp8's (see `te_dynamo.Options`). CompileConfig's own `mode` is
    None, since torch refuses a mode beside options. A GenerationConfig that holds it is printed as JSON, which has names of recipes
    and no recipe objects; `generate` takes both.

    Raises ValueError for an option that is unknown or not allowed.
    """
    if mode is not None:
        options["mode"] = mode
    Options.from_user(options)  # an error now, not at the first token
    given: dict[str, Any] = {"fullgraph": fullgraph, "dynamic": dynamic, "mode": None, "options": options}
    config: Any = CompileConfig(backend="te_fp8", **given)
    config._compile_all_devices = True  # else `generate` on a CPU logs that it compiles nothing, and computes in high precision
    made: CompileConfig = config
    return made
