"""Sums over more entries than a 16-bit float counts: as in float64, rounded once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from sweeps import exhaustive, sweep

import fnn
from fnn import ops, per_example

MANY = 70_000  # float16's largest number is 65,504; bfloat16 doesn't count beyond 256

dtypes = pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])


def scores(dtype):
    return jnp.asarray(np.random.default_rng(0).normal(size=MANY) / 4, dtype)


FUNCTIONS = {
    "softmax": (ops.softmax, jax.nn.softmax),
    "log_softmax": (ops.log_softmax, jax.nn.log_softmax),
    "logsumexp": (ops.logsumexp, jax.nn.logsumexp),
    "softmax_cross_entropy": (
        lambda x: ops.softmax_cross_entropy(x, jnp.asarray(3)),
        lambda x: -jax.nn.log_softmax(x)[3],
    ),
    "label smoothing": (
        lambda x: ops.softmax_cross_entropy(x, jnp.asarray(3), label_smoothing=0.1),
        lambda x: -0.9 * jax.nn.log_softmax(x)[3] - 0.1 * jnp.mean(jax.nn.log_softmax(x)),
    ),
    "a distribution": (
        lambda x: ops.softmax_cross_entropy(x, jax.nn.one_hot(3, MANY, dtype=x.dtype)),
        lambda x: -jax.nn.log_softmax(x)[3],
    ),
    "multiclass_hinge": (
        lambda x: ops.multiclass_hinge(x, jnp.asarray(3), margin=0.125),
        lambda x: jnp.sum(jnp.maximum(x - x[3] + 0.125, 0).at[3].set(0)),
    ),
    "sigmoid_binary_cross_entropy": (
        lambda x: ops.sigmoid_binary_cross_entropy(x, jnp.ones(MANY)),
        lambda x: -jnp.sum(jax.nn.log_sigmoid(x)),
    ),
    "squared_error": (
        lambda x: ops.squared_error(x, jnp.zeros_like(x)),
        lambda x: jnp.sum(x**2),
    ),
    "squares too small for float16": (
        lambda x: ops.squared_error(x / 2048, jnp.zeros_like(x)),
        lambda x: jnp.sum((x / 2048) ** 2),
    ),
    "huber": (
        lambda x: ops.huber(x / 2048, jnp.zeros_like(x)),
        lambda x: jnp.sum((x / 2048) ** 2) / 2,
    ),
    "l2": (lambda x: ops.l2([x / 2048, x]), lambda x: jnp.sum((x / 2048) ** 2) + jnp.sum(x**2)),
    "gaussian_nll": (
        lambda x: ops.gaussian_nll(jnp.stack([x, x], -1)[::3], jnp.zeros_like(x)[::3]),
        lambda x: jnp.sum((x + x * x * jnp.exp(-x) + np.log(2 * np.pi))[::3]) / 2,
    ),
    "layer_norm": (
        lambda x: ops.layer_norm(x),
        lambda x: (x - jnp.mean(x)) / jnp.sqrt(jnp.var(x) + 1e-5),
    ),
    "rms_norm": (
        lambda x: ops.rms_norm(x * 256),
        lambda x: x * 256 / jnp.sqrt(jnp.mean((x * 256) ** 2) + 1e-6),
    ),
    "group_norm": (
        lambda x: ops.group_norm(x.reshape(-1, 2), groups=1),
        lambda x: ((x - jnp.mean(x)) / jnp.sqrt(jnp.var(x) + 1e-5)).reshape(-1, 2),
    ),
    "batch_norm": (
        lambda x: ops.batch_norm(x[:, None])[0],
        lambda x: ((x - jnp.mean(x)) / jnp.sqrt(jnp.var(x) + 1e-5))[:, None],
    ),
    "poisson_nll": (
        lambda x: ops.poisson_nll(x[::2], jnp.ones(MANY // 2)),
        lambda x: jnp.sum((jnp.exp(x) - x)[::2]),
    ),
    "pinball": (
        lambda x: ops.pinball(x, jnp.zeros_like(x), quantile=0.25),
        lambda x: jnp.sum(jnp.maximum(-x / 4, 3 * x / 4)),
    ),
    "sigmoid_focal": (
        lambda x: ops.sigmoid_focal(x, jnp.ones(MANY)),
        lambda x: -jnp.sum(jax.nn.sigmoid(-x) ** 2 * jax.nn.log_sigmoid(x)),
    ),
    "cosine_similarity": (
        lambda x: ops.cosine_similarity(x, x[::-1]),
        lambda x: x @ x[::-1] / (x @ x),
    ),
    "maxout": (
        lambda x: ops.maxout(jnp.round(x * 0), axis=0),
        None,  # the gradient is shared by all
    ),
}


QUICK = ["softmax", "softmax_cross_entropy", "multiclass_hinge", "squares too small for float16"]
QUICK += ["gaussian_nll", "maxout"]


@pytest.mark.parametrize("dtype", sweep(["float16", "bfloat16"], ["float16"]))
@pytest.mark.parametrize("name", sweep(FUNCTIONS, QUICK))
def test_many_entries(name, dtype):
    ours, plain = FUNCTIONS[name]
    x = scores(dtype)
    exact = x.astype(jnp.float64)
    if plain is None:
        _, pull = jax.vjp(lambda z: ops.maxout(z, axis=0), jnp.zeros(MANY, dtype))
        np.testing.assert_allclose(pull(jnp.ones((), dtype))[0], 1 / MANY, rtol=1e-2)
        return
    value, wanted = jax.jit(ours)(x), jax.jit(plain)(exact)
    eps = float(jnp.finfo(dtype).eps)
    least = float(jnp.finfo(dtype).smallest_subnormal)
    assert value.dtype == dtype
    np.testing.assert_allclose(np.asarray(value, np.float64), wanted, rtol=2 * eps, atol=least)
    # A gradient from what flows in from above: ones would cancel in a softmax.
    weights = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1, value.shape), dtype)
    pull = lambda f, x, w: jax.jit(lambda x, w: jax.vjp(f, x)[1](w)[0])(x, w)
    grad, wanted = pull(ours, x, weights), pull(plain, exact, weights.astype(jnp.float64))
    assert grad.dtype == dtype and jnp.all(jnp.isfinite(grad))
    close = {"rtol": 8 * eps, "atol": 2 * least + 8 * eps * float(jnp.max(jnp.abs(wanted)))}
    np.testing.assert_allclose(np.asarray(grad, np.float64), wanted, **close)
    push = lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x * 0 + 1 / 64,))[1])(x)
    moved, wanted = push(ours, x), push(plain, exact)
    close["atol"] = 64 * eps * max(1, float(jnp.max(jnp.abs(wanted))))
    np.testing.assert_allclose(np.asarray(moved, np.float64), wanted, **close)


@dtypes
def test_large_cotangents(dtype):
    """Their sum overflows float16, what is made of it doesn't."""
    x = scores(dtype)
    _, pull = jax.vjp(ops.log_softmax, x)
    g = np.asarray(pull(jnp.full(MANY, 8, dtype))[0], np.float64)
    p = np.asarray(jax.nn.softmax(x.astype(jnp.float64)))
    assert np.all(np.isfinite(g))
    np.testing.assert_allclose(g, 8 - p * 8 * MANY, atol=0.05 * np.max(p * 8 * MANY))


