"""Activations against plain definitions, finite differences and `jax.nn`'s conventions."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fnn import ops


class Case(NamedTuple):
    """An operation, an independent definition of it, and what we know of it."""

    op: Any
    plain: Any
    static: dict = {}
    kinks: tuple = ()  # where x has no derivative
    at_kink: tuple = ()  # the local gradient that is given there
    largest: float = 1.0  # the op's value is finite up to this times the dtype's largest

    def __call__(self, x):
        return self.op(x, **self.static)


def halves(function):
    def gated(x):
        a, g = jnp.split(x, 2, -1)
        return a * function(g)

    return gated


def squareplus(x, b=4.0):
    return (x + jnp.sqrt(x * x + b)) / 2


SELU = 1.0507009873554805 * 1.6732632423543772

ELEMENTWISE = {
    "sigmoid": Case(ops.sigmoid, lambda x: 1 / (1 + jnp.exp(-x))),
    "tanh": Case(ops.tanh, lambda x: (jnp.exp(2 * x) - 1) / (jnp.exp(2 * x) + 1)),
    "relu": Case(ops.relu, jax.nn.relu, {}, (0.0,), (0.0,)),
    "leaky_relu": Case(
        ops.leaky_relu, lambda x: jax.nn.leaky_relu(x, 0.1), {}, (0.0,), (1.0,)
    ),
    "leaky_relu 0.3": Case(
        ops.leaky_relu,
        lambda x: jax.nn.leaky_relu(x, 0.3),
        {"slope": 0.3},
        (0.0,),
        (1.0,),
    ),
    "leaky_relu 0": Case(
        ops.leaky_relu, lambda x: jax.nn.leaky_relu(x, 0.0), {"slope": 0.0}, (0.0,), (1.0,)
    ),
    "elu": Case(ops.elu, jax.nn.elu, {}, (0.0,), (1.0,)),
    "elu 0.5": Case(
        ops.elu, lambda x: jax.nn.elu(x, 0.5), {"alpha": 0.5}, (0.0,), (0.5,)
    ),
    "selu": Case(ops.selu, jax.nn.selu, {}, (0.0,), (SELU,), largest=0.95),
    "celu": Case(ops.celu, jax.nn.celu, {}, (0.0,), (1.0,)),
    "celu 2": Case(ops.celu, lambda x: jax.nn.celu(x, 2.0), {"alpha": 2.0}, (0.0,), (1.0,)),
    "relu6": Case(ops.relu6, jax.nn.relu6, {}, (0.0, 6.0), (0.0, 0.0)),
    "hard_tanh": Case(ops.hard_tanh, jax.nn.hard_tanh, {}, (-1.0, 1.0), (1.0, 1.0)),
    "hard_sigmoid": Case(ops.hard_sigmoid, jax.nn.hard_sigmoid, {}, (-3.0, 3.0), (0.0, 0.0)),
    "hard_silu": Case(ops.hard_silu, jax.nn.hard_silu, {}, (-3.0, 3.0), (0.0, 1.0)),
    "softplus": Case(ops.softplus, lambda x: jnp.log(1 + jnp.exp(x))),
    "log_sigmoid": Case(ops.log_sigmoid, lambda x: -jnp.log(1 + jnp.exp(-x))),
    "softsign": Case(ops.softsign, jax.nn.soft_sign),
    "silu": Case(ops.silu, lambda x: x / (1 + jnp.exp(-x))),
    "gelu": Case(ops.gelu, lambda x: jax.nn.gelu(x, approximate=True)),
    "gelu exact": Case(
        ops.gelu,
        lambda x: x * jax.scipy.stats.norm.cdf(x),
        {"approximate": False},
    ),
    "mish": Case(ops.mish, lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x)))),
    "squareplus": Case(ops.squareplus, squareplus),
    "squareplus 1": Case(ops.squareplus, lambda x: squareplus(x, 1.0), {"b": 1.0}),
}

WHOLE = {  # not elementwise; on arrays whose last axes are (2, an even number)
    "glu": Case(ops.glu, halves(lambda g: 1 / (1 + jnp.exp(-g)))),
    "glu axis 0": Case(
        ops.glu, lambda x: halves(jax.nn.sigmoid)(x.T).T, {"axis": 0}
    ),
    "swiglu": Case(ops.swiglu, halves(lambda g: g / (1 + jnp.exp(-g)))),
    "geglu": Case(ops.geglu, halves(jax.nn.gelu)),
    "geglu exact": Case(
        ops.geglu,
        halves(lambda g: g * jax.scipy.stats.norm.cdf(g)),
        {"approximate": False},
    ),
    "maxout": Case(ops.maxout, lambda z: jnp.max(z, -2)),
    "maxout axis 0": Case(ops.maxout, lambda z: jnp.max(z, 0), {"axis": 0}),
    "softmax": Case(ops.softmax, lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)),
    "softmax axis 0": Case(
        ops.softmax, lambda x: jnp.exp(x) / jnp.exp(x).sum(0, keepdims=True), {"axis": 0}
    ),
    "softmax all": Case(ops.softmax, lambda x: jnp.exp(x) / jnp.exp(x).sum(), {"axis": None}),
    "log_softmax": Case(
        ops.log_softmax, lambda x: x - jnp.log(jnp.exp(x).sum(-1, keepdims=True))
    ),
    "log_softmax 2 axes": Case(
        ops.log_softmax, lambda x: x - jnp.log(jnp.exp(x).sum()), {"axis": (0, 1)}
    ),
    "logsumexp": Case(ops.logsumexp, lambda x: jnp.log(jnp.exp(x).sum())),
    "logsumexp axis 0": Case(ops.logsumexp, lambda x: jnp.log(jnp.exp(x).sum(0)), {"axis": 0}),
    "logsumexp keepdims": Case(
        ops.logsumexp,
        lambda x: jnp.log(jnp.exp(x).sum(-1, keepdims=True)),
        {"axis": -1, "keepdims": True},
    ),
}

ALL = ELEMENTWISE | WHOLE
DTYPES = ("float16", "bfloat16", "float32", "float64")

every = pytest.mark.parametrize("case", ALL.values(), ids=ALL.keys())
elementwise = pytest.mark.parametrize("case", ELEMENTWISE.values(), ids=ELEMENTWISE.keys())
with_kinks = pytest.mark.parametrize(
    "case",
    [c for c in ELEMENTWISE.values() if c.kinks],
    ids=[n for n, c in ELEMENTWISE.items() if c.kinks],
)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def numbers(*shape, seed=0, dtype="float64"):
    """Away from every kink in the table: multiples of 0.37 are never 0, ±1, ±3, 6."""
    rng = np.random.default_rng(seed)
    steps = rng.permutation(np.arange(1, 1 + math.prod(shape)) - math.prod(shape) // 2 - 0.5)
    return jnp.asarray((0.37 * steps).reshape(shape), dtype)


def weighted(function, seed=1):
    """A scalar that depends on every entry of the result, nonlinearly."""

    def scalar(x):
        y = function(x)
        return jnp.sum(jnp.sin(y) * numbers(*y.shape, seed=seed, dtype=y.dtype))

    return scalar


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------- values and gradients


@every
def test_value_and_derivatives_equal_those_of_the_plain_definition(case):
    x, dx = numbers(2, 6), numbers(2, 6, seed=2)
    close(case(x), case.plain(x))
    for scalar_of in (jax.grad, jax.hessian, lambda f: jax.jacrev(jax.jacrev(f))):
        close(scalar_of(weighted(case))(x), scalar_of(weighted(case.plain))(x))
    for a, b in zip(jax.jvp(case, (x,), (dx,)), jax.jvp(case.plain, (x,), (dx,)), strict=True):
        close(a, b)


@every
def test_gradient_equals_central_differences(case):
    x, direction, h = numbers(2, 6), numbers(2, 6, seed=3), 1e-6
    f = weighted(case)
    rise = (f(x + h * direction) - f(x - h * direction)) / (2 * h)
    slope = jnp.vdot(jax.jit(jax.grad(f))(x), direction)
    assert abs(rise - slope) < 1e-6 * max(abs(rise), abs(slope), 1)


@every
def test_third_derivative(case):
    x, dx = numbers(2, 6), numbers(2, 6, seed=2)

    def third(f):
        along = lambda g: lambda x: jax.jvp(g, (x,), (dx,))[1]  # noqa: E731
        return jax.jit(along(along(jax.grad(weighted(f)))))(x)

    close(third(case), third(case.plain), 1e-8)


@every
def test_vmap_of_grad_is_a_loop_over_examples(case):
    x = numbers(3, 2, 6)
    batch = jax.jit(jax.vmap(jax.grad(weighted(case))))(x)
    close(batch, jnp.stack([jax.grad(weighted(case.plain))(row) for row in x]))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["relu", "elu", "softplus", "silu", "gelu", "mish", "squareplus"])
def test_any_shape_and_any_value(name, data):
    case = ELEMENTWISE[name]
    shapes = hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=2)
    x = data.draw(
        hnp.arrays("float64", shapes, elements=st.floats(-30, 30).filter(lambda v: abs(v) > 1e-3))
    )
    y, pullback = jax.vjp(case, x)
    plain_y, plain_pullback = jax.vjp(case.plain, x)
    close(y, plain_y)
    close(pullback(jnp.ones_like(y))[0], plain_pullback(jnp.ones_like(y))[0])


# ---------------------------------------------------------------------------- dtypes and extremes


def extremes(dtype, factor=1.0):
    """Finite numbers of every size: the dtype's largest, tiny ones, and the usual."""
    largest, tiny = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).tiny)
    sizes = [largest * factor, largest / 3, math.sqrt(largest), 1e4, 745, 100, 88, 40, 22, 17, 9]
    sizes += [6, 3, 1, 0.5, 1e-3, tiny, 0.0]
    return jnp.asarray(sizes + [-s for s in sizes], dtype)


