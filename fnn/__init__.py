"""fnn: neural networks as pure functions, with a backward pass written by hand."""

from fnn.backprop import Graph, grad, graph, value_and_grad, vjp
from fnn.operation import Operation, RuleError, rule

__all__ = ["Graph", "Operation", "RuleError", "grad", "graph", "rule", "value_and_grad", "vjp"]
