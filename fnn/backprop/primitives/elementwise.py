"""Functions of numbers, applied entry by entry: the derivative table of calculus.

Each line is what a formula collection says: the function, and its derivative (in words: the
local gradient) times the upstream gradient g. Where the output y makes the derivative
cheaper, it is used: it is there already, and the input need not be kept.

    y = tanh(x)      g · (1 + y)(1 − y)              y = a·b       g · b,  g · a
    y = exp(x)       g · y                           y = a / b     g / b,  −g · a / b²

Kinks follow JAX: `max(a, b)` splits the gradient evenly at a tie, `|x|` has slope 1 at 0,
`clamp` passes nothing to x at its bounds, `floor`, `sign` and comparisons pass nothing at all.
Complex numbers follow JAX too: the gradient isn't conjugated, so that a holomorphic function's
rule reads as the real one's. Where two arguments were broadcast against each other, the
gradient is summed over what was repeated.

Sources: Abramowitz & Stegun, "Handbook of Mathematical Functions", chapters 4 to 9; CS231n,
lecture 4 (the gates add, mul, max).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import (
    add,
    cos,
    cosh,
    div,
    eq,
    exp,
    gt,
    integer_pow,
    log,
    lt,
    mul,
    neg,
    rsqrt,
    select,
    sign,
    sin,
    sinh,
    square,
    sub,
)

from fnn.backprop.rules import LocalRule, each, joint, zero
from fnn.meshes import sharding_of

# Some formulas are each JAX's own: the compiler fits them best, and they cost alike.
_SINCE_0_12 = hasattr(lax, "one_minus_square")

# ------------------------------------------------------------------ how the tables are read


def unary(f: Callable, local_gradient: str) -> LocalRule:
    """A function of one array: `f(g, y, x)`."""
    return each(lambda g, y, x, **_: f(g, y, x), local_gradient=(local_gradient,), elementwise=True)


def binary(fa: Callable, fb: Callable, local_gradient: tuple[str, str]) -> LocalRule:
    """A function of two arrays: `fa(g, y, a, b)` and `fb(g, y, a, b)`."""
    return each(
        lambda g, y, a, b, **_: summed_to(a, fa(g, y, a, b)),
        lambda g, y, a, b, **_: summed_to(b, fb(g, y, a, b)),
        local_gradient=local_gradient,
        elementwise=True,
    )


def summed_to(x, g):
    """The gradient of an x that was broadcast to g's shape: each entry's uses, summed."""
    if x.shape == ():
        g = lax.reduce_sum(g, range(g.ndim)) if g.ndim else g
    elif x.shape != g.shape:
        axes = [i for i, (n, m) in enumerate(zip(x.shape, g.shape, strict=True)) if n != m]
        g = lax.expand_dims(lax.reduce_sum(g, axes), axes)
    # On a mesh with explicit axes, an x that isn't sharded may meet a partner that is.
    sharding = sharding_of(x)
    if sharding is None or sharding.spec == jax.typeof(g).sharding.spec:
        return g
    return jax.sharding.reshard(g, sharding)


def in_dtype_of(x, g):
    """The gradient of an x that was converted to g's dtype: converted back, real for a real x."""
    if g.dtype == x.dtype:
        return g
    if is_complex(g) and not is_complex(x):
        g = lax.real(g)
    return lax.convert_element_type(g, x.dtype)


def number(value: complex, like) -> Any:
    """A constant in the dtype of `like`, as weak a type as that."""
    if jax.typeof(like).weak_type:
        return lax.full_like(like, value, shape=())
    return np.array(value, like.dtype)


def _squares_fit(f: Callable) -> Callable:
    """f(g, y, ...), in float32 for float16, where 256² is infinite and (1e-4)² zero."""

    def gradient(g, y, *xs):
        if y.dtype != jnp.float16:
            return f(g, y, *xs)
        wide = [lax.convert_element_type(a, jnp.float32) for a in (g, y, *xs)]
        return lax.convert_element_type(f(*wide), g.dtype)

    return gradient


def one_minus_square(x):
    """1 − x² = (1 + x)(1 − x), which doesn't cancel where |x| is almost 1."""
    one = number(1, x)
    return mul(add(one, x), sub(one, x))