@dtypes
@elementwise
def test_value_gradient_and_second_derivative_are_finite_for_every_finite_input(case, dtype):
    x = extremes(dtype, case.largest)
    y = case(x)
    assert y.dtype == x.dtype and jnp.all(jnp.isfinite(y))
    first = lambda x: jax.vmap(jax.grad(case))(x)  # noqa: E731
    assert first(x).dtype == x.dtype and jnp.all(jnp.isfinite(first(x)))
    assert jnp.all(jnp.isfinite(jax.jvp(first, (x,), (jnp.ones_like(x),))[1]))
    assert jnp.all(jnp.isfinite(jax.vjp(first, x)[1](jnp.ones_like(x))[0]))
    assert jnp.all(jnp.isfinite(jax.jit(jax.vmap(jax.hessian(case)))(x)))


@elementwise
def test_large_inputs_meet_their_asymptotes(case):
    """The gradient is constant beyond ±50, up to the algebraic ones' tails."""
    x = jnp.asarray([1e30, 1e8], "float64")
    right, left = jax.vmap(jax.grad(case))(x), jax.vmap(jax.grad(case))(-x)
    bounded = case.op in (
        ops.sigmoid,
        ops.tanh,
        ops.relu6,
        ops.hard_tanh,
        ops.hard_sigmoid,
        ops.softsign,
        ops.log_sigmoid,
    )
    close(right, 0 * x if bounded else case(x) / x)
    close(left, 0 * x if case.op is not ops.leaky_relu else -case(-x) / x) if (
        case.op is not ops.log_sigmoid
    ) else close(left, 1 + 0 * x)


