"""Is a traced function linear in some of its inputs? Read off its jaxpr.

JAX's transposition asks the same, but it drops constant terms silently (`dy + 1` transposes like
`dy`), and there are linear functions that it can't transpose (a while loop). So every value of
the jaxpr is given one of these kinds, in order, from the inputs to the outputs:

    ZERO       known to be zero, whatever the inputs are
    CONSTANT   doesn't depend on the inputs in question
    LINEAR     linear in them
    another    the reason why it is neither, in words

What JAX's usual primitives do stands in the tables below. Of any other primitive its derivative
tells: a function is linear in `x`, up to a constant, where its derivative by `x` doesn't depend
on `x`; and if that holds for x and c together, then f(x, c) = A x + B c, and c is a constant term.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.jaxpr import scan_layout

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
    jaxpr = closed_jaxpr.jaxpr
    consts = [_of_constant(c) for c in closed_jaxpr.consts]
    return _Reader(strict).outputs(jaxpr, [*consts, *ins])


class _Reader:
    def __init__(self, strict: bool):
        self.strict = strict

    def outputs(self, jaxpr, ins: Sequence[str]) -> list[str]:
        """The kinds of a jaxpr's outputs; `ins` those of its constants, then of its inputs."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], ins, strict=True))
        read = lambda v: _of_constant(v.val) if hasattr(v, "val") else known[v]
        for eqn in jaxpr.eqns:
            known.update(zip(eqn.outvars, self.equation(eqn, list(map(read, eqn.invars)))))
        return list(map(read, jaxpr.outvars))

    def body(self, closed, ins: Sequence[str]) -> list[str]:
        """The outputs of a jaxpr in an equation's parameters, with its constants or without."""
        if not hasattr(closed, "consts"):
            return self.outputs(closed, ins)
        return self.outputs(closed.jaxpr, [*map(_of_constant, closed.consts), *ins])

    def equation(self, eqn, ins: list[str]) -> list[str]:
        if all(kind == CONSTANT for kind in ins):
            return [CONSTANT] * len(eqn.outvars)
        name, params = eqn.primitive.name, eqn.params
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
            open_jaxpr = getattr(inner, "jaxpr", inner)
            if len(getattr(open_jaxpr, "invars", ())) == len(ins) and hasattr(open_jaxpr, "eqns"):
                return self.body(inner, ins)
        bad = [kind for kind in ins if kind not in _KNOWN]
        if bad:
            return bad[:1] * len(eqn.outvars)
        return self.primitive(eqn, ins)

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

    def primitive(self, eqn, ins: list[str]) -> list[str]:
        name, count = eqn.primitive.name, len(eqn.outvars)
        if name in _SUMS:
            place = _SUMS[name] or slice(None)
            if count > 1 and count == len(ins):
                return ins
            kind = self.summed(eqn, ins, list(range(len(ins)))[place])
        elif name in _PRODUCTS:
            kind = self.multiplied(eqn, ins, list(range(len(ins)))[_PRODUCTS[name] or slice(None)])
        elif all(kind == ZERO for kind in ins) and name in _ZERO_AT_ZERO:
            kind = ZERO
        else:
            return self.unknown(eqn, ins)
        return [kind] * count

    def summed(self, eqn, ins, terms) -> str:
        others = [k for i, k in enumerate(ins) if i not in terms]
        of_terms = [ins[i] for i in terms]
        if LINEAR in others and self.strict:
            return _nonlinear(eqn)
        if LINEAR in of_terms and CONSTANT in of_terms:
            constant = eqn.invars[terms[of_terms.index(CONSTANT)]]
            return _constant_term(getattr(constant, "val", None), constant.aval)
        if LINEAR in ins:
            return self.still_a_number(eqn, 0)
        return ZERO if all(k == ZERO for k in of_terms) else CONSTANT

    def multiplied(self, eqn, ins, factors) -> str:
        if LINEAR in ins:
            moving = [i for i, kind in enumerate(ins) if kind == LINEAR]
            is_linear = len(moving) == 1 and moving[0] in factors
            return LINEAR if is_linear or not self.strict else _nonlinear(eqn)
        return ZERO if any(ins[i] == ZERO for i in factors) else CONSTANT

    def unknown(self, eqn, ins) -> list[str]:
        """By the derivative: each result on its own."""
        floats = [i for i, v in enumerate(eqn.invars) if _is_inexact(v.aval)]
        flows = [i for i in floats if ins[i] in (ZERO, LINEAR)]
        together = _linear_in(eqn, floats) if flows else None
        alone = together if flows == floats else _linear_in(eqn, flows) if flows else None
        outs = []
        for k in range(len(eqn.outvars)):
            terms = together[k] if together else None
            if terms:
                outs.append(self.summed(eqn, [ins[i] for i in terms], range(len(terms))))
            elif LINEAR not in ins:
                outs.append(ZERO if alone and alone[k] else CONSTANT)
            elif alone and alone[k] is None and self.strict:
                outs.append(_nonlinear(eqn))
            else:  # linear, or there is no telling
                outs.append(self.still_a_number(eqn, k))
        return outs

    def still_a_number(self, eqn, k) -> str:
        """Linear, unless it is a comparison or is rounded to integers."""
        if not self.strict or _is_inexact(eqn.outvars[k].aval):
            return LINEAR
        return _nonlinear(eqn)


def _nonlinear(eqn) -> str:
    return f"goes through '{eqn.primitive.name}', which isn't linear there"


def _constant_term(value, aval) -> str:
    return f"has a constant term ({f'of shape {aval.shape}' if value is None else value})"


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


def _linear_in(eqn, moving: Sequence[int]) -> list[list[int] | None] | None:
    """For each result, in which inputs it is linear; None where it isn't. None: can't be told.

    Linear (up to a constant) is what has the same derivative everywhere, and one that isn't
    zero. (A floor's is zero everywhere.)
    """

    def derivative(xs, dxs, others):
        def at(*xs):
            values = list(others)
            for i, x in zip(moving, xs, strict=True):
                values[i] = x
            with eqn.ctx.manager:
                params = eqn.primitive.get_bind_params(eqn.params)
                outs = eqn.primitive.bind(*values, **params)
            return outs if eqn.primitive.multiple_results else [outs]

        return jax.jvp(at, xs, dxs)[1]

    avals = [v.aval for v in eqn.invars]
    some = [avals[i] for i in moving]
    try:
        jaxpr = jax.make_jaxpr(derivative)(some, some, avals).jaxpr
    except Exception:
        return None
    n = len(moving)
    points, directions = jaxpr.invars[:n], jaxpr.invars[n : 2 * n]
    results: list[list[int] | None] = []
    for out in jaxpr.outvars:
        needed = _needed(jaxpr, out)
        along = [i for i, v in zip(moving, directions, strict=True) if v in needed]
        is_linear = along and not any(v in needed for v in points)
        results.append(along if is_linear else None)
    return results


def _needed(jaxpr, out) -> set:
    needed = set() if hasattr(out, "val") else {out}
    for eqn in reversed(jaxpr.eqns):
        if any(v in needed for v in eqn.outvars):
            needed.update(v for v in eqn.invars if not hasattr(v, "val"))
    return needed


def _of_constant(value) -> str:
    if isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
        return CONSTANT
    is_key = jax.dtypes.issubdtype(jax.typeof(value).dtype, jax.dtypes.extended)
    return CONSTANT if is_key or np.any(np.asarray(value)) else ZERO


def _is_inexact(aval) -> bool:
    return hasattr(aval, "dtype") and jax.dtypes.issubdtype(aval.dtype, jnp.inexact)
