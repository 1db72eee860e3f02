"""Is a traced function linear in some of its inputs? Read off its jaxpr.

JAX's transposition asks the same, but it drops constant terms silently (`g + 1` transposes like
`g`), and there are linear functions that it can't transpose (a while loop). So every value of
the jaxpr is given one of these kinds, in order, from the inputs to the outputs:

    ZERO       known to be zero, whatever the inputs are
    CONSTANT   doesn't depend on the inputs in question
    LINEAR     linear in them
    another    the reason why it is neither, in words

What JAX's usual primitives do stands in the tables below. Of any other primitive its derivative
tells: a function is linear in `x`, up to a constant, where its derivative with respect to `x`
doesn't depend on `x`; and if that holds for x and c together, then f(x, c) = A x + B c, and c is a
constant term.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fnn.jaxpr import Equation, Program, close, is_inexact, program, scan_layout
from fnn.operation.call import call_of

ZERO, CONSTANT, LINEAR = "is zero", "is constant", "is linear"
_KNOWN = (ZERO, CONSTANT, LINEAR)

# f(x, c) = A x + B c, in the operands at the given places (all of them, where none are given).
_SUMS: dict[str, Any] = {
    **dict.fromkeys(("add", "sub", "add_any", "concatenate", "complex", "pad")),
    "select_n": slice(1, None),
    "dynamic_update_slice": slice(0, 2),
    "scatter": slice(0, None, 2),
    "scatter-add": slice(0, None, 2),
    "scatter_add": slice(0, None, 2),
    "scatter-sub": slice(0, None, 2),
    # Of one operand each; with as many results as operands, each of its own.
    **dict.fromkeys(
        (
            *("broadcast_in_dim", "convert_element_type", "copy", "copy_p", "device_put"),
            *("expand_dims", "optimization_barrier", "reduce_precision", "reshape", "rev", "slice"),
            *("split", "squeeze", "tile", "transpose", "conj", "imag", "neg", "real"),
            *("cumsum", "reduce_sum", "reduce_window_sum"),
            *("mesh_cast", "pcast", "pvary", "reshard", "sharding_constraint"),
            *("all_gather", "all_gather_invariant", "all_to_all", "ppermute", "psum", "psum2"),
            *("psum_invariant", "reduce_scatter"),
        )
    ),
    "dynamic_slice": slice(0, 1),
    "gather": slice(0, 1),
}

# Linear in each of these operands while the others stay as they are.
_PRODUCTS: dict[str, Any] = {
    **dict.fromkeys(("mul", "dot_general", "conv_general_dilated")),
    "div": slice(0, 1),
    "triangular_solve": slice(1, None),
}

# Not linear, but zero where all operands are.
_ZERO_AT_ZERO = {
    *("abs", "cbrt", "ceil", "erf", "erf_inv", "expm1", "floor", "log1p", "round", "sign", "sqrt"),
    *("asin", "asinh", "atan", "atanh", "sin", "sinh", "square", "tan", "tanh"),
    *("cummax", "cummin", "max", "min", "reduce_max", "reduce_min", "sort", "and", "or", "xor"),
}

_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def kinds(closed_jaxpr: Any, ins: Sequence[str], strict: bool = False) -> list[str]:
    """The kinds of the outputs, given those of the inputs.

    Args:
        closed_jaxpr: the traced function.
        ins: the kind of each input.
        strict: whether to look for what isn't linear at all, such as a sine. Without it only
            constant terms are found; JAX's transposition finds the rest.
    """
    return _Reader(program(closed_jaxpr), strict).outputs(ins)


class _Reader:
    def __init__(self, flat: Program, strict: bool):
        self.flat, self.strict = flat, strict

    def outputs(self, ins: Sequence[str]) -> list[str]:
        known = {i: _of_constant(value) for i, value in self.flat.constants.items()}
        known.update(zip(self.flat.inputs, ins, strict=True))
        for equation in self.flat.equations:
            outs = self.equation(equation, [known[i] for i in equation.ins])
            known.update(zip(equation.outs, outs, strict=True))
        return [known[i] for i in self.flat.outputs]

    def body(self, jaxpr, ins: Sequence[str]) -> list[str]:
        """The kinds of the outputs of a jaxpr in an equation's parameters."""
        return _Reader(program(close(jaxpr)), self.strict).outputs(ins)

    def equation(self, equation: Equation, ins: list[str]) -> list[str]:
        if all(kind == CONSTANT for kind in ins):
            return [CONSTANT] * len(equation.outs)
        name, params = equation.name, equation.params
        if name == "cond":
            branches = [self.body(branch, ins[1:]) for branch in params["branches"]]
            outs = [_either(of_branch) for of_branch in zip(*branches, strict=True)]
            return self.decided(ins[0], "which branch is taken", outs)
        if name == "while":
            return self.while_loop(params, ins)
        if name == "scan":
            return self.scan(params, ins)
        for key in _BODIES:
            inner = params.get(key)
            if hasattr(inner, "eqns") and len(close(inner).in_avals) == len(ins):
                return self.body(inner, ins)
        bad = [kind for kind in ins if kind not in _KNOWN]
        if bad:
            return bad[:1] * len(equation.outs)
        return self.primitive(equation, ins)

    def decided(self, by: str, what: str, outs: list[str]) -> list[str]:
        if by in (ZERO, CONSTANT):
            return outs
        reason = f"decides {what}" if by == LINEAR else by
        return [reason] * len(outs)

    def while_loop(self, params, ins):
        n, m = params["cond_nconsts"], params["body_nconsts"]
        cond_consts, body_consts, carry = ins[:n], ins[n : n + m], ins[n + m :]
        carry = _settled(carry, lambda c: self.body(params["body_jaxpr"], [*body_consts, *c]))
        (goes_on,) = self.body(params["cond_jaxpr"], [*cond_consts, *carry])
        return self.decided(goes_on, "when a loop ends", carry)

    def scan(self, params, ins):
        n, m = scan_layout(params)
        consts, carry, xs = ins[:n], ins[n : n + m], ins[n + m :]
        step = lambda c: self.body(params["jaxpr"], [*consts, *c, *xs])
        carry = _settled(carry, lambda c: step(c)[:m])
        return [*carry, *step(carry)[m:]]

    def primitive(self, equation: Equation, ins: list[str]) -> list[str]:
        name, count = equation.name, len(equation.outs)
        if name in _SUMS:
            place = _SUMS[name] or slice(None)
            if count > 1 and count == len(ins):
                return ins
            kind = self.summed(equation, ins, list(range(len(ins)))[place])
        elif name in _PRODUCTS:
            factors = list(range(len(ins)))[_PRODUCTS[name] or slice(None)]
            kind = self.multiplied(equation, ins, factors)
        elif all(kind == ZERO for kind in ins) and name in _ZERO_AT_ZERO:
            kind = ZERO
        else:
            return self.unknown(equation, ins)
        return [kind] * count

    def summed(self, equation: Equation, ins: list[str], terms: Sequence[int]) -> str:
        others = [k for i, k in enumerate(ins) if i not in terms]
        of_terms = [ins[i] for i in terms]
        if LINEAR in others and self.strict:
            return _nonlinear(equation)
        if LINEAR in of_terms and CONSTANT in of_terms:
            return self.constant_term(equation.ins[terms[of_terms.index(CONSTANT)]])
        if LINEAR in ins:
            return self.still_a_number(equation, 0)
        return ZERO if all(k == ZERO for k in of_terms) else CONSTANT

    def multiplied(self, equation: Equation, ins: list[str], factors: Sequence[int]) -> str:
        if LINEAR in ins:
            moving = [i for i, kind in enumerate(ins) if kind == LINEAR]
            is_linear = len(moving) == 1 and moving[0] in factors
            return LINEAR if is_linear or not self.strict else _nonlinear(equation)
        return ZERO if any(ins[i] == ZERO for i in factors) else CONSTANT

    def unknown(self, equation: Equation, ins: list[str]) -> list[str]:
        """By the derivative: each result on its own."""
        floats = [k for k, i in enumerate(equation.ins) if self.is_inexact(i)]
        flows = [i for i in floats if ins[i] in (ZERO, LINEAR)]
        avals = [self.flat.avals[i] for i in equation.ins]
        together = _linear_in(equation, avals, floats) if flows else None
        alone = together
        if flows and flows != floats:
            alone = _linear_in(equation, avals, flows)
        outs = []
        for k in range(len(equation.outs)):
            terms = together[k] if together else None
            if terms:
                of_terms = [kind if i in terms else CONSTANT for i, kind in enumerate(ins)]
                outs.append(self.summed(equation, of_terms, terms))
            elif LINEAR not in ins:
                outs.append(ZERO if alone and alone[k] else CONSTANT)
            elif alone and alone[k] is None and self.strict:
                outs.append(self.inside(equation, avals, ins, k))
            else:  # linear, or there is no telling
                outs.append(self.still_a_number(equation, k))
        return outs

    def inside(self, equation: Equation, avals: list, ins: list[str], k: int) -> str:
        """By what an operation of fnn computes: its derivative is handed what it is linear in."""
        call = call_of(equation)
        if call is not None:
            kind = self.body(jax.make_jaxpr(call.primal)(*avals), ins)[k]
            if kind in _KNOWN:
                return kind
        return _nonlinear(equation)

    def still_a_number(self, equation: Equation, k: int) -> str:
        """Linear, unless it is a comparison or is rounded to integers."""
        if not self.strict or self.is_inexact(equation.outs[k]):
            return LINEAR
        return _nonlinear(equation)

    def is_inexact(self, i: int) -> bool:
        aval = self.flat.avals[i]
        return hasattr(aval, "dtype") and is_inexact(aval)

    def constant_term(self, i: int) -> str:
        shape, value = self.flat.avals[i].shape, self.flat.constants.get(i)
        is_number = shape == () and value is not None and not isinstance(value, jax.core.Tracer)
        return f"has a constant term ({value if is_number else f'of shape {shape}'})"


