"""The semantic operations, by name; each is defined in a file of its own, in `te_dynamo.ir`."""

from te_dynamo.ir.activation import activation
from te_dynamo.ir.attention import attention
from te_dynamo.ir.grouped_linear import grouped_linear
from te_dynamo.ir.linear import linear, linears
from te_dynamo.ir.norm import NormKind, norm
from te_dynamo.ir.permute import permute
from te_dynamo.ir.qkv import qkv

__all__ = ["NormKind", "activation", "attention", "grouped_linear", "linear", "linears", "norm", "permute", "qkv"]
