"""Stage 2: every rule, in the order in which they are applied."""

from __future__ import annotations

from te_dynamo.passes.raise_activation import ACTIVATION_RULES
from te_dynamo.passes.raise_attention import ATTENTION_RULES
from te_dynamo.passes.raise_grouped import GROUPED_RULES
from te_dynamo.passes.raise_linear import LINEAR_RULES
from te_dynamo.passes.raise_norm import NORM_RULES
from te_dynamo.passes.rules import Rule

# Attention first: opaque calls that hold linears are written out, and the linears are raised after it.
FAMILIES: list[list[Rule]] = [[*ATTENTION_RULES], [*GROUPED_RULES, *LINEAR_RULES, *NORM_RULES, *ACTIVATION_RULES]]


def add_rule(rule: Rule) -> None:
    """Applies a rule after all others, in this process."""
    FAMILIES[-1].append(rule)