def _nonlinear(equation: Equation) -> str:
    return f"goes through '{equation.name}', which isn't linear there"


def _either(kinds_: Sequence[str]) -> str:
    """Of a value that is one or another."""
    found = set(kinds_)
    bad = [k for k in kinds_ if k not in _KNOWN]
    if bad:
        return bad[0]
    if {LINEAR, CONSTANT} <= found:
        return "has a constant term (in one branch, or where a loop starts)"
    return next(k for k in (LINEAR, CONSTANT, ZERO) if k in found)


def _settled(carry: list[str], step) -> list[str]:
    """What a loop carries, once another round changes nothing."""
    while (after := [_either(pair) for pair in zip(carry, step(carry), strict=True)]) != carry:
        carry = after
    return carry


def _linear_in(
    equation: Equation, avals: list, moving: Sequence[int]
) -> list[list[int] | None] | None:
    """For each result, in which inputs it is linear; None where it isn't. None: can't be told.

    Linear (up to a constant) is what has the same derivative everywhere, and one that isn't
    zero. (A floor's is zero everywhere.)

    Args:
        avals: the types of the inputs.
        moving: the inputs in question.
    """

    def derivative(xs, dxs, others):
        def at(*xs):
            values = list(others)
            for i, x in zip(moving, xs, strict=True):
                values[i] = x
            return equation.bind(values)

        return jax.jvp(at, xs, dxs)[1]

    some = [avals[i] for i in moving]
    try:
        flat = program(jax.make_jaxpr(derivative)(some, some, avals))
    except Exception:
        return None
    n = len(moving)
    points, directions = flat.inputs[:n], flat.inputs[n : 2 * n]
    results: list[list[int] | None] = []
    for out in flat.outputs:
        _, needed = flat.needed_for([out])
        along = [i for i, direction in zip(moving, directions, strict=True) if direction in needed]
        results.append(along if along and needed.isdisjoint(points) else None)
    return results


def _of_constant(value) -> str:
    if isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
        return CONSTANT
    is_key = jax.dtypes.issubdtype(jax.typeof(value).dtype, jax.dtypes.extended)
    return CONSTANT if is_key or np.any(np.asarray(value)) else ZERO
