"""Losses against optax, closed forms and finite differences; extremes, labels, errors."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sweeps import exhaustive, sweep

from fnn import ops

# Most tests compile once and run once, so compiling well would be wasted.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

DTYPES = ("float16", "bfloat16", "float32", "float64")
LOGITS = jnp.asarray([1.3, -0.4, 0.2, 2.1, -3.0])
SHARES = jnp.asarray([0.2, 0.0, 0.5, 0.25, 0.05])
TARGET = jnp.asarray([1.0, -3.1, 0.3, 0.8, -1.4])


class Case(NamedTuple):
    """A loss of a vector, an independent definition, and its second argument."""

    op: Any
    plain: Any
    other: Any
    static: dict = {}

    def __call__(self, x, other):
        return self.op(x, other, **self.static)

    def by(self):
        """Which arguments have a gradient."""
        return (0, 1) if jnp.issubdtype(jnp.asarray(self.other).dtype, jnp.floating) else 0


def cross_entropy(x, labels, smoothing=0.0):
    p = jnp.exp(x) / jnp.sum(jnp.exp(x))
    q = labels if jnp.ndim(labels) else jnp.eye(x.size)[labels]
    return -jnp.sum(((1 - smoothing) * q + smoothing / x.size) * jnp.log(p))


def hinge(s, y, margin=1.0):
    """The loop of the lecture's `L_i` function."""
    return sum(jnp.maximum(0, s[j] - s[y] + margin) for j in range(s.size) if j != y)


def binary(x, z):
    p = 1 / (1 + jnp.exp(-x))
    return -jnp.sum(z * jnp.log(p) + (1 - z) * jnp.log(1 - p))


def huber(f, t, delta=1.0):
    return jnp.sum(optax.huber_loss(f, t, delta=delta))


def focal(x, z, gamma, alpha=0.5):
    p = 1 / (1 + jnp.exp(-x))
    balance = alpha * z + (1 - alpha) * (1 - z)
    wrong = z * (1 - p) + (1 - z) * p
    return -jnp.sum(balance * wrong**gamma * (z * jnp.log(p) + (1 - z) * jnp.log(1 - p)))


def cosine(x, y):
    return x @ y / jnp.sqrt((x @ x) * (y @ y))


