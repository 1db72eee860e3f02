"""`fnn.rule`: an operation with a hand-written backward rule, valid under every JAX transform."""

from fnn.operation.decorator import (
    Axis,
    Call,
    LinearMap,
    MappedCall,
    MappedLinearMap,
    Operation,
    RuleError,
    call_of,
    compiled_rule,
    linear_map_of,
    mapped_results,
    rule,
)

__all__ = [
    "Axis",
    "Call",
    "LinearMap",
    "MappedCall",
    "MappedLinearMap",
    "Operation",
    "RuleError",
    "call_of",
    "compiled_rule",
    "linear_map_of",
    "mapped_results",
    "rule",
]
