"""What an attention mask is, proved from the graph that builds it.

Each tensor of the graph is read as a function from its indices to its value: `arange(n)` at `[k]` is `k`, a view asks its
base at other indices, `le` at `[i, j]` is an inequality between integers (`tensors`, `reader`). So the mask becomes a formula
over its row `i`, its column `j` and the sizes, and "row i attends to column j iff j <= i" a statement of linear arithmetic,
decided for all sizes at once and without a guard on any of them (`formulas`, `proof`). A proof is never a guess: what is not
understood, is written in place behind the graph's back, or may overflow or round, is "unknown" with the reason.
Data, such as an `attention_mask` or `position_ids`, counts as integers of any value: a mask that depends on it has a
formula too, which says what it is without an S x S tensor (`attends`). Where every size is static and no data is read, a mask
that the symbols do not settle is computed and compared (`compare`).
"""

from te_dynamo.passes.masks.formulas import Unproven
from te_dynamo.passes.masks.proof import Proof, prove, simplify_masks

__all__ = ["Proof", "Unproven", "prove", "simplify_masks"]