POSITIVE = jnp.asarray([0.2, 0.1, 0.4, 0.25, 0.05])
CASES = {
    "cross entropy": Case(ops.softmax_cross_entropy, cross_entropy, 3),
    "cross entropy, smoothed": Case(
        ops.softmax_cross_entropy,
        lambda x, y: cross_entropy(x, y, 0.1),
        2,
        {"label_smoothing": 0.1},
    ),
    "cross entropy of shares": Case(ops.softmax_cross_entropy, cross_entropy, SHARES),
    "cross entropy of any weights": Case(
        ops.softmax_cross_entropy,
        lambda x, q: -jnp.sum((0.8 * q + 0.2 / 5) * jnp.log(jnp.exp(x) / jnp.exp(x).sum())),
        jnp.asarray([0.5, 2.0, -0.3, 1.1, 0.4]),
        {"label_smoothing": 0.2},
    ),
    "hinge": Case(ops.multiclass_hinge, hinge, 0),
    "hinge, margin 2.5": Case(
        ops.multiclass_hinge, lambda s, y: hinge(s, y, 2.5), 1, {"margin": 2.5}
    ),
    "binary": Case(ops.sigmoid_binary_cross_entropy, binary, SHARES),
    "binary, integers": Case(
        ops.sigmoid_binary_cross_entropy, binary, jnp.asarray([0, 1, 1, 0, 1])
    ),
    "binary, booleans": Case(
        ops.sigmoid_binary_cross_entropy, binary, jnp.asarray([False, True, True, False, True])
    ),
    "squared error": Case(ops.squared_error, lambda f, t: jnp.sum((f - t) ** 2), TARGET),
    "squared error, integers": Case(
        ops.squared_error, lambda f, t: jnp.sum((f - t) ** 2), jnp.asarray([1, 0, 2, -1, 3])
    ),
    "huber": Case(ops.huber, huber, TARGET),
    "huber, delta 2": Case(ops.huber, lambda f, t: huber(f, t, 2.0), TARGET, {"delta": 2.0}),
    "huber, integers": Case(ops.huber, huber, jnp.asarray([1, 0, 2, -1, 3])),
    "pinball": Case(
        ops.pinball,
        lambda f, t: jnp.sum(jnp.maximum(0.8 * (t - f), -0.2 * (t - f))),
        TARGET,
        {"quantile": 0.8},
    ),
    "poisson": Case(
        ops.poisson_nll, lambda s, t: jnp.sum(jnp.exp(s) - t * s), jnp.asarray([3, 0, 1, 2, 7])
    ),
    "poisson, full": Case(
        ops.poisson_nll,
        lambda s, t: -jnp.sum(t * s - jnp.exp(s) - jax.scipy.special.gammaln(t + 1)),
        4 + TARGET,
        {"full": True},
    ),
    "focal": Case(ops.sigmoid_focal, lambda x, z: 2 * focal(x, z, 2), jnp.asarray([0, 1, 1, 0, 1])),
    "focal of shares": Case(
        ops.sigmoid_focal,
        lambda x, z: focal(x, z, 0.5, 0.25),
        POSITIVE,
        {"gamma": 0.5, "alpha": 0.25},
    ),
    "focal, gamma 0": Case(ops.sigmoid_focal, lambda x, z: binary(x, z), SHARES, {"gamma": 0}),
    "divergence": Case(
        ops.kl_divergence, lambda log_p, q: jnp.sum(q * (jnp.log(q) - log_p)), POSITIVE
    ),
    "cosine": Case(ops.cosine_similarity, cosine, TARGET),
}
QUICK = ["cross entropy, smoothed", "cross entropy of any weights", "hinge, margin 2.5", "binary"]
QUICK += ["squared error", "huber, delta 2", "poisson, full", "focal of shares", "cosine"]
every = pytest.mark.parametrize("name", sweep(CASES, QUICK))
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def close(a, b, tolerance=1e-9):
    a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------- values and gradients


DIRECTION = jnp.cos(LOGITS)
BATCH = LOGITS + 0.37 * jnp.arange(3)[:, None] * jnp.flip(LOGITS)
H = 1e-6


def along(g):
    return lambda x: jax.jvp(g, (x,), (DIRECTION,))[1]


def in_every_mode(case):
    by, other = case.by(), jnp.asarray(case.other)
    scalar = lambda x, other: jnp.sin(case(x, other))
    batched = lambda *a: jnp.sum(jax.vmap(scalar, (0, None))(*a))
    gradient = jax.grad(scalar, by)
    rise = case(LOGITS + H * DIRECTION, other) - case(LOGITS - H * DIRECTION, other)
    return {
        "value": [case(LOGITS, other)],
        "gradient": [gradient(LOGITS, other)],
        "batch": [jax.vmap(jax.grad(scalar), (0, None))(BATCH, other)],
        "sum": [jax.grad(batched, by)(BATCH, other)],
        "Hessian": [g(gradient, by)(LOGITS, other) for g in (jax.jacfwd, jax.jacrev)],
        "third": [along(along(lambda x: jax.grad(scalar)(x, other)))(LOGITS)],
        "rise": [rise / (2 * H)],
    }


def in_one_mode(case):
    by, other = case.by(), jnp.asarray(case.other)
    # The lecture's loop over classes wants an integer of Python's.
    plain = (lambda x, _: case.plain(x, case.other)) if "hinge" in case.op.name else case.plain
    scalar = lambda x, other: jnp.sin(plain(x, other))
    gradient = jax.grad(scalar, by)
    each = jax.vmap(gradient, (0, None))(BATCH, other)
    return {
        "value": plain(LOGITS, other),
        "gradient": gradient(LOGITS, other),
        "batch": each[0] if by else each,
        "sum": (each[0], jnp.sum(each[1], 0)) if by else each,
        "Hessian": jax.jacfwd(gradient, by)(LOGITS, other),
        "third": along(along(lambda x: jax.grad(scalar)(x, other)))(LOGITS),
        "rise": jnp.vdot(jax.grad(plain)(LOGITS, other), DIRECTION),
    }


