"""The semantic operations: what a site of the model means, independent of how it is computed. One file each.

op.py               how an operation is declared
linear.py grouped_linear.py norm.py activation.py qkv.py attention.py   the operations; `te_dynamo.ops` has them by name
graph.py sizes.py meta.py           reading and writing FX graphs, and the notes of passes on nodes
"""

import te_dynamo.ir.activation
import te_dynamo.ir.attention
import te_dynamo.ir.grouped_linear
import te_dynamo.ir.linear
import te_dynamo.ir.norm
import te_dynamo.ir.qkv  # noqa: F401  (they declare their operations)
from te_dynamo.ir.op import all_ops, op_named, op_of, operation, site_of

__all__ = ["all_ops", "op_named", "op_of", "operation", "site_of"]
