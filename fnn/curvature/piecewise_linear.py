"""Is a network linear in pieces, in each of its parameters by itself? Seen from its program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn.batch import example_types
from fnn.eager import apply
from fnn.jaxpr import inner_jaxprs, program, trace
from fnn.operation import call_of
from fnn.per_example.inputs import parameters

# Linear, or linear in pieces, in all their inputs together.
_LINEAR = {
    "add",
    "sub",
    "neg",
    "add_any",
    "reshape",
    "squeeze",
    "expand_dims",
    "transpose",
    "rev",
    "broadcast_in_dim",
    "slice",
    "concatenate",
    "pad",
    "reduce_sum",
    "convert_element_type",
    "copy",
    "copy_p",
    "select_n",
    "max",
    "min",
    "abs",
    "clamp",
    "reduce_max",
    "reduce_min",
    "gather",
    "dynamic_slice",
    "reduce_window_sum",
    "reduce_window_max",
    "select_and_gather_add",
    "reduce_precision",
    "sort",
    "real",
    "imag",
}
_BILINEAR = {"dot_general", "conv_general_dilated", "mul"}
_PIECEWISE_LINEAR_OPERATIONS = {"relu", "leaky_relu", "maxout", "hard_tanh", "relu6", "window_max"}
_NOT_DIFFERENTIATED = {
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "and",
    "or",
    "not",
    "sign",
    "floor",
    "ceil",
    "round",
    "iota",
    "argmax",
    "argmin",
    "is_finite",
    "stop_gradient",
    "random_bits",
    "shift_right_logical",
}


def piecewise_linear(model: Callable, params: Any, inputs: Any) -> bool:
    """Are the outputs, in pieces, linear in each parameter array while the others are fixed?

    Then a parameter's second derivative by itself is zero almost everywhere. Seen from the
    program: each value carries the set of parameters that it depends on; products multiply
    values without a parameter in common, and all else is linear in pieces.
    """
    _, leaves, tree = parameters(params)
    example = example_types(inputs)
    example_leaves, example_tree = jax.tree.flatten(example)

    def flat(*args):
        here = jax.tree.unflatten(tree, args[: len(leaves)])
        return [model(here, jax.tree.unflatten(example_tree, args[len(leaves) :]))]

    traced = program(trace(flat, [*leaves, *example_leaves]))
    given = [frozenset([i]) for i in range(len(leaves))] + [frozenset()] * len(example_leaves)
    return _parameters_of(traced, given) is not None


def _parameters_of(flat, given, *, own_rules: bool = True) -> list[frozenset] | None:
    """Of which parameters each output is a piecewise linear function; None if it isn't.

    own_rules: whether to look at the derivatives of functions that have a rule of their own.
    """
    depends: dict[int, frozenset] = {i: frozenset() for i in flat.constants}
    depends.update(zip(flat.inputs, given, strict=True))
    for equation in flat.equations:
        ins = [depends[i] for i in equation.ins]
        union = frozenset().union(*ins)
        call = call_of(equation)
        name = equation.name
        outs = [union] * len(equation.outs)
        if not union or name in _NOT_DIFFERENTIATED:
            outs = [frozenset()] * len(equation.outs)
        elif call is not None:
            if call.rule.name not in _PIECEWISE_LINEAR_OPERATIONS:
                return None
            # maxout multiplies its weights with its input.
            if sum(len(i) for i in ins) != len(union):
                return None
        elif name in _BILINEAR:
            if ins[0] & ins[1]:
                return None
        elif name == "div":
            if ins[1]:
                return None
        elif name in ("custom_jvp_call", "custom_vjp_call"):
            avals = [flat.avals[i] for i in equation.ins]
            if not own_rules or not _derivative_is_constant(equation, avals, ins):
                return None
        elif name in ("cond", "checkpoint", "remat2"):
            operands = ins[1:] if name == "cond" else ins
            found = [
                _parameters_of(
                    program(j),
                    operands[-len(j.in_avals) :] if j.in_avals else [],
                    own_rules=own_rules,
                )
                for role, j in inner_jaxprs(equation).items()
                if len(j.in_avals) == len(operands)
            ]
            if not found or any(f is None for f in found):
                return None
        elif name not in _LINEAR:
            return None
        elif name == "abs" and jnp.iscomplexobj(flat.avals[equation.ins[0]]):
            return None  # √(x² + y²)
        depends.update(zip(equation.outs, outs, strict=True))
    return [depends[i] for i in flat.outputs]


def _derivative_is_constant(equation, avals, ins) -> bool:
    """Is the rule that a function has for its derivative the same at all points, in pieces?

    The rule needn't be the function's own derivative: a step function may have a smooth one.
    """
    moving = [k for k, parameters in enumerate(ins) if parameters]

    def derivative(values, cotangents):
        def of_moving(*given):
            here = list(values)
            for k, x in zip(moving, given, strict=True):
                here[k] = x
            return apply(equation, here)

        return list(jax.vjp(of_moving, *[values[k] for k in moving])[1](cotangents))

    struct = lambda aval: jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    values = [struct(a) for a in avals]
    outs = jax.eval_shape(equation.bind, values)
    if not all(jnp.issubdtype(x.dtype, jnp.inexact) for x in [*outs, *(values[k] for k in moving)]):
        return False
    flat = program(trace(derivative, [values, outs]))
    given = [frozenset([k]) if ins[k] else frozenset() for k in range(len(values))]
    # A rule that calls the function itself would be looked at for ever.
    found = _parameters_of(flat, [*given, *[frozenset()] * len(outs)], own_rules=False)
    return found is not None and not any(found)
