"""What `jax.experimental`'s `jet` and `checkify` must know of a primitive."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify, jet

from fnn.jaxpr import is_inexact, program


def register_experimental(primitive: Any, definition: Callable) -> None:
    """Tell `jet` and `checkify` about a primitive that does `definition(*arrays, **params)`."""

    several = primitive.multiple_results

    def series(primals, terms, **params):
        def results(*xs):
            found = primitive.bind(*xs, **params)
            return found if several else [found]

        outs, coefficients = _taylor(results, primals, terms)
        return (outs, coefficients) if several else (outs[0], coefficients[0])

    def checked(*args, **params):
        # (A context in newer JAX,) the errors so far, those to look for, and the arrays.
        start = next(i for i, a in enumerate(args) if isinstance(a, checkify.Error)) + 2
        inside = jax.jit(functools.partial(definition, **params))
        flat = program(jax.make_jaxpr(inside)(*args[start:]), inline=False)
        (call,) = flat.equations
        values = flat.values(args[start:])
        check = checks[call.primitive]
        error, outs = check(*args[:start], *[values[i] for i in call.ins], **call.params)
        for i, out in zip(call.outs, outs, strict=True):
            values[i] = out
        found = [values[i] for i in flat.outputs]
        return error, found if several else found[0]

    rules: dict = jet.jet_rules
    rules[primitive] = series
    # JAX offers no way to register with checkify: this is the table that its public function uses.
    checks = getattr(inspect.unwrap(checkify.checkify), "__globals__", {}).get("error_checks")
    if checks is not None:
        checks[primitive] = checked


def _taylor(f, primals, terms):
    """The Taylor coefficients of f along a curve x₀ + x₁ t + x₂ t² + …, from those of the curve.

    They are derivatives with respect to t, over factorials, and the derivatives are forward mode's,
    nested: so they follow from the hand-written rule.
    """
    moving = [i for i, x in enumerate(primals) if is_inexact(jax.typeof(jnp.asarray(x)))]

    def along(t):
        xs = list(primals)
        for i in moving:
            for k, term in enumerate(terms[i]):
                xs[i] = xs[i] + term * (t ** (k + 1)).astype(jnp.asarray(term).dtype)
        return list(f(*xs))

    g, coefficients = along, []
    for k in range(max(map(len, terms)) + 1):
        values = g(jnp.zeros(()))
        scale = 1 / math.factorial(k)
        coefficients.append([y * scale if is_inexact(jax.typeof(y)) else y for y in values])
        g = functools.partial(_rates, g)
    outs, *more = coefficients
    return outs, [list(of_output) for of_output in zip(*more, strict=True)]


def _rates(g, t):
    """The derivatives of g's values with respect to t; zeros for those that aren't real numbers."""
    values, rates = jax.jvp(g, (t,), (jnp.ones_like(t),))
    return [
        dy if is_inexact(jax.typeof(y)) else jnp.zeros_like(y)
        for y, dy in zip(values, rates, strict=True)
    ]
