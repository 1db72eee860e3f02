"""Is a loss convex in the network's outputs? Seen from its program.

As in disciplined convex programming (Grant, Boyd & Ye 2006): each value of the program is known
to be constant, affine, convex or concave in the outputs, by what it is made of: a sum of convex
values is convex, so is the square of an affine one. One kind more, log-convex, is for the
softmax: e to a convex value is of that kind, sums keep it, and its logarithm is convex.

Meant is the Hessian that differentiating twice gives, at every point where it exists. So what is
linear in pieces counts as affine, and a choice between convex values as convex.

What can't be seen so may be convex all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy

from fnn.jaxpr import Equation, program, trace
from fnn.operation import call_of


class Value(NamedTuple):
    """kind: one of those below. sign: 1 for values ≥ 0, -1 for values ≤ 0, 0 for any."""

    kind: str
    sign: int = 0


CONSTANT, AFFINE, CONVEX, CONCAVE, LOG_CONVEX, NEITHER = (
    "constant", "affine", "convex", "concave", "log-convex", "neither",
)  # fmt: skip
_BENT_UP = (AFFINE, CONVEX, LOG_CONVEX)
_BENT_DOWN = (AFFINE, CONCAVE)

# Their results are sums of entries of their inputs, or choices among them.
_SUMS = {
    "add", "add_any", "reshape", "squeeze", "expand_dims", "transpose", "rev", "slice", "pad",
    "broadcast_in_dim", "concatenate", "reduce_sum", "convert_element_type", "copy", "copy_p",
    "gather", "dynamic_slice", "reduce_window_sum", "cumsum", "reduce_precision", "select_n",
    "max", "min", "clamp", "reduce_max", "reduce_min", "sort", "cummax", "cummin",
}  # fmt: skip
_WITHOUT_DERIVATIVE = {"stop_gradient", "sign", "floor", "ceil", "round"}
# fnn's own operations: (what its first argument may be, what the result then is).
_OPERATIONS = {
    "squared_error": ((AFFINE,), Value(CONVEX, 1)),
    "sigmoid_binary_cross_entropy": ((AFFINE,), Value(CONVEX)),
    "multiclass_hinge": ((AFFINE,), Value(AFFINE, 1)),
    "huber": ((AFFINE,), Value(CONVEX, 1)),
    "pinball": ((AFFINE,), Value(AFFINE, 1)),
    "poisson_nll": ((AFFINE,), Value(CONVEX)),
    "softplus": (_BENT_UP, Value(CONVEX, 1)),
    "logsumexp": (_BENT_UP, Value(CONVEX)),
    "log_softmax": ((AFFINE,), Value(CONCAVE, -1)),
    "log_sigmoid": (_BENT_DOWN, Value(CONCAVE, -1)),
    "relu": (_BENT_UP, Value(CONVEX, 1)),
}


def is_convex(loss: Callable, z: Any, target: Any) -> bool:
    """Can it be seen that `loss(z, target)` is convex in z, whatever the target?"""
    leaves, tree = jax.tree.flatten(target)
    function = lambda z, *t: [loss(z, jax.tree.unflatten(tree, t))]
    flat = program(trace(function, [z, *leaves]))
    values = {i: _constant(x) for i, x in flat.constants.items()}
    values[flat.inputs[0]] = Value(AFFINE)
    for i in flat.inputs[1:]:
        values[i] = Value(CONSTANT, _sign_of_dtype(flat.avals[i].dtype))
    for equation in flat.equations:
        found = _of_equation(equation, [values[i] for i in equation.ins], flat)
        for i in equation.outs:
            dtype = flat.avals[i].dtype
            is_inexact = jax.dtypes.issubdtype(dtype, jnp.inexact)
            constant = Value(CONSTANT, found.sign or _sign_of_dtype(dtype))
            values[i] = found if is_inexact else constant
    return values[flat.outputs[0]].kind in (CONSTANT, *_BENT_UP)


def _constant(x) -> Value:
    is_number = jax.dtypes.issubdtype(x.dtype, jnp.number)
    if isinstance(x, jax.core.Tracer) or not is_number or jnp.iscomplexobj(x):
        return Value(CONSTANT, _sign_of_dtype(x.dtype))
    x = numpy.asarray(x).astype(float)
    return Value(CONSTANT, 1 if (x >= 0).all() else -1 if (x <= 0).all() else 0)


def _sign_of_dtype(dtype) -> int:
    return int(any(jax.dtypes.issubdtype(dtype, d) for d in (jnp.unsignedinteger, jnp.bool_)))


def _of_equation(equation: Equation, ins: list[Value], flat) -> Value:
    name = equation.name
    kinds = [v.kind for v in ins]
    first = ins[0] if ins else Value(CONSTANT)
    is_complex = any(jnp.iscomplexobj(flat.avals[i]) for i in equation.ins)
    call = call_of(equation)
    if call is not None:
        wanted, result = _OPERATIONS.get(call.rule.name, ((), Value(NEITHER)))
        if call.rule.name == "softmax_cross_entropy":
            # Distributions may have entries below zero.
            is_class = jnp.issubdtype(flat.avals[equation.ins[1]].dtype, jnp.integer)
            wanted, result = ((AFFINE,) if is_class else ()), Value(CONVEX, 1)
        rest = all(k == CONSTANT for k in kinds[1:])
        if all(k == CONSTANT for k in kinds):
            return Value(CONSTANT, result.sign)
        return result if rest and first.kind in wanted else Value(NEITHER)
    if name in _WITHOUT_DERIVATIVE:
        return Value(CONSTANT, first.sign)
    if name in _SUMS:
        parts = ins[1:] if name == "select_n" else ins
        parts = ins[:1] if name in ("gather", "dynamic_slice") else parts
        found = _sum(parts)
        chosen = {"max": 1, "min": -1}.get(name, 0)  # at least, or at most, each of them
        return Value(found.kind, chosen if chosen in [v.sign for v in parts] else found.sign)
    if name == "sub":
        return _sum([first, _negative(ins[1])])
    if name == "neg":
        return _negative(first)
    if name == "iota":
        return Value(CONSTANT, 1)
    if name in ("mul", "dot_general"):
        if name == "mul" and equation.ins[0] == equation.ins[1]:
            return _power(first, 2)
        return _product(*ins)
    if name == "div":
        if ins[1].kind == CONSTANT:
            return _product(first, ins[1])
        return _product(first, _power(ins[1], -1)) if first.kind == CONSTANT else Value(NEITHER)
    if name in ("integer_pow", "square"):
        return _power(first, equation.params.get("y", 2))
    if name == "pow" and equation.ins[1] in flat.constants and not is_complex:
        exponent = flat.constants[equation.ins[1]]
        is_known = jnp.ndim(exponent) == 0 and not isinstance(exponent, jax.core.Tracer)
        if is_known and float(exponent).is_integer():
            return _power(first, int(exponent))
    if all(k == CONSTANT for k in kinds):
        return Value(CONSTANT, int(name in ("exp", "sqrt", "abs", "logistic")))
    if name == "abs" and is_complex:
        return Value(CONVEX, 1) if first.kind == AFFINE else Value(NEITHER)
    if name == "abs" and (first.kind == AFFINE or first.sign == 1):
        return Value(first.kind, 1)
    if name in ("exp", "exp2"):
        return Value(LOG_CONVEX, 1) if first.kind in _BENT_UP else Value(NEITHER)
    if name == "expm1":
        return Value(CONVEX) if first.kind in _BENT_UP else Value(NEITHER)
    if name in ("log", "log1p"):
        if first.kind == LOG_CONVEX:
            return Value(CONVEX, int(name == "log1p"))
        return Value(CONCAVE) if first.kind in _BENT_DOWN else Value(NEITHER)
    if name == "sqrt":
        return Value(CONCAVE, 1) if first.kind in _BENT_DOWN else Value(NEITHER)
    return Value(NEITHER)


def _sum(parts: Sequence[Value]) -> Value:
    kinds = {v.kind for v in parts} - {CONSTANT}
    signs = {v.sign for v in parts}
    sign = signs.pop() if len(signs) == 1 else 0
    if not kinds:
        return Value(CONSTANT, sign)
    if kinds == {LOG_CONVEX}:
        # A constant that isn't below zero is log-convex too.
        return Value(LOG_CONVEX if sign == 1 else CONVEX, sign)
    for result, allowed in ((AFFINE, (AFFINE,)), (CONVEX, _BENT_UP), (CONCAVE, _BENT_DOWN)):
        if kinds.issubset(allowed):
            return Value(result, sign)
    return Value(NEITHER, sign)


def _negative(x: Value) -> Value:
    turned = {CONVEX: CONCAVE, CONCAVE: CONVEX, LOG_CONVEX: CONCAVE}
    return Value(turned.get(x.kind, x.kind), -x.sign)


def _product(x: Value, y: Value) -> Value:
    sign = x.sign * y.sign
    if x.kind == LOG_CONVEX == y.kind:
        return Value(LOG_CONVEX, sign)
    constant, other = (x, y) if x.kind == CONSTANT else (y, x)
    if constant.kind != CONSTANT:
        return Value(NEITHER, sign)
    if other.kind in (CONSTANT, AFFINE):
        return Value(other.kind, sign)
    if constant.sign == 0:
        return Value(NEITHER)
    scaled = other if constant.sign > 0 else _negative(other)
    return Value(scaled.kind, sign)


def _power(x: Value, exponent: int) -> Value:
    is_even = exponent % 2 == 0
    sign = 1 if is_even else x.sign
    if x.kind == CONSTANT:
        return Value(CONSTANT, sign)
    if exponent == 1:
        return x
    if x.kind == LOG_CONVEX and exponent > 0:
        return x
    is_bent_up = x.kind in _BENT_UP and (x.sign == 1 or (x.kind == AFFINE and is_even))
    is_bent_down = x.kind in _BENT_DOWN and x.sign == -1 and is_even
    if exponent > 1 and (is_bent_up or is_bent_down):
        return Value(CONVEX, 1)
    if exponent < 0 and x.kind in _BENT_DOWN and x.sign == 1:
        return Value(CONVEX, 1)
    return Value(NEITHER, sign)