@dtypes
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "elu", "gelu", "gelu exact", "mish", "softplus"])
def test_low_precision_is_as_good_as_rounding_allows(name, dtype):
    case, x = ELEMENTWISE[name], numbers(24, dtype=dtype)
    exact = x.astype("float64")
    eps = float(jnp.finfo(dtype).eps)
    close(case(x), case(exact), 16 * eps)
    gradient, wanted = jax.vmap(jax.grad(case))(x), jax.vmap(jax.grad(case))(exact)
    close(gradient, wanted, 32 * eps)


@dtypes
def test_the_tails_keep_their_digits(dtype):
    """Where the textbook formula would cancel to 0."""
    x = jnp.asarray(-5.0, dtype)
    eps = float(jnp.finfo(dtype).eps)
    close(ops.softplus(x) / math.log1p(math.exp(-5)), 1, 4 * eps)
    close(jax.grad(ops.softplus)(x) * (1 + math.exp(5)), 1, 8 * eps)
    large = jnp.asarray(-1000.0, dtype)
    close(ops.squareplus(large) * (1000 + math.sqrt(1e6 + 4)) / 2, 1, 4 * eps)
    close(ops.mish(x) / (-5 * math.tanh(math.log1p(math.exp(-5)))), 1, 8 * eps)


@dtypes
@pytest.mark.parametrize("name", [n for n in WHOLE if "all" not in n])
def test_the_others_are_finite_too(name, dtype):
    """Products and differences of two inputs are kept inside the dtype: a quarter of its largest."""
    case = WHOLE[name]
    big = extremes(dtype, 0.25)
    big = jnp.clip(big, -float(jnp.finfo(dtype).max) / 4, float(jnp.finfo(dtype).max) / 4)
    one = jnp.ones_like(big)
    for x in (jnp.stack([one, big], 1), jnp.stack([big, one], 1)) if "glu" in name else [big[:, None]]:
        x = jnp.stack([x, x[::-1]], 1)  # (many, 2, 1 or 2): a batch of pairs
        if name == "glu axis 0":
            x = jnp.swapaxes(x, 1, 2)
        y = jax.vmap(case)(x)
        gradient = jax.vmap(jax.grad(lambda x: jnp.sum(case(x))))(x)
        assert y.dtype == gradient.dtype == x.dtype
        assert jnp.all(jnp.isfinite(y)) and jnp.all(jnp.isfinite(gradient))