@every
def test_every_derivative_equals_that_of_the_plain_definition(name):
    case = CASES[name]
    ours, plain = quickly(lambda: (in_every_mode(case), in_one_mode(case)))()
    for kind, values in ours.items():
        compare = functools.partial(close, tolerance=1e-6 if kind == "rise" else 1e-8)
        for value in values:
            jax.tree.map(compare, value, plain[kind])


_vectors = hnp.arrays("float64", 4, elements=st.floats(-200, 200))
_value_and_gradient = quickly(
    lambda x, q, y: [
        jax.value_and_grad(f)(x, a)
        for f, a in (
            (ops.softmax_cross_entropy, y),
            (optax.softmax_cross_entropy_with_integer_labels, y),
            (ops.softmax_cross_entropy, q),
            (optax.softmax_cross_entropy, q),
            (ops.multiclass_hinge, y),
            (lambda x, y: jnp.sum(jax.nn.relu(x - x[y] + 1)) - 1, y),
            (ops.sigmoid_binary_cross_entropy, q),
            (lambda x, q: jnp.sum(optax.sigmoid_binary_cross_entropy(x, q)), q),
            (ops.squared_error, q),
            (lambda x, q: jnp.sum(optax.squared_error(x, q)), q),
            (ops.huber, q),
            (lambda x, q: jnp.sum(optax.huber_loss(x, q)), q),
        )
    ]
)


@settings(max_examples=60, deadline=None)
@given(x=_vectors, weights=hnp.arrays("float64", 4, elements=st.floats(0, 1)), y=st.integers(0, 3))
def test_equal_to_optax_for_any_numbers(x, weights, y):
    assume(np.min(abs(x - x[y] + 1)) > 1e-6)  # away from the hinge's kinks
    shares = (weights + 0.01) / np.sum(weights + 0.01)
    found = _value_and_gradient(x, shares, y)
    for ours, theirs in zip(found[::2], found[1::2], strict=True):
        jax.tree.map(lambda a, b: close(a, b, 1e-9), ours, theirs)


@exhaustive
def test_the_gaussian_with_a_variance():
    """Against scipy's log density, in all modes; and in float64 by differences."""
    prediction = jnp.stack([LOGITS, jnp.cos(LOGITS)], axis=-1)
    plain = lambda z, t: -jnp.sum(jax.scipy.stats.norm.logpdf(t, z[..., 0], jnp.exp(z[..., 1] / 2)))
    loss = ops.gaussian_nll
    for f in (jax.value_and_grad, functools.partial(jax.value_and_grad, argnums=(0, 1))):
        ours, theirs = (quickly(f(g))(prediction, TARGET) for g in (loss, plain))
        jax.tree.map(close, ours, theirs)
    wanted = quickly(jax.hessian(plain))(prediction, TARGET)
    for f in (jax.jacfwd, jax.jacrev):
        close(quickly(f(jax.grad(loss)))(prediction, TARGET), wanted)
    each = jax.vmap(jax.grad(loss))(prediction, TARGET)  # one number, of shape ()
    close(each, jax.grad(plain)(prediction, TARGET))
    direction = jnp.sin(prediction)
    rise = loss(prediction + H * direction, TARGET) - loss(prediction - H * direction, TARGET)
    close(rise / (2 * H), jnp.vdot(jax.grad(loss)(prediction, TARGET), direction), 1e-6)
    integers = jnp.arange(5)
    close(loss(prediction, integers), plain(prediction, integers))


@dtypes
def test_the_gaussian_at_extremes(dtype):
    """A variance that is no number of the dtype's any more, with the mean on the target."""
    both = quickly(jax.value_and_grad(ops.gaussian_nll))
    value, gradient = both(jnp.asarray([1.0, -1e4], dtype), jnp.asarray(1, dtype))
    close(value, -5e3, 2e-3)
    close(gradient, [0, 0.5])
    value, gradient = both(jnp.asarray([1.0, 1e4], dtype), jnp.asarray(3, dtype))
    close(value, 5e3, 2e-3)
    close(gradient, [0, 0.5])
    assert value.dtype == gradient.dtype == dtype