def test_two_large_numbers():
    """Each is a float16, twice their difference isn't; scaled down, the gradient is again."""
    f = lambda x: ops.squared_error(x, jnp.zeros_like(x))
    _, pull = jax.vjp(f, jnp.asarray([40_000.0], jnp.float16))
    assert pull(jnp.asarray(2**-10, jnp.float16))[0] == 2 * 40_000 / 2**10
    margins = ops.multiclass_hinge(jnp.asarray([-6e4, -6e4], jnp.float16), 0, margin=1e4)
    assert margins == jnp.float16(1e4)


@exhaustive
def test_the_mean_of_gradients_whose_sum_float16_has_not():
    """Of factors, of looked-up rows, of a kernel and of a dense bias."""
    ones = {"W": (2, 3), "E": (4, 2), "K": (2, 1, 2, 2), "b": (2,)}
    params = {name: jnp.ones(shape, jnp.float16) for name, shape in ones.items()}

    def loss(p, example):
        x, word = example
        h = jnp.sum(ops.convolution(x[:, :, None], p["K"], padding="valid"), (0, 1))
        y = p["W"] @ x[:, 0] + p["E"][word] + h + p["b"] * p["b"]
        return jnp.dot(jnp.full(2, 500, y.dtype), y)

    x = jnp.ones((256, 3, 3), jnp.float16), jnp.full(256, 1)
    found = per_example.mean(per_example.grads(loss)(params, x)[1])
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    exact = jax.grad(loss)(wide, (x[0][0].astype(jnp.float32), x[1][0]))
    jax.tree.map(np.testing.assert_array_equal, found, exact)
    assert all(g.dtype == jnp.float16 for g in jax.tree.leaves(found))


WIDE = {
    "rsqrt": lax.rsqrt,
    "cbrt": lax.cbrt,
    "atan": lax.atan,
    "asinh": lax.asinh,
    "acosh": lax.acosh,
    "reciprocal": lambda x: x**-1,
}


@pytest.mark.parametrize("name", WIDE)
def test_local_gradients_that_float16_has_whose_squares_it_has_not(name):
    f = WIDE[name]
    x = np.logspace(0.01 if name == "acosh" else -7.2, 4.8, 60).astype("float16")
    truth = jax.vmap(jax.grad(f))(x.astype("float64")).astype("float16")
    found = jax.vmap(fnn.grad(f))(jnp.asarray(x))
    assert found.dtype == "float16"
    np.testing.assert_allclose(found, truth, rtol=1e-2, atol=1e-6)


def test_atan2_of_numbers_whose_squares_float16_has_not():
    sizes = np.array([1e-4, 1e-2, 1.0, 300.0, 6e4], "float16")
    y, x = (a.ravel() for a in np.meshgrid(sizes, sizes))
    for k in (0, 1):
        truth = jax.vmap(jax.grad(lax.atan2, k))(y.astype("float64"), x.astype("float64"))
        found = jax.vmap(fnn.grad(lax.atan2, k))(jnp.asarray(y), jnp.asarray(x))
        np.testing.assert_allclose(found, truth.astype("float16"), rtol=1e-2, atol=1e-6)