@dtypes
def test_softmax_over_all_the_numbers_of_a_dtype(dtype):
    x = extremes(dtype)
    for op in (ops.softmax, ops.logsumexp):
        y, pullback = jax.vjp(op, x)
        assert jnp.all(jnp.isfinite(y)) and jnp.all(jnp.isfinite(pullback(jnp.ones_like(y))[0]))
    gradient = jax.grad(lambda x: jnp.max(ops.log_softmax(x)))(x)
    second = jax.jvp(jax.grad(lambda x: ops.logsumexp(x)), (x,), (jnp.ones_like(x),))[1]
    assert jnp.all(jnp.isfinite(gradient)) and jnp.all(jnp.isfinite(second))


def test_excluded_entries_of_a_softmax():
    x = jnp.asarray([1.0, -jnp.inf, 2.0])
    y, pullback = jax.vjp(ops.softmax, x)
    close(y, jax.nn.softmax(x))
    close(pullback(jnp.asarray([1.0, 2.0, 3.0]))[0][1], 0)
    close(jax.grad(ops.logsumexp)(x), jax.nn.softmax(x))
    nothing = jnp.full(3, -jnp.inf)
    assert ops.logsumexp(nothing) == -jnp.inf and ops.logsumexp(jnp.zeros(0)) == -jnp.inf
    close(jax.grad(ops.logsumexp)(nothing), jnp.zeros(3))


# --------------------------------------------------------------------------------------- kinks


@with_kinks
def test_gradient_at_the_kinks_is_the_documented_one_and_jax_nns(case):
    x = jnp.asarray(case.kinks)
    close(jax.vmap(jax.grad(case))(x), case.at_kink)
    close(jax.vmap(jax.grad(case.plain))(x), case.at_kink)
    close(jax.jvp(case, (x,), (jnp.ones_like(x),))[1], case.at_kink)
    assert jnp.all(jnp.isfinite(jax.vmap(jax.hessian(case))(x)))


@elementwise
def test_smooth_at_zero_unless_said_otherwise(case):
    if 0.0 in case.kinks and len(case.kinks) == len(case.at_kink) and case.op is not ops.celu:
        pytest.skip("has a kink at 0")
    h = 1e-6
    slope = (case(h) - case(-h)) / (2 * h)
    close(jax.grad(case)(0.0), slope, 1e-5)


def test_second_derivative_of_softsign_at_zero():
    assert jax.grad(jax.grad(ops.softsign))(0.0) == -2.0


def test_tied_pieces_of_maxout_share_the_gradient():
    z = jnp.asarray([[1.0, 5.0, 2.0], [1.0, 4.0, 2.0], [0.0, 5.0, 2.0]])
    wanted = [[1 / 2, 1 / 2, 1 / 3], [1 / 2, 0, 1 / 3], [0, 1 / 2, 1 / 3]]
    close(jax.grad(lambda z: jnp.sum(ops.maxout(z)))(z), wanted)
    close(jax.grad(lambda z: jnp.sum(jnp.max(z, 0)))(z), wanted)
    close(jax.hessian(lambda z: jnp.sum(ops.maxout(z)))(z), jnp.zeros((3, 3, 3, 3)))