def test_the_lectures_examples():
    """The cat, car and frog scores of the lecture: 3.2, 5.1, −1.7, the cat being right."""
    scores = jnp.asarray([3.2, 5.1, -1.7])
    close(ops.multiclass_hinge(scores, 0), 2.9)
    close(ops.softmax_cross_entropy(scores, 0), 2.04, 1e-3)
    close(jax.grad(ops.multiclass_hinge)(scores, 0), [-1, 1, 0])


# ----------------------------------------------------------------------- positions, parameters


@pytest.mark.parametrize("size, margin", [(1e12, 1.0), (-3e8, 1.0), (1.0, 1e-12)])
def test_a_margin_is_not_lost_beside_large_scores(size, margin):
    scores = jnp.asarray([size, size, 2 * size], jnp.float32)
    label = 0 if size < 0 else 2
    wanted = margin if size < 0 else 0.0
    loss = functools.partial(ops.multiclass_hinge, margin=margin)
    np.testing.assert_allclose(loss(scores, label), wanted, rtol=1e-6)
    np.testing.assert_allclose(loss(scores[:2], 1), margin, rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(loss)(scores[:2], 1), [1, -1])


@pytest.mark.parametrize("op", [ops.softmax_cross_entropy, ops.multiclass_hinge])
def test_one_loss_for_each_position(op):
    logits = jnp.stack([LOGITS, jnp.flip(LOGITS), 2 * LOGITS]).reshape(3, 1, 5)
    labels = jnp.asarray([[2], [0], [4]])
    weights = jnp.asarray([[1.0], [-2.0], [0.5]])
    apart = [[op(x[0], y[0])] for x, y in zip(logits, labels, strict=True)]
    close(op(logits, labels), apart)
    gradient = quickly(jax.grad(lambda x: jnp.sum(weights * op(x, labels))))(logits)
    one = [w[0] * jax.grad(op)(x[0], y[0]) for w, x, y in zip(weights, logits, labels, strict=True)]
    close(gradient[:, 0], jnp.stack(one))
    assert op(jnp.ones((0, 5), "float32"), jnp.ones((0,), int)).shape == (0,)


def test_l2_of_a_tree():
    params = {"W": jnp.arange(6.0).reshape(2, 3), "b": [jnp.ones(2, "float32"), ()], "none": None}
    value, gradient = quickly(jax.value_and_grad(ops.l2))(params)
    close(value, 55 + 2)
    assert value.dtype == "float64" and gradient["b"][0].dtype == "float32"
    close(gradient["W"], 2 * params["W"])
    close(gradient["b"][0], [2, 2])
    close(quickly(jax.hessian(ops.l2))(jnp.ones(3)), 2 * jnp.eye(3))
    half = ops.l2({"a": jnp.ones(3, "bfloat16"), "b": jnp.ones(1, "float16")})
    assert half == 4 and half.dtype == "float32"  # as JAX promotes the two
    assert ops.l2({}) == 0 and ops.l2(jnp.ones((0, 3))) == 0
    with pytest.raises(
        TypeError, match=r"l2: argument 'params\['n'\]\[1\]' of shape \(\) has .*int"
    ):
        ops.l2({"n": [jnp.ones(2), 3]})


# ----------------------------------------------------------------------- dtypes and extremes


