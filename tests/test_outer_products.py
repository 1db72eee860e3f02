"""Sums of outer products become matrix products, and nothing else does."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import exhaustive, sweep

import fnn
from fnn.operation.outer_products import with_matrix_products


def normal(*shape, dtype="float64"):
    x = np.random.default_rng(sum(shape)).standard_normal(shape)
    return jnp.asarray(x + 1j * x[::-1] if "complex" in dtype else x, dtype)


def primitives(function, *args) -> list[str]:
    return [eqn.primitive.name for eqn in jax.make_jaxpr(function)(*args).eqns]


X, Y = normal(5, 2), normal(5, 3)
XS, YS = normal(4, 5, 2), normal(4, 5, 3)

PRODUCTS = {
    "over the batch": (lambda x, y: jnp.sum(x[:, :, None] * y[:, None, :], 0), X, Y),
    "the other way round": (lambda x, y: jnp.sum(x[:, None, :] * y[:, :, None], 0), X, Y),
    "over two batches": (lambda x, y: jnp.sum(x[..., None] * y[..., None, :], (0, 1)), XS, YS),
    "over one of two": (lambda x, y: jnp.sum(x[..., None] * y[..., None, :], 1), XS, YS),
    "over the last": (lambda x, y: jnp.sum(x[:, None] * y[None, :, :2], 2), X, Y),
    "an axis of size one": (
        lambda x, y: jnp.sum(x[:, :, None, None] * y[:, None, :, None], 0),
        X,
        Y,
    ),
    "matrices with vectors": (lambda x, y: jnp.sum(x[..., None] * y[0, :, None, :], 1), XS, YS),
}

OTHERS = {
    "weights": (lambda x, y: jnp.sum(x * y[:, :1], 0), X, Y),
    "a product without a sum": (lambda x, y: x[:, :, None] * y[:, None, :], X, Y),
    "a sum over one's own axis": (
        lambda x, y: jnp.sum(x[:, :, None] * y[:, None, :], (0, 1)),
        X,
        Y,
    ),
    "integers": (lambda x, y: jnp.sum((x > 0)[:, :, None] * (y > 0)[:, None, :] * 1, 0), X, Y),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", sweep(["float32", "bfloat16", "complex128"], ["bfloat16"]))
def test_a_sum_of_outer_products(name, dtype):
    function, *args = PRODUCTS[name]
    args = [normal(*a.shape, dtype=dtype) for a in args]
    found, wanted = with_matrix_products(function)(*args), function(*args)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2, "complex128": 1e-12}[dtype]
    f64 = lambda a: np.asarray(a, complex)
    np.testing.assert_allclose(f64(found), f64(wanted), rtol=tolerance, atol=tolerance)
    names = primitives(with_matrix_products(function), *args)
    assert "dot_general" in names and "reduce_sum" not in names and "mul" not in names[:-1]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_none_stays_as_it_is(name):
    function, *args = OTHERS[name]
    np.testing.assert_array_equal(with_matrix_products(function)(*args), function(*args))
    assert "dot_general" not in primitives(with_matrix_products(function), *args)


def test_what_else_uses_the_large_product_still_gets_it():
    def function(x, y):
        outer = x[:, :, None] * y[:, None, :]
        return jnp.sum(outer, axis=0), jnp.max(outer)

    chex.assert_trees_all_close(with_matrix_products(function)(X, Y), function(X, Y), rtol=1e-7)


@fnn.rule
def linear(W, x):
    return W @ x


@linear.backward
def _(residuals, g):
    W, x = residuals
    return g[:, None] * x, W.T @ g


@exhaustive
@pytest.mark.parametrize("depth", sweep([1, 2, 3], quick=[2]))
def test_the_gradient_of_shared_weights_is_a_matrix_product(depth):
    W, x = normal(3, 7), normal(2, 4, 5, 7)[(0,) * (3 - depth)]

    def f(op):
        for _ in range(depth):
            op = jax.vmap(op, (None, 0))
        return lambda W: jnp.sum(op(W, x) ** 2)

    ours, plain = f(linear), f(linear.definition)
    np.testing.assert_allclose(jax.grad(ours)(W), jax.grad(plain)(W), rtol=1e-12)
    np.testing.assert_allclose(jax.hessian(ours)(W), jax.hessian(plain)(W), rtol=1e-12, atol=1e-12)
    largest = max(
        v.aval.size for eqn in jax.make_jaxpr(jax.grad(ours))(W).eqns for v in eqn.outvars
    )
    assert largest <= max(x.size, W.size)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrix_products_are_summed_in_the_sums_precision(dtype):
    """Each product fits into 16 bits; their sum, in float32, doesn't."""

    def summed(x, y):
        products = jax.lax.dot_general(x, y, (([1], [1]), ([0], [0])))
        return jnp.sum(products.astype("float32"), 0)

    x, y = jnp.full((300, 2, 3), 25, dtype), jnp.full((300, 2, 4), 25, dtype)
    assert "reduce_sum" not in primitives(with_matrix_products(summed), x, y)
    with jax.numpy_dtype_promotion("strict"):
        found = with_matrix_products(summed)(x, y)
    assert found.dtype == "float32"
    np.testing.assert_array_equal(found, np.full((3, 4), 300 * 2 * 25.0**2))
