"""Linears by definition."""

from __future__ import annotations

from te_dynamo.lowering.fine_grained import OPERANDS, FineGrainedLinears, defined
from te_dynamo.lowering.grouped import FineGrainedGroups, PerTensorGroups
from te_dynamo.lowering.per_tensor import Kernels, PerTensorLinears, defined_mm
from te_dynamo.lowering.registry import PER_TENSOR, implements

implements("linears", provider="reference", recipes=PER_TENSOR, kernels=Kernels(defined_mm))(PerTensorLinears)
implements("linears", provider="reference", recipes=tuple(OPERANDS), multiply=defined)(FineGrainedLinears)
implements("grouped_linear", provider="reference", recipes=PER_TENSOR, gemm=defined_mm)(PerTensorGroups)
implements("grouped_linear", provider="reference", recipes=tuple(OPERANDS), multiply=defined)(FineGrainedGroups)