@dtypes
def test_stable_for_logits_of_ten_thousand(dtype):
    """The loss is the difference of logits, the gradients are those of a hard maximum."""
    x = jnp.asarray([1e4, -1e4, 0.0], dtype)
    k = float(x[0])  # what 1e4 is in this dtype

    @quickly
    def all_of(x):
        ones = jnp.asarray([1, 1, 0], x.dtype)
        return {
            "right": jax.value_and_grad(ops.softmax_cross_entropy)(x, 0),
            "wrong": jax.value_and_grad(ops.softmax_cross_entropy)(x, 1),
            "shares": jax.value_and_grad(ops.softmax_cross_entropy)(x, jnp.asarray([0, 1, 0.0])),
            "binary": jax.value_and_grad(ops.sigmoid_binary_cross_entropy)(x, ones),
            "hinge": jax.value_and_grad(ops.multiclass_hinge)(x, 1),
            "hessian": jax.hessian(ops.softmax_cross_entropy)(x, 1),
            "binary hessian": jax.hessian(ops.sigmoid_binary_cross_entropy)(x, ones),
        }

    found = all_of(x)
    wanted = {
        "right": (0, [0, 0, 0]),
        "wrong": (2 * k, [1, -1, 0]),
        "shares": (2 * k, [1, -1, 0]),
        "binary": (k + math.log(2), [0, -1, 0.5]),
        "hinge": (3 * k + 2, [1, -2, 1]),
    }
    eps = float(jnp.finfo(dtype).eps)
    for name, (value, gradient) in wanted.items():
        close(found[name][0], value, 2 * eps)
        close(found[name][1], gradient, 2 * eps)
    assert all(v.dtype == x.dtype for v in jax.tree.leaves(found))
    chex.assert_tree_all_finite(found)
    smoothed = functools.partial(ops.softmax_cross_entropy, label_smoothing=0.1)
    chex.assert_tree_all_finite(jax.value_and_grad(smoothed)(x, 0))


@dtypes
def test_finite_up_to_a_quarter_of_the_dtypes_largest(dtype):
    big = float(jnp.finfo(dtype).max) / 4
    x, tiny = jnp.asarray([big, -big, 1.0], dtype), jnp.asarray([1e-3, 0, 0], dtype)

    @quickly
    def all_of(x):
        found = []
        for loss, other in (
            (ops.softmax_cross_entropy, 1),
            (ops.softmax_cross_entropy, jnp.asarray([0.25, 0.25, 0.5], dtype)),
            (functools.partial(ops.multiclass_hinge), 0),
            (lambda x, z: ops.sigmoid_binary_cross_entropy(x[:1], z[:1]), tiny),
            (lambda x, t: ops.huber(x[:1], t[:1]), tiny),
        ):
            gradient = lambda x, loss=loss, other=other: jax.grad(loss)(x, other)
            found += [loss(x, other), gradient(x), jax.jvp(gradient, (x,), (jnp.ones_like(x),))[1]]
        return found

    chex.assert_tree_all_finite(all_of(x))


@dtypes
def test_rounding(dtype):
    """As accurate as the dtype allows, for logits around a large common number too."""
    eps = float(jnp.finfo(dtype).eps)
    x = LOGITS.astype(dtype)
    exact = ops.softmax_cross_entropy(x.astype("float64"), 3)
    close(ops.softmax_cross_entropy(x, 3), exact, 4 * eps)
    whole = jnp.asarray([0, 3, 1], dtype)
    shifted = ops.softmax_cross_entropy(whole + 64, 1)
    close(shifted, ops.softmax_cross_entropy(whole, 1), 2 * eps)
    confident = ops.sigmoid_binary_cross_entropy(jnp.asarray([8.0], dtype), jnp.ones(1, dtype))
    close(confident / math.log1p(math.exp(-8)), 1, 8 * eps)


def test_excluded_classes():
    """A logit of −inf removes a class."""
    x = jnp.asarray([0.5, -jnp.inf, 1.5])
    wanted = math.log(1 + math.exp(-1))
    for labels in (2, jnp.asarray([0.0, 0.0, 1.0])):
        value, gradient = jax.value_and_grad(ops.softmax_cross_entropy)(x, labels)
        close(value, wanted)
        close(gradient, jax.nn.softmax(x) - jnp.asarray([0, 0, 1]))


# ------------------------------------------------------------------------------ labels and kinks


