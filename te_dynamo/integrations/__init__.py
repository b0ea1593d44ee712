"""Support for te_fp8 in other libraries. Each module is imported by name, and none by te_dynamo itself.

accelerate.py      TEFP8Plugin; scale state in `save_state` and `load_state`; Accelerate accepts the name "te_fp8"
transformers.py    TEFP8Callback for the Trainer
generation.py      compile_config for `generate`
fp8_kwargs.py      Accelerate's FP8 settings as te_fp8's options
dynamo_names.py    makes Accelerate accept every registered backend
scale_file.py      scale state as a safetensors file
run.py             `python -m te_dynamo run script.py`
"""
