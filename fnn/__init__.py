"""fnn: neural networks as pure functions, with a backward pass written by hand."""

from fnn.operation import Operation, RuleError, rule

__all__ = ["Operation", "RuleError", "rule"]
