"""In float32, at numbers from 1e-38 to 1e38, our derivatives are as accurate as JAX's, or more.

Both are measured against the same derivatives in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from sweeps import exhaustive, sweep

import fnn

SIZES = [10.0**n for n in range(-36, 38, 4)] + [0.5, 0.9999, 1, 1.0001, 2, 5, 17, 50, 88, 100]
ALL = np.unique([*SIZES, *(-s for s in SIZES), 0.0]).astype(np.float32)
POSITIVE = ALL[ALL > 0]
UNIT = ALL[abs(ALL) < 1]
SMALL = ALL[abs(ALL) < 1e4]
A, B = (x.ravel() for x in np.meshgrid(ALL[::2][ALL[::2] != 0], ALL[1::2][ALL[1::2] != 0]))

OF_ONE = {
    **dict.fromkeys(("logistic", "expm1", "tanh", "cbrt", "exp", "exp2", "atan"), ALL),
    **dict.fromkeys(("sinh", "cosh", "asinh", "erf", "erfc", "square", "abs"), ALL),
    **dict.fromkeys(("bessel_i0e", "bessel_i1e"), ALL),
    **dict.fromkeys(("sqrt", "rsqrt", "log", "lgamma", "digamma"), POSITIVE),
    **dict.fromkeys(("asin", "acos", "atanh", "erf_inv"), UNIT),
    **dict.fromkeys(("sin", "cos", "tan"), SMALL),
    "log1p": ALL[ALL > -1],
    "acosh": POSITIVE[POSITIVE > 1],
}
OF_TWO = {
    "div": lax.div,
    "mul": lax.mul,
    "atan2": lax.atan2,
    "rem": lax.rem,
    "max": lax.max,
    "pow": lambda a, b: lax.pow(lax.abs(a), b),
    "hypot": jnp.hypot,
    "logaddexp": jnp.logaddexp,
    "abs in the plane": lambda a, b: lax.abs(lax.complex(a, b)),
    "log in the plane": lambda a, b: lax.real(lax.log(lax.complex(a, b))),
}
ROWS = {
    "tiny": 1e-20 * np.arange(1, 7),
    "huge": 1e12 * np.array([1, -2, 3, 4, -5, 6]),
    "mixed": [1e30, 1e-30, 1, -1, 1e5, 0],
    "two zeros": [0, 1, 2, 3, 0, 4],
    "one zero": [0, 1, 2, 3, 5, 4],
    "negative": [-1e30, -50, -60, -1e30, -100, -200],
    "infinite": [-np.inf, 0, 1, -np.inf, 2, 3],
    "ties": [1e4] * 6,
}
WEIGHTS = np.arange(1.0, 7)
OF_ROWS = {
    "logsumexp": jax.nn.logsumexp,
    "softmax": lambda x: jax.nn.softmax(x) * WEIGHTS.astype(x.dtype),
    "log_softmax": lambda x: jax.nn.log_softmax(x) * WEIGHTS.astype(x.dtype),
    "prod": jnp.prod,
    "cumprod": lambda x: jnp.cumprod(x) * WEIGHTS.astype(x.dtype),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x) * WEIGHTS.astype(x.dtype),
    "norm": jnp.linalg.norm,
    "max": jnp.max,
    "std": jnp.std,
}


def errors(found, true):
    """The relative error of each entry; infinite where only one of the two is a number."""
    found, true = np.asarray(found, np.float64), np.asarray(true, np.float64)
    with np.errstate(all="ignore"):
        in_float32 = true.astype(np.float32)
        error = np.abs(found - true) / np.maximum(np.abs(true), 1e-36)
    same = (found == in_float32) | (np.isnan(found) & np.isnan(true))
    return np.where(same, 0, np.where(np.isfinite(error), error, np.inf))


def assert_as_accurate(function, *xs):
    def derivatives(grad, dtype):
        args = [jnp.asarray(x, dtype) for x in xs]
        total = lambda *args: jnp.sum(function(*args))
        return jax.jit(grad(total, tuple(range(len(args)))))(*args)

    true = derivatives(jax.grad, "float64")
    ours, theirs = derivatives(fnn.grad, "float32"), derivatives(jax.grad, "float32")
    for i, (a, b, t) in enumerate(zip(ours, theirs, true, strict=True)):
        worse = np.flatnonzero(errors(a, t) > 4 * errors(b, t) + 1e-6)
        flat = [np.ravel(x) for x in (*xs, a, b, t)]
        at = [tuple(float(x[k]) for x in flat) for k in worse]
        assert not at, f"by argument {i} at (inputs, ours, JAX's, true) {at[:3]}"


QUICK = ["logistic", "expm1", "tanh", "erfc", "log1p", "rsqrt", "lgamma", "atanh", "acosh", "tan"]


@pytest.mark.parametrize("name", sweep(OF_ONE, QUICK))
def test_functions_of_a_number(name):
    at = OF_ONE[name]
    if name == "expm1":  # JAX 0.10's eˣ − 1 + 1 is 0 below 2⁻²⁴; so it is in float64 at −50
        at = at[at > -30]
    assert_as_accurate(getattr(lax, name), at)


@pytest.mark.parametrize("name", sweep(OF_TWO, ["div", "atan2", "pow", "logaddexp"]))
def test_functions_of_two_numbers(name):
    assert_as_accurate(OF_TWO[name], A, B)


@pytest.mark.parametrize("name", sweep(OF_ROWS, ["logsumexp", "cumprod", "norm", "std"]))
def test_reductions(name):
    rows = np.array(list(ROWS.values()), np.float32)
    assert_as_accurate(lambda x: jax.vmap(OF_ROWS[name])(x), rows)


def test_quotients_by_numbers_whose_square_is_none():
    """In float16 the square of 256 is infinite and that of 1e-4 zero."""
    a, b = (np.float16(x) for x in ([300, 2e3, 6e4, -1e-4], [300, 1e3, 6e4, 1e-4]))
    found = jax.vmap(fnn.grad(lax.div, 1))(a, b)
    np.testing.assert_allclose(found, -a / np.float64(b) ** 2, rtol=5e-3)
    x = jnp.array([200, 300, 400], jnp.float16)
    found = fnn.grad(lambda x: (x / jnp.sum(x))[0])(x)
    np.testing.assert_allclose(found, (np.array([1, 0, 0]) - 2 / 9) / 900, rtol=5e-3)


def test_remainders_of_almost_multiples():
    """In float32 a / b may be a whole number though a is less than that times b."""
    rng = np.random.default_rng(0)
    b = rng.uniform(0.1, 10, 1000).astype(np.float32)
    a = np.float32(rng.integers(1, 1000, 1000) * np.float64(b)) * np.sign(rng.normal(size=1000))
    a = a.astype(np.float32)
    true = -np.trunc(np.float64(a) / np.float64(b))
    np.testing.assert_array_equal(jax.vmap(fnn.grad(lax.rem, 1))(a, b), true)


@exhaustive
def test_incomplete_functions_at_the_ends():
    """Where the integrand holds 0⁰, which is 1: of 1 − e⁻ˣ, x and (1 − x)², say."""
    P, B = lax.igamma, lax.betainc
    slope = lambda f, k=1: jax.vmap(fnn.grad(f) if k == 1 else fnn.grad(fnn.grad(f)))
    x = jnp.array([0.0, 0.5, 1.0])
    for f, first, second in [
        (lambda x: P(1.0, x), np.exp(-x), -np.exp(-x)),
        (lambda x: -lax.igammac(1.0, x), np.exp(-x), -np.exp(-x)),
        (lambda x: B(1.0, 1.0, x), [1, 1, 1], [0, 0, 0]),
        (lambda x: B(1.0, 2.0, x), 2 - 2 * x, [-2, -2, -2]),
        (lambda x: B(2.0, 1.0, x), 2 * x, [2, 2, 2]),
    ]:
        np.testing.assert_allclose(slope(f)(x), first, atol=1e-12)
        at = x[1:2]
        np.testing.assert_allclose(slope(f, 2)(at), np.asarray(second)[1:2], atol=1e-9)