def test_maxout_is_the_lectures():
    W, b, x = numbers(2, 4, 5), numbers(2, 4, seed=1), numbers(5, seed=2)

    def ours(W, b, x):
        return jnp.sum(ops.maxout(jnp.einsum("poi,i->po", W, x) + b) ** 2)

    def lecture(W, b, x):
        return jnp.sum(jnp.maximum(W[0] @ x + b[0], W[1] @ x + b[1]) ** 2)

    for a, p in zip(
        jax.grad(ours, (0, 1, 2))(W, b, x), jax.grad(lecture, (0, 1, 2))(W, b, x), strict=True
    ):
        close(a, p)


# ------------------------------------------------------------------- arguments, shapes, cost


@every
def test_arrays_without_entries(case):
    shape = (2, 0) if "axis 0" not in str(case.static) else (2, 0)
    x = jnp.zeros(shape, "float32")
    y, pullback = jax.vjp(case, x)
    assert y.shape == case.plain(jnp.ones((2, 2)))[..., :0].shape if y.ndim else True
    assert y.dtype == jnp.float32 and pullback(jnp.ones_like(y))[0].shape == shape


@every
def test_integers_are_refused(case):
    with pytest.raises(TypeError, match=rf"{case.op.name}: .*int32, wanted"):
        case(jnp.ones((2, 2), "int32"))


@every
def test_complex_numbers_where_the_function_is_holomorphic(case):
    z = jnp.asarray([[0.3 + 0.5j, -1.0 + 0.2j], [0.1j, 2.0 - 1.0j]])
    if case.op not in (ops.sigmoid, ops.tanh):
        with pytest.raises(TypeError, match=rf"{case.op.name}: .*complex128, wanted a real"):
            case(z)
        return
    total = lambda f: lambda z: jnp.sum(f(z) ** 2)  # noqa: E731
    close(case(z), case.plain(z))
    close(
        jax.grad(total(case), holomorphic=True)(z), jax.grad(total(case.plain), holomorphic=True)(z)
    )


@every
def test_nan_is_not_hidden(case):
    assert jnp.all(jnp.isnan(case(jnp.full((2, 2), jnp.nan))))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.glu(jnp.ones(3)), r"glu: argument 'x' of shape \(3,\) has 3 features"),
        (lambda: ops.swiglu(jnp.ones((4, 5)), axis=1), r"swiglu: .*\(4, 5\).*even"),
        (lambda: ops.geglu(jnp.ones(4), axis=1), r"geglu: axis 1 is out of range.*\(4,\)"),
        (lambda: ops.maxout(jnp.ones(4)), r"maxout: axis -2 is out of range.*\(4,\)"),
        (lambda: ops.maxout(jnp.ones((0, 3))), r"maxout: argument 'z' of shape \(0, 3\)"),
        (lambda: ops.softmax(jnp.ones(3), axis=2), r"softmax: axis 2 .* from -1 to 0"),
        (lambda: ops.softmax(1.0), r"softmax: wanted an argument with at least one axis"),
        (lambda: ops.log_softmax(jnp.ones(3), axis=(0, 1)), r"log_softmax: axis \(0, 1\)"),
        (lambda: ops.elu(1.0, alpha=-1.0), r"elu: argument 'alpha' is -1.0"),
        (lambda: ops.celu(1.0, alpha=0.0), r"celu: argument 'alpha' is 0.0"),
        (lambda: ops.squareplus(1.0, b=0.0), r"squareplus: argument 'b' is 0.0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@every
def test_the_gradient_costs_no_more_than_autodiffs(case):
    x, c = jnp.ones((16, 2, 64), "float32"), jnp.ones((16, 2, 64), "float32")

    def cost(f):
        y = jax.eval_shape(jax.vmap(f), x)

        def step(x, c):
            return jax.grad(lambda x: jnp.vdot(jax.vmap(f)(x), c.ravel()[: y.size].reshape(y.shape)))(x)

        compiled = jax.jit(step).lower(x, c).compile()
        return (
            compiled.cost_analysis().get("flops", 0),
            compiled.memory_analysis().temp_size_in_bytes,
        )

    for ours, autodiff in zip(cost(case), cost(case.plain), strict=True):
        assert ours <= 1.02 * autodiff + 64
