"""fnn: neural networks as pure functions, with a backward pass written by hand."""

from fnn.backprop import grad, value_and_grad, vjp
from fnn.operation import Operation, RuleError, rule

__all__ = ["Operation", "RuleError", "grad", "rule", "value_and_grad", "vjp"]