@pytest.mark.parametrize("op", [ops.softmax_cross_entropy, ops.multiclass_hinge])
@pytest.mark.parametrize("label", sweep([-1, 5, -(2**31), 2**31 - 1], quick=[-1, 2**31 - 1]))
def test_labels_out_of_range_give_nan(op, label):
    y = jnp.asarray([label, 1], "int32")
    value, gradient = quickly(jax.vmap(jax.value_and_grad(op), (None, 0)))(LOGITS, y)
    assert jnp.isnan(value[0]) and jnp.all(jnp.isnan(gradient[0]))
    chex.assert_tree_all_finite((value[1], gradient[1]))


@pytest.mark.parametrize("dtype", sweep(["int8", "uint8", "int64", "uint32"], quick=["int8"]))
def test_labels_of_any_integer_dtype(dtype):
    many = jnp.zeros(300).at[200].set(1.0)  # more classes than an int8 can count
    for op in (ops.softmax_cross_entropy, ops.multiclass_hinge):
        both = quickly(jax.value_and_grad(op))
        jax.tree.map(close, both(many, jnp.asarray(3, dtype)), both(many, 3))
        assert jnp.sum(both(many, jnp.asarray(3, dtype))[1] < 0) == 1
        assert jnp.isnan(both(many, jnp.asarray(-56).astype(dtype))[0]) or dtype == "uint8"


def test_float_labels_of_another_dtype():
    x, q = LOGITS.astype("float32"), SHARES
    value, (dx, dq) = jax.value_and_grad(ops.softmax_cross_entropy, (0, 1))(x, q)
    assert (value.dtype, dx.dtype, dq.dtype) == ("float32", "float32", "float64")
    for op in (ops.sigmoid_binary_cross_entropy, ops.squared_error, ops.huber):
        dx, dt = jax.grad(op, (0, 1))(x, q)
        assert (dx.dtype, dt.dtype) == ("float32", "float64")


def test_kink_of_the_hinge():
    """A wrong score exactly one margin below the right one: no gradient, no loss."""
    scores = jnp.asarray([2.0, 1.0, 5.0])
    close(jax.grad(ops.multiclass_hinge)(scores, 0), [-1, 0, 1])
    close(quickly(jax.hessian(ops.multiclass_hinge))(scores, 0), jnp.zeros((3, 3)))


