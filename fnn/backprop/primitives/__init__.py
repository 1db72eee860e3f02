"""The hand-written backward rules of JAX's own primitives, a file a family.

The table is put together here and nowhere else; a primitive without a rule falls back to
`jax.vjp` of its one equation.
"""

from __future__ import annotations

from fnn.backprop import control_flow
from fnn.backprop.primitives import (
    convolution,
    elementwise,
    fourier,
    indexing,
    linear_algebra,
    matmul,
    pooling,
    reductions,
    structural,
)
from fnn.backprop.rules import ControlRule, LocalRule
from fnn.jaxpr import Equation
from fnn.operation import call_of, linear_map_of

FALLBACK = ControlRule(*control_flow.THROUGH_JAX)


def rule_of(equation: Equation) -> LocalRule | ControlRule:
    """The rule of an equation: its operation's, its primitive's, or JAX's own as a fallback."""
    if call_of(equation) is not None:
        return control_flow.OPERATION
    if linear_map_of(equation) is not None:
        return control_flow.THROUGH_JAX
    return RULES.get(equation.name, FALLBACK)


def is_ruled(equation: Equation) -> bool:
    """Has this equation a hand-written rule?"""
    return rule_of(equation) is not FALLBACK


RULES: dict[str, LocalRule | ControlRule] = {
    **elementwise.RULES,
    **reductions.RULES,
    **structural.RULES,
    **indexing.RULES,
    **matmul.RULES,
    **convolution.RULES,
    **pooling.RULES,
    **fourier.RULES,
    **linear_algebra.RULES,
    **control_flow.rules(rule_of),
}
