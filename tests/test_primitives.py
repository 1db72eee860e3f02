"""The rules of elementwise operations and reductions against `jax.vjp`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from primitive_checks import check_cost, check_primitive, compare, our_vjp, random_like
from sweeps import exhaustive, sweep

import fnn

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


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    f, low, high = UNARY[name]
    x = numbers(3, 4, low=low, high=high)
    check_primitive(f, x, primitive=name, second_order=True)
    check_cost(f, x)


@pytest.mark.parametrize(
    "name",
    sweep([n for n in UNARY if n not in REAL_ONLY], ["abs", "exp", "log", "sqrt", "tanh", "acos"]),
)
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


@pytest.mark.parametrize("name", [n for n in BINARY if n not in NOT_TWICE])
def test_binary_sums_over_what_was_broadcast(name):
    f, low, high = BINARY[name]
    number, row, matrix = (numbers(*s, low=low, high=high) for s in ((), (3, 1), (3, 4)))

    def in_all_ways(number, row, matrix):
        return (
            [f(number, matrix), f(matrix, number), f(row, matrix), f(matrix, row)],
            [f(number, number), f(matrix, 1.5), f(1.5, matrix), f(matrix, np.float64(1.5))],
        )

    check_primitive(in_all_ways, number, row, matrix, primitive=name)


def _all_of(dtype):
    """A function of one array that calls every operation that this dtype allows."""
    is_complex = dtype == "complex64"
    chosen = {
        name: (f, low, high, n)
        for n, table in ((1, UNARY), (2, BINARY))
        for name, (f, low, high) in table.items()
        if name not in NOT_TWICE
        and not (is_complex and (name in REAL_ONLY or (n == 2 and name not in COMPLEX_BINARY)))
        and not (name == "sign" and is_complex and not NEW)
        and name != "reduce_precision"
    }
    args = [
        numbers(5, low=low, high=high, dtype=dtype, seed=i)
        for _, low, high, n in chosen.values()
        for i in range(n)
    ]

    def f(*args):
        given = iter(args)
        return [f(*[next(given) for _ in range(n)]) for f, _, _, n in chosen.values()]

    return f, args


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_gradients_have_their_arguments_dtype(dtype):
    """`our_vjp` insists on it, at each operation; tracing is enough."""
    f, args = _all_of(dtype)
    gs = random_like(jax.eval_shape(f, *args), 0)
    jax.eval_shape(lambda args, gs: our_vjp(f, args, gs), args, gs)


def test_gradients_in_single_precision():
    f, args = _all_of("float32")
    check_primitive(f, *args, tol=1e-5)


# ------------------------------------------------------------- corners, choices, special points


@pytest.mark.parametrize("f", [lax.max, lax.min])
def test_a_tie_is_shared(f):
    a = jnp.array([1.0, 2.0, 3.0, 0.0, -0.0, jnp.inf])
    b = jnp.array([1.0, 3.0, 2.0, 0.0, 0.0, jnp.inf])
    check_primitive(f, a, b)
    check_primitive(lambda a: f(a, 0.0), a)
    (at_tie, _) = our_vjp(f, [a, b], [jnp.ones(6)])
    assert at_tie[0] == 0.5


@exhaustive
def test_extrema_of_complex_numbers():
    """JAX compares the real parts first, then the imaginary ones."""
    a, b = jnp.array([1 + 2j, 3, 1 + 1j, 2j, 5]), jnp.array([1 + 1j, 5j, 1 + 1j, 2j - 1, 4 + 9j])
    for f in (lax.max, lax.min):
        check_primitive(f, a, b)
    for f in (lax.cummax, lax.cummin):
        check_primitive(f, a)


def test_extrema_of_not_a_number():
    a, b = jnp.array([jnp.nan, 1.0, jnp.nan]), jnp.array([1.0, jnp.nan, jnp.nan])
    check_primitive(lax.max, a, b)
    check_primitive(lax.min, a, b)


def test_abs_and_sign_at_zero():
    check_primitive(lax.abs, jnp.array([0.0, -0.0, 1.0, -1.0]))
    check_primitive(lax.abs, jnp.array([0.0, 3 + 4j, -1j]))
    check_primitive(lax.sign, jnp.array([0.0, -0.0, 1.0, -1.0]))


@exhaustive
def test_functions_of_the_plane_that_are_not_holomorphic():
    """Against central differences: JAX 0.10 gives zero for sign, and acosh the wrong sign."""
    z, h = jnp.array([1.3 - 0.7j, -2.0 + 0.1j, 0.4 + 2.0j, -1.5 - 1.0j]), 1e-6
    for f in (lax.sign, lax.abs, lax.acosh, lax.asinh, lax.atanh):
        y = f(z)
        g = jnp.ones_like(y) if y.dtype == jnp.float64 else jnp.full_like(y, 0.6 - 0.8j)
        loss = lambda z, f=f, g=g: jnp.real(g * f(z))
        du = (loss(z + h) - loss(z - h)) / (2 * h)
        dv = (loss(z + 1j * h) - loss(z - 1j * h)) / (2 * h)
        np.testing.assert_allclose(our_vjp(f, [z], [g])[0], du - 1j * dv, atol=1e-8)


def test_clamp():
    x = jnp.array([[-2.0, -1.0, 0.0], [1.0, 2.0, 0.5]])
    low, high = jnp.full_like(x, -1.0), jnp.full_like(x, 1.0)
    for args in [
        (low, x, high),
        (high, x, low),
        (low[0, 0], x[0, 0], high[0, 0]),
    ]:
        check_primitive(lax.clamp, *args, primitive="clamp")
    check_primitive(lambda x: lax.clamp(-1.0, x, 1.0), x, primitive="clamp")
    # JAX fails on bounds that are numbers and wanted: compare with full arrays' gradients, summed.
    ours = our_vjp(lax.clamp, [low[0, 0], x, high[0, 0]], [x])
    full = our_vjp(lax.clamp, [low, x, high], [x])
    compare(ours, [full[0].sum(), full[1], full[2].sum()], 1e-12)
    check_cost(lax.clamp, low, x, high)


def test_select_n():
    cases = [numbers(3, 4, seed=s) for s in range(3)]
    check_primitive(lax.select_n, cases[0] > 0, *cases[:2], primitive="select_n")
    check_primitive(lax.select_n, jnp.array(True), *cases[:2], primitive="select_n")
    which = jnp.arange(12).reshape(3, 4) % 3
    check_primitive(lax.select_n, which, *cases, primitive="select_n", second_order=True)
    check_primitive(lambda x: lax.select_n(x > 0, x, jnp.ones_like(x)), cases[0])
    check_cost(lax.select_n, cases[0] > 0, *cases[:2])


@pytest.mark.parametrize("n", [-3, -1, 0, 1, 2, 3, 4, 7])
def test_integer_pow(n):
    f = lambda x: lax.integer_pow(x, n)
    check_primitive(f, numbers(5, low=0.5), second_order=n != 0)
    check_primitive(f, numbers(5, low=0.5, dtype="complex128"))
    check_cost(f, numbers(50))


def test_pow_at_zero():
    a, exponents = jnp.array([0.0, 0.0, 0.0, 2.0]), jnp.array([0, 1, 2, 0])
    check_primitive(lax.pow, a, exponents, primitive="pow", second_order=True)
    check_primitive(lax.pow, a, exponents.astype(float), primitive="pow")
    check_primitive(lambda a: lax.pow(a, 3), numbers(4), primitive="pow")
    check_primitive(lax.pow, numbers(3, dtype="complex128"), jnp.array([0, 2, -1]))


def test_complex_parts():
    u, v, z = numbers(4, seed=1), numbers(4, seed=2), numbers(4, dtype="complex128")
    check_primitive(lax.complex, u, v, primitive="complex", second_order=True)
    check_primitive(lax.complex, u[0], v, primitive="complex")
    check_primitive(lax.real, z, primitive="real")
    check_primitive(lax.imag, z, primitive="imag")
    check_primitive(lax.conj, z, primitive="conj")
    check_primitive(lax.conj, u, primitive="conj")
    check_primitive(lambda z: lax.mul(z, lax.conj(z)), z, second_order=True)


@pytest.mark.parametrize("new", ["float32", "bfloat16", "float64", "complex64", "complex128"])
def test_convert_element_type(new):
    check_primitive(lambda x: lax.convert_element_type(x, new), numbers(4, dtype="float16"))
    if new.startswith("complex"):
        check_primitive(lambda x: lax.convert_element_type(x, new), numbers(4, dtype="complex128"))
    as_given = lambda x: lax.convert_element_type(x, jnp.int32).astype(new) * x.astype(new)
    check_primitive(as_given, numbers(4, dtype="float32"), tol=1e-2)


def test_a_real_part_taken_by_conversion():
    z = numbers(4, dtype="complex128")
    f = lambda z: lax.convert_element_type_p.bind(
        z, new_dtype=np.dtype("float32"), weak_type=False, sharding=None
    )
    check_primitive(f, z, primitive="convert_element_type", tol=1e-6)


def test_product_in_another_dtype():
    a, b = numbers(3, dtype="bfloat16"), numbers(3, dtype="bfloat16", seed=1)
    f = lambda a, b: lax.mul(a, b, out_dtype=jnp.float32)
    ours = our_vjp(f, [a, b], [jnp.ones(3, "float32")])
    assert [g.dtype for g in ours] == [jnp.bfloat16] * 2
    compare(ours, [b, a], 1e-2)


def test_the_same_number_again():
    x = numbers(4)
    check_primitive(lambda x: checkpoint_name(x, "here"), x, primitive="name")
    check_primitive(lambda x: lax.stop_gradient(x) * x, x)
    check_primitive(lambda x: lax.reduce_precision(x, 8, 10), x, primitive="reduce_precision")
    check_primitive(lambda a, b: lax.nextafter(a, b) * b, x, x[::-1]) if NEW else None
    assert our_vjp(lax.nextafter, [x, x[::-1]], [x])[0] is x


def test_steps_pass_nothing():
    def f(x):
        i = lax.convert_element_type(x, jnp.int32)
        bits = lax.bitcast_convert_type(x, jnp.int64)
        c = (x > 0) | (x <= 1) ^ ~(x != 2) & lax.is_finite(x) | (x < 3) & (x >= 4) | (x == 5)
        i = lax.population_count(i) + lax.clz(i) + lax.shift_left(i, i)
        i = i + lax.shift_right_logical(i, i) + lax.shift_right_arithmetic(i, i)
        return lax.floor(x) + lax.ceil(x) + lax.round(x) + c + i + bits

    x = numbers(5)
    assert our_vjp(f, [x], [x])[0] is None


def test_polynomial():
    if not NEW:
        pytest.skip("the primitive is new in JAX 0.12")
    x, coefficients = numbers(4, 3), [numbers(4, 3, seed=s) for s in range(4)]
    f = lambda x, *cs: lax.polynomial(x, cs)
    check_primitive(f, x, *coefficients, primitive="polynomial", second_order=True)
    check_primitive(f, x, *[c[0, 0] for c in coefficients], primitive="polynomial")
    check_primitive(f, x, coefficients[0])
    check_primitive(lambda x: lax.polynomial(x, [1.0, x * x, 3.0]), x)
    check_cost(f, x, *coefficients)


def test_special_functions_of_several_arguments():
    a, b, x = (numbers(3, low=low, high=high) for low, high in ((0.5, 3), (1, 2), (0.1, 0.9)))
    igamma = lambda a, x: (lax.igamma(a, x), lax.igammac(a, x))
    check_primitive(igamma, a[0], x)
    check_primitive(lambda x: lax.polygamma(jnp.ones(3), x), x, second_order=True)
    check_primitive(lambda x: lax.betainc(a, b, x), x, second_order=True)
    for f, args, name in [
        (lax.polygamma, (a, x), "polygamma"),
        (lax.zeta, (a + 1, x), "zeta"),
        (lax.betainc, (a, b, x), "betainc"),
    ]:
        with pytest.raises(ValueError, match=f"{name}.*no gradient"):
            our_vjp(f, list(args), [x])


def test_zeta_against_differences():
    s, q, h = numbers(4, low=1.5, high=4), numbers(4, low=0.5, high=3, seed=1), 1e-6
    expected = (lax.zeta(s, q + h) - lax.zeta(s, q - h)) / (2 * h)
    ours = our_vjp(lambda q: lax.zeta(s, q), [q], [jnp.ones(4)])[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-7)


@exhaustive
@pytest.mark.parametrize("sample", [jax.random.gamma, jax.random.loggamma])
def test_random_gamma(sample):
    key = jax.random.key(0)
    check_primitive(lambda a: sample(key, a), numbers(3, 2, low=0.5, high=4), tol=1e-8)


@exhaustive
def test_logarithms_of_gamma_samples_too_small_for_numbers():
    """There F(y; a) = yᵃ / Γ(a + 1), of which log y = (log F + log Γ(a + 1)) / a."""
    sample = lambda a: jax.vmap(lambda key: jax.random.loggamma(key, a, dtype="float32"))(keys)
    keys, a = jax.random.split(jax.random.key(0), 8), jnp.float32(0.003)
    y = np.asarray(sample(a), np.float64)
    assert min(y) < -200 and max(y) > -87
    log_gamma_slope = -0.5772156649 + 0.003 * np.pi**2 / 6
    _, pullback = fnn.vjp(sample, a)
    found = jax.vmap(lambda g: pullback(g)[0])(jnp.eye(8, dtype="float32"))
    np.testing.assert_allclose(found, (log_gamma_slope - y) / 0.003, rtol=1e-5)


@pytest.mark.parametrize("name", ["tanh", "logistic", "erf", "erfc", "atan", "bessel_i0e"])
def test_far_out_the_slope_is_flat_not_broken(name):
    x = jnp.array([-1e300, -800.0, 800.0, 1e300])
    g = our_vjp(UNARY[name][0], [x], [jnp.ones(4)])[0]
    np.testing.assert_allclose(g, np.zeros(4), atol=1e-4)


# ------------------------------------------------------------------------------- reductions


REDUCTIONS = {
    "reduce_sum": jnp.sum,
    "reduce_max": jnp.max,
    "reduce_min": jnp.min,
    "reduce_prod": jnp.prod,
}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("axis", sweep([None, 0, 1, (0, 2), (2, 1)], quick=[1, (2, 1)]))
def test_reductions(name, axis):
    f = lambda x: REDUCTIONS[name](x, axis=axis)
    x = numbers(3, 4, 5)
    check_primitive(f, x, primitive=name, second_order=axis == 1)
    check_cost(f, x)


@pytest.mark.parametrize("name", ["reduce_max", "reduce_min"])
def test_reductions_with_ties(name):
    x = jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [jnp.nan, 1.0, 0.0]])
    for axis in (0, 1, None):
        check_primitive(lambda x, axis=axis: REDUCTIONS[name](x, axis=axis), x, primitive=name)


@exhaustive
def test_more_ties_than_float16_can_count():
    shares = fnn.grad(jnp.max)(jnp.zeros(70_000, jnp.float16))
    np.testing.assert_allclose(shares, 1 / 70_000, rtol=2e-2)


@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_product_with_zeros(zeros):
    x = numbers(3, 7).at[:, :zeros].set(0.0)
    check_primitive(lambda x: jnp.prod(x, axis=1), x, primitive="reduce_prod", second_order=True)
    check_primitive(lambda x: jnp.prod(x, axis=1), x + 1j * x[::-1])
    check_primitive(lambda x: jnp.prod(x, axis=0), x[:1], primitive="reduce_prod")


def test_reductions_of_nothing():
    for f in (jnp.sum, jnp.prod):
        check_primitive(lambda x, f=f: f(x, axis=1), jnp.zeros((3, 0)))
        check_primitive(lambda x, f=f: f(x, axis=0), jnp.zeros((3, 0)))
    check_primitive(lambda x: jnp.max(x, axis=0), jnp.zeros((3, 0)))


def test_reductions_to_whole_numbers_pass_nothing():
    f = lambda x: (
        jnp.argmax(x) + jnp.argmin(x) + jnp.any(x > 0) + jnp.all(x > 0) + jnp.argsort(x)[0]
    )
    x = numbers(5)
    assert our_vjp(lambda x: x * f(x), [x], [jnp.ones(5)])[0] is not None
    check_primitive(lambda x: x * f(x), x)


CUMULATIVE = {
    "cumsum": lax.cumsum,
    "cumprod": lax.cumprod,
    "cummax": lax.cummax,
    "cummin": lax.cummin,
    "cumlogsumexp": lax.cumlogsumexp,
}


@exhaustive
@pytest.mark.parametrize("name", sweep(CUMULATIVE, ["cumsum", "cumlogsumexp"]))
@pytest.mark.parametrize("reverse", sweep([False, True], quick=[True]))
def test_running_totals(name, reverse):
    f = lambda x, axis=0: CUMULATIVE[name](x, axis=axis, reverse=reverse)
    sizes = [numbers(n, seed=n) for n in (0, 1, 2, 3, 8)]
    check_primitive(lambda *xs: [f(x) for x in xs], *sizes, primitive=name)
    check_primitive(f, numbers(5), primitive=name, second_order=True)
    check_primitive(lambda x: f(x, axis=1), numbers(2, 6, 2), primitive=name)
    # XLA fuses the running sum of exponentials a little differently from JAX's program.
    check_cost(f, numbers(24), slack=1.05 if name == "cumlogsumexp" else 1.02)


@pytest.mark.exhaustive
def test_running_totals_at_special_points():
    ties = jnp.array([1.0, 1.0, 2.0, 2.0, 2.0, 0.0, 2.0, 3.0, 3.0])
    check_primitive(lambda x: [lax.cummax(x), lax.cummin(x, reverse=True)], ties)
    zeros = jnp.array([1.0, 2.0, 0.0, 3.0, 0.0, 4.0])
    check_primitive(lax.cumprod, zeros, second_order=True)
    z = numbers(5, dtype="complex128")
    check_primitive(lambda z: [lax.cumprod(z), lax.cumsum(z), lax.cumlogsumexp(z)], z)
    # JAX says nan for a leading -inf; its share of the sum is finite all the same.
    masked = jnp.array([-jnp.inf, -jnp.inf, 1.0, 2.0, -jnp.inf, 1e3])
    g = our_vjp(lax.cumlogsumexp, [masked], [jnp.array([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])])[0]
    p = np.exp(1.0 - np.logaddexp(1.0, 2.0))
    np.testing.assert_allclose(g, [0, 0, 1 + 2 * p, 2 - 2 * p, 0, 1], atol=1e-12)


def test_ties_of_a_running_maximum_are_split_as_by_jax():
    equal = [jnp.zeros(n) for n in (4, 7, 8, 13)]
    check_primitive(lambda *xs: [lax.cummax(x) for x in xs], *equal, primitive="cummax")


# ---------------------------------------------------------------------------------- sorting


@pytest.mark.parametrize("axis", [0, 1])
def test_sort(axis):
    x, a, b = (numbers(4, 5, seed=s) for s in range(3))
    keys = lax.round(2 * x)  # with ties
    f = lambda x: lax.sort(x, dimension=axis)
    check_primitive(f, x, primitive="sort", second_order=True)
    check_primitive(f, keys, primitive="sort")
    check_primitive(lambda *xs: lax.sort(xs, dimension=axis, num_keys=2), keys, a, b)
    check_primitive(lambda *xs: lax.sort(xs, dimension=axis), keys.astype(int), a, b)
    check_primitive(lambda x, a: lax.sort((x, a), dimension=axis)[1], x, a)
    check_primitive(lambda x: lax.sort((x, a), dimension=axis, is_stable=False), x)
    check_cost(f, x)


def test_sort_of_complex_numbers_and_of_none():
    check_primitive(lax.sort, numbers(5, dtype="complex128"))
    check_primitive(lax.sort, jnp.zeros((0,)))
    check_primitive(lambda x: lax.sort(x, dimension=0), jnp.zeros((3, 0)))


def test_largest_k():
    x = numbers(3, 6)
    for axis in (0, 1):
        f = lambda x, axis=axis: lax.top_k(x, 2, axis=axis)[0]
        check_primitive(f, x, primitive="top_k", second_order=True)
        check_primitive(f, jnp.ones((3, 6)), primitive="top_k")
        check_primitive(lambda x, axis=axis: lax.approx_max_k(x, 2, axis), x)
        check_primitive(lambda x, axis=axis: lax.approx_min_k(x, 2, axis), x)
    check_primitive(lambda x: lax.approx_max_k(x, 2, -1)[0], x, primitive="approx_top_k")
    check_cost(lambda x: lax.top_k(x, 2)[0], x)


def test_the_gradient_of_expm1_does_not_cancel():
    gradient = fnn.grad(lax.expm1)(jnp.float32(-30.0))
    np.testing.assert_allclose(gradient, np.exp(-30.0), rtol=1e-5)