def test_huber_where_the_square_becomes_a_line():
    f = jnp.asarray([1.0, -1.0, 0.5, 3.0, 0.0])
    value, gradient = quickly(jax.value_and_grad(ops.huber))(f, jnp.zeros(5))
    close(value, 0.5 + 0.5 + 0.125 + 2.5)
    close(gradient, [1, -1, 0.5, 1, 0])
    close(quickly(jax.hessian(ops.huber))(f, jnp.zeros(5)), jnp.diag(jnp.asarray([0, 0, 1, 0, 1])))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.softmax_cross_entropy(jnp.ones((4, 3)), jnp.zeros(3, int)),
            ValueError,
            r"softmax_cross_entropy: argument 'labels' has shape \(3,\), wanted \(4,\) for integer",
        ),
        (
            lambda: ops.softmax_cross_entropy(jnp.ones(3), jnp.zeros(4)),
            ValueError,
            r"'labels' has shape \(4,\), wanted \(3,\) for distributions",
        ),
        (
            lambda: ops.softmax_cross_entropy(jnp.ones(3, int), 1),
            TypeError,
            r"softmax_cross_entropy: argument 'logits' of shape \(3,\) has dtype int64",
        ),
        (
            lambda: ops.softmax_cross_entropy(jnp.ones(3), True),
            TypeError,
            r"'labels' of shape \(\) has dtype bool, wanted integers of shape \(\) or floating",
        ),
        (
            lambda: ops.softmax_cross_entropy(1.0, 1),
            ValueError,
            r"'logits' has shape \(\), wanted \(..., classes\)",
        ),
        (
            lambda: ops.softmax_cross_entropy(jnp.ones((2, 0)), jnp.zeros(2, int)),
            ValueError,
            r"'logits' has shape \(2, 0\), wanted .* at least one class",
        ),
        (
            lambda: ops.softmax_cross_entropy(jnp.ones(3), 1, label_smoothing=1.0),
            ValueError,
            r"label_smoothing must be .* got 1.0",
        ),
        (
            lambda: ops.multiclass_hinge(jnp.ones(3), 1.0),
            TypeError,
            r"multiclass_hinge: argument 'labels' of shape \(\) has dtype float64, wanted integers",
        ),
        (
            lambda: ops.multiclass_hinge(jnp.ones((4, 3)), 1),
            ValueError,
            r"multiclass_hinge: .*'labels' has shape \(\), wanted \(4,\).*scores of shape \(4, 3\)",
        ),
        (
            lambda: ops.sigmoid_binary_cross_entropy(jnp.ones(3), jnp.ones((3, 1))),
            ValueError,
            r"sigmoid_binary_cross_entropy: argument 'labels' has shape \(3, 1\), wanted \(3,\)",
        ),
        (
            lambda: ops.squared_error(jnp.ones(3), 1.0),
            ValueError,
            r"squared_error: argument 'target' has shape \(\), wanted \(3,\)",
        ),
        (
            lambda: ops.squared_error(jnp.ones(3, int), jnp.ones(3)),
            TypeError,
            r"squared_error: argument 'prediction' of shape \(3,\) has dtype int64",
        ),
        (
            lambda: ops.squared_error(jnp.ones(3), 1j * jnp.ones(3)),
            TypeError,
            r"squared_error: argument 'target' of shape \(3,\) has dtype complex128",
        ),
        (
            lambda: ops.gaussian_nll(jnp.ones((3, 2)), jnp.ones(2)),
            ValueError,
            r"gaussian_nll: argument 'prediction' has shape \(3, 2\), wanted \(2, 2\): a mean and",
        ),
        (
            lambda: ops.gaussian_nll(jnp.ones(2), 1j),
            TypeError,
            r"gaussian_nll: argument 'target' of shape \(\) has dtype complex128",
        ),
        (
            lambda: ops.huber(1.0, 2.0, delta=0.0),
            ValueError,
            r"huber: delta must be a positive number, but got 0.0",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------------------------------- cost

PEERS = {
    "cross entropy": (
        ops.softmax_cross_entropy,
        optax.softmax_cross_entropy_with_integer_labels,
        False,
    ),
    "cross entropy of shares": (ops.softmax_cross_entropy, optax.softmax_cross_entropy, True),
    "hinge": (
        ops.multiclass_hinge,
        lambda s, y: jnp.sum(jnp.where(jnp.arange(s.size) == y, 0, jax.nn.relu(s - s[y] + 1))),
        False,
    ),
    "binary": (
        ops.sigmoid_binary_cross_entropy,
        lambda x, z: jnp.sum(optax.sigmoid_binary_cross_entropy(x, z)),
        True,
    ),
    "squared error": (ops.squared_error, lambda f, t: jnp.sum((f - t) ** 2), True),
    "huber": (ops.huber, huber, True),
    "gaussian": (
        lambda z, t: ops.gaussian_nll(z.reshape(-1, 2), t[:32]),
        lambda z, t: -jnp.sum(jax.scipy.stats.norm.logpdf(t[:32], z[::2], jnp.exp(0.5 * z[1::2]))),
        True,
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_a_training_step_costs_no_more_than_with_optax(name):
    """FLOPs, exponentials and temporary bytes of a linear classifier's step with the loss."""
    ours, peer, is_dense = PEERS[name]
    x, W = jnp.ones((32, 256), "float32"), jnp.ones((256, 64), "float32")
    labels = jnp.ones((32, 64), "float32") if is_dense else jnp.ones(32, "int32")

    def cost(loss):
        step = jax.jit(jax.value_and_grad(lambda W: jnp.mean(jax.vmap(loss)(x @ W, labels))))
        compiled = step.lower(W).compile()
        costs = compiled.cost_analysis()
        return (
            costs["flops"],
            costs.get("transcendentals", 0),
            compiled.memory_analysis().temp_size_in_bytes,
        )

    assert np.all(np.asarray(cost(ours)) <= 1.02 * np.asarray(cost(peer)) + [0, 0, 512]), (
        cost(ours),
        cost(peer),
    )
