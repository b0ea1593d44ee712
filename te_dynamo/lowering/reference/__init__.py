"""The definition: quantize, dequantize, compute in high precision. Runs on any device; tests compare with it."""

from te_dynamo.lowering.registry import provider

provider("reference", lambda device: None)

from te_dynamo.lowering.reference import attention, linears  # noqa: E402, F401  (register themselves)
