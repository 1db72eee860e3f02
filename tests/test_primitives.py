"""The rules of elementwise operations and reductions against `jax.vjp`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from primitive_checks import check_cost, check_primitive, our_vjp, random_like

from fnn.backprop.primitives import RULES

NEW = hasattr(lax, "one_minus_square")  # JAX 0.12 has primitives that 0.10 lacks


def numbers(*shape, low=-2.0, high=2.0, seed=0, dtype="float64"):
    """Uniform in [low, high); complex ones have such a real and such an imaginary part."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(low, high, shape)
    if np.issubdtype(np.dtype(dtype), np.complexfloating):
        x = x + 1j * rng.uniform(low, high, shape)
    return jnp.asarray(x, dtype)


# name: the function, and the interval its arguments are drawn from
UNARY = {
    "neg": (lax.neg, -2, 2),
    "square": (lax.square, -2, 2),
    "sqrt": (lax.sqrt, 0.1, 2),
    "rsqrt": (lax.rsqrt, 0.1, 2),
    "cbrt": (lax.cbrt, 0.1, 2),
    "exp": (lax.exp, -2, 2),
    "exp2": (lax.exp2, -2, 2),
    "expm1": (lax.expm1, -2, 2),
    "log": (lax.log, 0.1, 2),
    "log1p": (lax.log1p, -0.5, 2),
    "logistic": (lax.logistic, -2, 2),
    "sin": (lax.sin, -2, 2),
    "cos": (lax.cos, -2, 2),
    "tan": (lax.tan, -1, 1),
    "asin": (lax.asin, -0.9, 0.9),
    "acos": (lax.acos, -0.9, 0.9),
    "atan": (lax.atan, -2, 2),
    "sinh": (lax.sinh, -2, 2),
    "cosh": (lax.cosh, -2, 2),
    "tanh": (lax.tanh, -2, 2),
    "asinh": (lax.asinh, -2, 2),
    "acosh": (lax.acosh, 1.1, 3),
    "atanh": (lax.atanh, -0.9, 0.9),
    "abs": (lax.abs, -2, 2),
    "sign": (lax.sign, -2, 2),
    "floor": (lax.floor, -2, 2),
    "ceil": (lax.ceil, -2, 2),
    "round": (lax.round, -2, 2),
    "erf": (lax.erf, -2, 2),
    "erfc": (lax.erfc, -2, 2),
    "erf_inv": (lax.erf_inv, -0.9, 0.9),
    "lgamma": (lax.lgamma, 0.1, 4),
    "digamma": (lax.digamma, 0.1, 4),
    "bessel_i0e": (lax.bessel_i0e, -4, 4),
    "bessel_i1e": (lax.bessel_i1e, -4, 4),
    "copy": (lambda x: jnp.array(x, copy=True), -2, 2),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 11, 52), -2, 2),
}
if NEW:
    UNARY["log2"] = (lax.log2, 0.1, 2)
    UNARY["one_minus_square"] = (lax.one_minus_square, -2, 2)

REAL_ONLY = {"cbrt", "floor", "ceil", "round", "erf", "erfc", "erf_inv", "lgamma", "digamma"}
REAL_ONLY |= {"bessel_i0e", "bessel_i1e", "reduce_precision"}

BINARY = {
    "add": (lax.add, -2, 2),
    "sub": (lax.sub, -2, 2),
    "mul": (lax.mul, -2, 2),
    "div": (lax.div, 0.5, 2),
    "rem": (lax.rem, 0.5, 4),
    "pow": (lax.pow, 0.5, 2),
    "atan2": (lax.atan2, 0.5, 2),
    "max": (lax.max, -2, 2),
    "min": (lax.min, -2, 2),
    "igamma": (lax.igamma, 0.5, 3),
    "igammac": (lax.igammac, 0.5, 3),
}
COMPLEX_BINARY = ("add", "sub", "mul", "div", "pow")
NOT_TWICE = {"igamma", "igammac"}  # JAX has no derivative of igamma's by a
LOOSE = {"erf", "erfc", "bessel_i0e", "bessel_i1e", "lgamma", "digamma"}


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    f, low, high = UNARY[name]
    x = numbers(3, 4, low=low, high=high)
    check_primitive(f, x, primitive=name, second_order=True)
    check_cost(f, x)


@pytest.mark.parametrize("name", [n for n in UNARY if n not in REAL_ONLY])
def test_unary_complex(name):
    f, low, high = UNARY[name]
    z = numbers(3, 4, low=low, high=high, dtype="complex128")
    if name == "sign" and not NEW:
        pytest.skip("JAX 0.10 takes the derivative of a complex sign for zero")
    check_primitive(f, z, primitive=name, second_order=True)


@pytest.mark.parametrize("name", BINARY)
def test_binary(name):
    f, low, high = BINARY[name]
    a, b = (numbers(3, 4, low=low, high=high, seed=s) for s in (1, 2))
    check_primitive(f, a, b, primitive=name, second_order=name not in NOT_TWICE)
    check_cost(f, a, b)


@pytest.mark.parametrize("name", COMPLEX_BINARY)
def test_binary_complex(name):
    f, low, high = BINARY[name]
    a, b = (numbers(3, 4, low=low, high=high, seed=s, dtype="complex128") for s in (1, 2))
    check_primitive(f, a, b, primitive=name, second_order=True)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("shapes", [((), (3, 4)), ((3, 4), ()), ((3, 1), (3, 4)), ((), ())])
def test_binary_sums_over_what_was_broadcast(name, shapes):
    f, low, high = BINARY[name]
    a, b = (numbers(*s, low=low, high=high, seed=len(s)) for s in shapes)
    check_primitive(f, a, b, primitive=name)
    check_primitive(lambda a: f(a, np.array(1.5)), a, primitive=name)
    check_primitive(lambda b: f(np.array(1.5), b), b, primitive=name)
