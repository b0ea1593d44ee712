"""The definition: quantize, dequantize, high-precision maths. On any device; what tests compare with."""

from te_dynamo.lowering.registry import provider

provider("reference", lambda device: None)

from te_dynamo.lowering.reference import attention, linears  # noqa: E402, F401  (register themselves)