def one_plus_square(x):
    return add(number(1, x), square(x))


def where_zero(x, value: float):
    """x, with its zeros replaced."""
    return select(eq(x, number(0, x)), lax.full_like(x, value), x)


def is_complex(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


# ------------------------------------------------------------------------ rules of more lines


def _mul(g, a, b, out_dtype):
    """g · b in the dtype of a; a product of another dtype than its factors has both converted."""
    if out_dtype is None:
        return summed_to(a, mul(g, b))
    product = mul(g, lax.convert_element_type(b, g.dtype))
    return summed_to(a, lax.convert_element_type(product, a.dtype))


def _sign(g, y, x):
    """0 on the real line. In the plane sign(x) = x/|x| turns with x: dy = i y Im(ȳ dx) / |x|."""
    if not is_complex(x):
        return None
    turn = div(lax.imag(mul(g, y)), where_zero(lax.abs(x), 1))
    return mul(lax.conj(y), lax.complex(lax.full_like(turn, 0), turn))


def _abs(g, y, x):
    """±g on the real line. In the plane |x|² = x x̄, so d|x| = Re(x̄ dx) / |x|."""
    if not is_complex(x):
        return select(lax.ge(x, number(0, x)), g, neg(g))
    # Not g / |x| first: 1 / |x| may be too small or too large for a number, x / |x| isn't.
    size = where_zero(y, 1)
    return lax.complex(
        mul(g, div(lax.real(x), size)),
        neg(mul(g, div(lax.imag(x), size))),
    )


def _tanh(g, y, x):
    """g (1 − y) (1 + y), which doesn't cancel where |y| is almost 1.

    Each JAX's compiler fits the form best in which that JAX writes it: with the factor 1 + y
    multiplied out before 0.12, as one local gradient since.
    """
    if _SINCE_0_12:
        return mul(g, mul(sub(number(1, y), y), add(number(1, y), y)))
    below = mul(g, sub(number(1, y), y))
    return add(below, mul(below, y))


def _asinh(g, y, x):
    """1/√(1 + x²); since JAX 0.12 both are divided by a power of 2 where x² would overflow."""
    if is_complex(x) or not _SINCE_0_12:
        return mul(g, rsqrt(one_plus_square(x)))
    half = jnp.finfo(x.dtype).maxexp // 2
    large = mul(lax.abs(x), number(2.0 ** (2 - half), x))
    scale = div(number(1, x), lax.clamp(number(1, x), large, number(2.0 ** (half + 2), x)))
    return mul(g, mul(scale, rsqrt(add(square(mul(x, scale)), square(scale)))))


def _acosh(g, y, x):
    """1/√(x² − 1); as JAX, in the plane and since 0.12 the root of each factor by itself."""
    below, above = sub(x, number(1, x)), add(x, number(1, x))
    if is_complex(x) or _SINCE_0_12:
        return mul(g, mul(rsqrt(below), rsqrt(above)))
    return mul(g, rsqrt(mul(below, above)))


def _pow_base(g, y, a, b):
    """b aᵇ⁻¹; an integer b = 0 gives 0, also at a = 0."""
    if jnp.issubdtype(b.dtype, jnp.inexact):
        return mul(g, mul(b, lax.pow(a, sub(b, number(1, b)))))
    b = lax.convert_element_type(b, y.dtype)
    exponent = select(eq(b, number(0, b)), lax.full_like(b, 0), sub(b, number(1, b)))
    return mul(g, mul(b, lax.pow(a, exponent)))


def _pow_exponent(g, y, a, b):
    """aᵇ log a, and 0 at a = 0."""
    return mul(g, mul(log(where_zero(a, 1)), y))


def _integer_pow(g, y_out, x, *, y):
    """n xⁿ⁻¹."""
    if y == 0:
        return None
    if y == 1:
        return g

    def gradient(g, y_out, x):
        power = x if y == 2 else integer_pow(x, y - 1)
        return mul(g, mul(number(y, x), power))

    return (_squares_fit(gradient) if y < 0 else gradient)(g, y_out, x)


def _divisor(g, y, a, b):
    """−g a / b². In float16, where 256² is infinite, −g/b · a/b, which takes XLA more memory."""
    if b.dtype == jnp.float16:
        return neg(mul(div(g, b), div(a, b)))
    return neg(mul(mul(g, integer_pow(b, -2)), a))


def _rem_divisor(g, y, a, b):
    """y = a − n b with the whole number n = trunc(a / b), which is constant between its jumps.

    From y, since a / b may round up to a whole number that a doesn't reach.
    """
    return neg(mul(g, lax.round(div(sub(a, y), b))))


def _is_larger(a, b):
    """a > b; of two complex numbers the one that JAX's `max` takes."""
    if is_complex(a):
        return lax.bitwise_and(eq(lax.max(a, b), a), lax.ne(a, b))
    return gt(a, b)


def _share(winner, other):
    """The share of a maximum's gradient: 1 for the larger argument, ½ each at a tie."""
    larger = _is_larger(winner, other)
    one, half, none = (lax.full_like(larger, v, winner.dtype) for v in (1, 0.5, 0))
    return select(larger, one, select(eq(winner, other), half, none))


def _select_n(needed, g, y, which, *cases):
    """The case that was selected gets the gradient."""
    nothing = lax.full_like(g, 0)

    def of_case(i):
        return lax.select_n(which, *[g if j == i else nothing for j in range(len(cases))])

    return (None, *[of_case(i) if wanted else None for i, wanted in enumerate(needed[1:])])


def _clamp_low(g, y, low, x, high):
    """y = low where x < low < high."""
    return summed_to(low, _where(lax.bitwise_and(gt(low, x), lt(low, high)), g))


def _clamp_x(g, y, low, x, high):
    """y = x where low < x < high."""
    return _where(lax.bitwise_and(gt(x, low), lt(x, high)), g)


def _clamp_high(g, y, low, x, high):
    """y = high where x > high."""
    return summed_to(high, _where(lt(high, x), g))


def _where(condition, g):
    return select(condition, g, lax.full_like(g, 0))


def _polynomial(needed, g, y, x, *coefficients, unroll=None):
    """y = Σₖ cₖ xᵏ: Σₖ k cₖ xᵏ⁻¹ for x, and xᵏ for the coefficient cₖ."""
    slopes = [mul(number(k, c), c) for k, c in enumerate(coefficients) if k > 0]
    found = [None]
    if needed[0] and slopes:
        found = [summed_to(x, mul(g, lax.polynomial(x, slopes, unroll=unroll)))]
    power = g
    for k, (c, wanted) in enumerate(zip(coefficients, needed[1:], strict=True)):
        found.append(summed_to(c, power) if wanted else None)
        if any(needed[k + 2 :]):
            power = mul(power, x)
    return found


def _log_of_power(x, n):
    """n log(x); 0 where n is 0, for x = 0 too."""
    return mul(n, log(select(eq(n, number(0, n)), lax.full_like(x, 1), x)))


def _igamma_x(g, y, a, x):
    """The integrand at its upper end: xᵃ⁻¹ e⁻ˣ / Γ(a).

    It is the exponential of a difference of large numbers, as in JAX: at a = 1e5 in float32, it is
    2% off.
    """
    return mul(g, exp(sub(sub(_log_of_power(x, sub(a, number(1, a))), x), lax.lgamma(a))))


def _betainc_x(g, y, a, b, x):
    """The integrand at its upper end: xᵃ⁻¹ (1 − x)ᵇ⁻¹ / B(a, b).

    It is the exponential of a difference of large numbers, as in JAX: at a = b = 1e5 in float32
    it is 16% off.
    """
    log_beta = sub(add(lax.lgamma(a), lax.lgamma(b)), lax.lgamma(add(a, b)))
    one = number(1, x)
    above = sub(b, one)
    of_rest = mul(above, lax.log1p(neg(select(eq(above, number(0, x)), lax.full_like(x, 0), x))))
    log_integrand = add(of_rest, _log_of_power(x, sub(a, one)))
    return summed_to(x, mul(g, exp(sub(log_integrand, log_beta))))


def _bessel_i1e(g, y, x):
    """I₁'(x) = I₀(x) − I₁(x)/x, times the decay e^−|x|; ½ at 0."""
    tiny = number(jnp.finfo(x.dtype).eps, x)
    far = gt(lax.abs(x), tiny)
    safe = select(far, x, lax.full_like(x, tiny))
    slope = sub(lax.bessel_i0e(safe), mul(y, add(sign(safe), div(number(1, x), safe))))
    return mul(g, select(far, slope, lax.full_like(x, 0.5)))


def _random_gamma(g, y, key, a, *, log_space):
    """How the sample moves with a, at a fixed random number (Figurnov et al. 2018).

    With F the distribution function, F(y; a) stays constant: dy/da = −∂F/∂a / ∂F/∂y. Where only
    log y is a number, y being too small for one, F(y; a) = yᵃ / Γ(a + 1), and so
    d log y/da = (ψ(a + 1) − log y) / a.
    """
    if not log_space:
        return mul(g, lax.random_gamma_grad(a, y))
    least = number(math.log(jnp.finfo(y.dtype).tiny), y)
    sample = exp(lax.max(y, least))
    slope = div(lax.random_gamma_grad(a, sample), sample)
    below = div(sub(lax.digamma(add(a, number(1, a))), y), a)
    return mul(g, select(lt(y, least), below, slope))


def _no_gradient(of: str, argument: str) -> Callable:
    """The rule of an argument whose derivative has no known closed form."""

    def refuse(*_, **__):
        raise ValueError(
            f"{of} has no gradient with respect to {argument}: no closed form is known to JAX or "
            f"fnn. Wrap {argument} in jax.lax.stop_gradient if it is a constant."
        )

    return refuse


# ------------------------------------------------------------------------------- arithmetic

ARITHMETIC = {
    "neg": unary(lambda g, y, x: neg(g), "−1"),
    "add": binary(lambda g, y, a, b: g, lambda g, y, a, b: g, ("1", "1")),
    "add_any": binary(lambda g, y, a, b: g, lambda g, y, a, b: g, ("1", "1")),
    "sub": binary(lambda g, y, a, b: g, lambda g, y, a, b: neg(g), ("1", "−1")),
    "mul": each(
        lambda g, y, a, b, out_dtype=None: _mul(g, a, b, out_dtype),
        lambda g, y, a, b, out_dtype=None: _mul(g, b, a, out_dtype),
        local_gradient=("b", "a"),
        elementwise=True,
    ),
    "div": binary(
        lambda g, y, a, b: div(g, b),
        _divisor,
        ("1 / b", "−a / b²"),
    ),
    "rem": binary(lambda g, y, a, b: g, _rem_divisor, ("1", "−trunc(a / b)")),
    "square": unary(lambda g, y, x: mul(g, mul(number(2, x), x)), "2x"),
    "one_minus_square": unary(lambda g, y, x: mul(g, mul(number(-2, x), x)), "−2x"),
    "integer_pow": each(_integer_pow, local_gradient=("n x^(n − 1)",), elementwise=True),
    "pow": binary(_pow_base, _pow_exponent, ("b a^(b − 1)", "a^b log(a)")),
    "polynomial": joint(
        _polynomial, local_gradient=("Σ k cₖ xᵏ⁻¹", "1", "x", "x²", "…"), elementwise=True
    ),
    "nextafter": binary(lambda g, y, a, b: g, lambda g, y, a, b: lax.full_like(g, 0), ("1", "0")),
}

# ----------------------------------------------------------- roots, exponentials, logarithms

POWERS_AND_LOGARITHMS = {
    "sqrt": unary(lambda g, y, x: mul(g, div(number(0.5, y), y)), "1 / 2y"),
    "rsqrt": unary(lambda g, y, x: mul(g, div(mul(number(-0.5, y), y), x)), "−y / 2x"),
    "cbrt": unary(
        _squares_fit(lambda g, y, x: mul(g, mul(number(1 / 3, y), integer_pow(y, -2)))), "1 / 3y²"
    ),
    "exp": unary(lambda g, y, x: mul(g, y), "y"),
    "exp2": unary(lambda g, y, x: mul(mul(g, y), number(math.log(2), y)), "y log(2)"),
    # Not y + 1, which cancels where y is almost −1.
    "expm1": unary(lambda g, y, x: mul(g, exp(x)), "eˣ"),
    "log": unary(lambda g, y, x: div(g, x), "1 / x"),
    "log2": unary(lambda g, y, x: div(g, mul(x, number(math.log(2), x))), "1 / (x log(2))"),
    "log1p": unary(lambda g, y, x: div(g, add(x, number(1, x))), "1 / (1 + x)"),
    # 1 − y cancels where y is almost 1: in float32 this is 0 from x = 17 on, as in JAX.
    "logistic": unary(lambda g, y, x: mul(g, mul(y, sub(number(1, y), y))), "y(1 − y)"),
}

# --------------------------------------------------------- circular and hyperbolic functions

ANGLES = {
    "sin": each(
        lambda g, y, x, **accuracy: mul(g, cos(x, **accuracy)),
        local_gradient=("cos(x)",),
        elementwise=True,
    ),
    "cos": each(
        lambda g, y, x, **accuracy: neg(mul(g, sin(x, **accuracy))),
        local_gradient=("−sin(x)",),
        elementwise=True,
    ),
    "tan": unary(lambda g, y, x: mul(g, one_plus_square(y)), "1 + y²"),
    "asin": unary(lambda g, y, x: mul(g, rsqrt(one_minus_square(x))), "1 / √(1 − x²)"),
    "acos": unary(lambda g, y, x: neg(mul(g, rsqrt(one_minus_square(x)))), "−1 / √(1 − x²)"),
    "atan": unary(_squares_fit(lambda g, y, x: div(g, one_plus_square(x))), "1 / (1 + x²)"),
    "atan2": binary(
        _squares_fit(lambda g, y, a, b: mul(g, div(b, add(square(a), square(b))))),
        _squares_fit(lambda g, y, a, b: mul(g, div(neg(a), add(square(a), square(b))))),
        ("b / (a² + b²)", "−a / (a² + b²)"),
    ),
    "sinh": unary(lambda g, y, x: mul(g, cosh(x)), "cosh(x)"),
    "cosh": unary(lambda g, y, x: mul(g, sinh(x)), "sinh(x)"),
    "tanh": unary(_tanh, "1 − y²"),
    "asinh": unary(_squares_fit(_asinh), "1 / √(1 + x²)"),
    "acosh": unary(_squares_fit(_acosh), "1 / √(x² − 1)"),
    "atanh": unary(lambda g, y, x: div(g, one_minus_square(x)), "1 / (1 − x²)"),
}

# ------------------------------------------------------- corners, choices, piecewise constants

CHOICES = {
    "abs": unary(_abs, "sign(x)"),
    "sign": unary(_sign, "0"),
    "max": binary(
        lambda g, y, a, b: mul(g, _share(a, b)),
        lambda g, y, a, b: mul(g, _share(b, a)),
        ("a > b", "b > a"),
    ),
    "min": binary(
        lambda g, y, a, b: mul(g, _share(b, a)),
        lambda g, y, a, b: mul(g, _share(a, b)),
        ("a < b", "b < a"),
    ),
    "clamp": each(
        _clamp_low,
        _clamp_x,
        _clamp_high,
        local_gradient=("x < low", "low < x < high", "x > high"),
        elementwise=True,
    ),
    "select_n": joint(
        _select_n, local_gradient=("0", "which = 0", "which = 1", "…"), elementwise=True
    ),
}

# ------------------------------------------------------------------------ complex numbers
#
# JAX's gradient of a real function L of x = u + iv is ∂L/∂u − i ∂L/∂v.

COMPLEX = {
    "complex": binary(  # y = a + ib
        lambda g, y, a, b: lax.real(g),
        lambda g, y, a, b: neg(lax.imag(g)),
        ("Re", "−Im"),
    ),
    "real": unary(lambda g, y, x: lax.complex(g, lax.full_like(g, 0)), "1"),
    "imag": unary(lambda g, y, x: lax.complex(lax.full_like(g, 0), neg(g)), "−i"),
    "conj": unary(lambda g, y, x: lax.conj(g) if is_complex(x) else lax.real(g), "conj"),
}

# --------------------------------------------------------------------- special functions

SPECIAL = {
    "erf": unary(
        lambda g, y, x: mul(number(2 / math.sqrt(math.pi), x), mul(g, exp(neg(square(x))))),
        "2/√π exp(−x²)",
    ),
    "erfc": unary(
        lambda g, y, x: mul(number(-2 / math.sqrt(math.pi), x), mul(g, exp(neg(square(x))))),
        "−2/√π exp(−x²)",
    ),
    "erf_inv": unary(
        lambda g, y, x: mul(number(math.sqrt(math.pi) / 2, x), mul(g, exp(square(y)))),
        "√π/2 exp(y²)",
    ),
    "lgamma": unary(lambda g, y, x: mul(g, lax.digamma(x)), "digamma(x)"),
    "digamma": unary(lambda g, y, x: mul(g, lax.polygamma(lax.full_like(x, 1), x)), "ψ₁(x)"),
    "polygamma": binary(
        _no_gradient("polygamma(m, x)", "m"),
        lambda g, y, m, x: mul(g, lax.polygamma(add(m, number(1, m)), x)),
        ("unknown", "ψₘ₊₁(x)"),
    ),
    "zeta": binary(
        _no_gradient("zeta(s, q)", "s"),
        lambda g, y, s, q: neg(mul(g, mul(s, lax.zeta(add(s, number(1, s)), q)))),
        ("unknown", "−s ζ(s + 1, q)"),
    ),
    "igamma": binary(
        lambda g, y, a, x: mul(g, lax.igamma_grad_a(a, x)),
        _igamma_x,
        ("∂P(a, x)/∂a", "xᵃ⁻¹ exp(−x) / Γ(a)"),
    ),
    "igammac": binary(
        lambda g, y, a, x: neg(mul(g, lax.igamma_grad_a(a, x))),
        lambda g, y, a, x: neg(_igamma_x(g, y, a, x)),
        ("−∂P(a, x)/∂a", "−xᵃ⁻¹ exp(−x) / Γ(a)"),
    ),
    "regularized_incomplete_beta": each(
        _no_gradient("betainc(a, b, x)", "a"),
        _no_gradient("betainc(a, b, x)", "b"),
        _betainc_x,
        local_gradient=("unknown", "unknown", "xᵃ⁻¹ (1 − x)ᵇ⁻¹ / B(a, b)"),
        elementwise=True,
    ),
    "bessel_i0e": unary(
        lambda g, y, x: mul(g, sub(lax.bessel_i1e(x), mul(sign(x), y))), "i1e(x) − sign(x) y"
    ),
    "bessel_i1e": unary(_bessel_i1e, "i0e(x) − y (sign(x) + 1/x)"),
    "random_gamma": each(
        None, _random_gamma, local_gradient=("0", "−∂F/∂a / ∂F/∂y"), elementwise=True
    ),
}

# -------------------------------------------------- the same number in another form or place

SAME = {
    "convert_element_type": unary(lambda g, y, x: in_dtype_of(x, g), "1"),
    "reduce_precision": each(
        lambda g, y, x, **bits: lax.reduce_precision(g, **bits),
        local_gradient=("1",),
        elementwise=True,
    ),
    "copy": unary(lambda g, y, x: g, "1"),
    "name": unary(lambda g, y, x: g, "1"),
    "stop_gradient": zero,
}

# -------------------------------------------------- nothing to pass on: steps and whole numbers

STEPS: tuple[str, ...] = (
    *("floor", "ceil", "round", "is_finite", "eq", "ne", "ge", "gt", "le", "lt"),
    *("eq_to", "le_to", "lt_to", "bitcast_convert_type", "clz", "population_count"),
    *("and", "or", "xor", "not", "mulhi"),
    *("shift_left", "shift_right_arithmetic", "shift_right_logical"),
    *("random_bits", "random_seed", "random_wrap", "random_unwrap", "random_split"),
    *("random_fold_in", "random_clone", "threefry2x32", "rng_bit_generator"),
)

RULES: dict[str, LocalRule] = {
    **ARITHMETIC,
    **POWERS_AND_LOGARITHMS,
    **ANGLES,
    **CHOICES,
    **COMPLEX,
    **SPECIAL,
    **SAME,
    **dict.fromkeys(STEPS, zero),
}
