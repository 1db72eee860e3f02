"""examples/interoperation.py: our networks in other libraries, and theirs in ours, are the same."""

import importlib.util
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import exhaustive

from fnn import ops, per_example
from fnn.layers import Linear, chain, summary

for library in ("diffrax", "equinox", "flax", "numpyro", "optimistix"):
    pytest.importorskip(library)

import equinox as eqx  # noqa: E402
from flax import nnx  # noqa: E402

X = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)))
Y = jnp.sin(X[:, :2])
NET = chain(hidden=Linear(5), activation=ops.tanh, output=Linear(2))
PARAMS = NET.init(jax.random.key(0), X[0])


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parent.parent / "examples" / "interoperation.py"
    spec = importlib.util.spec_from_file_location("interoperation", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def squared(net, params):
    return jnp.mean((jax.vmap(net, (None, 0))(params, X) - Y) ** 2)


WANTED = jax.grad(lambda p: squared(NET, p))(PARAMS)


def test_inside_an_equinox_module(example):
    module = example.InEquinox(NET, X[0], key=jax.random.key(0))
    loss = lambda module: jnp.mean((jax.vmap(module)(X) - Y) ** 2)
    value, grads = eqx.filter_jit(eqx.filter_value_and_grad(loss))(module)
    np.testing.assert_allclose(value, squared(NET, PARAMS), rtol=1e-6)
    chex.assert_trees_all_close(grads.params, WANTED, rtol=1e-6)


def test_inside_an_nnx_module(example):
    module = example.InNNX(NET, X[0], rngs=nnx.Rngs(0))
    loss = lambda module: jnp.mean((jax.vmap(module)(X) - Y) ** 2)
    value, grads = nnx.jit(nnx.value_and_grad(loss))(module)
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))["params"]
    np.testing.assert_allclose(value, squared(NET, params), rtol=1e-6)
    want = jax.grad(lambda p: squared(NET, p))(params)
    chex.assert_trees_all_close(nnx.to_pure_dict(grads)["params"], want, rtol=1e-6)


@exhaustive
def test_their_modules_as_layers(example):
    net = chain(
        first=example.OfEquinox(lambda key: eqx.nn.Linear(3, 5, key=key)),
        activation=ops.tanh,
        second=example.OfNNX(lambda rngs: nnx.Linear(5, 2, rngs=rngs)),
    )
    params = jax.jit(net.init)(jax.random.key(0), X[0])
    equinox, flax = params["first"]["weights"], params["second"]["weights"]
    ours = {
        "hidden": {"W": equinox.weight, "b": equinox.bias},
        "output": {"W": flax["kernel"].T, "b": flax["bias"]},
    }
    np.testing.assert_allclose(net(params, X[0]), NET(ours, X[0]), rtol=1e-6)
    got = jax.grad(lambda p: squared(net, p))(params)
    want = jax.grad(lambda p: squared(NET, p))(ours)
    np.testing.assert_allclose(got["first"]["weights"].weight, want["hidden"]["W"], rtol=1e-6)
    np.testing.assert_allclose(got["second"]["weights"]["kernel"].T, want["output"]["W"], rtol=1e-6)
    assert summary(net, X[0]).parameters == summary(NET, X[0]).parameters
    _, factored = per_example.grads(lambda p, x: jnp.sum(net(p, x) ** 2))(params, X)
    one_by_one = jax.vmap(jax.grad(lambda p, x: jnp.sum(net(p, x) ** 2)), (None, 0))(params, X)
    squares = [jnp.sum(g.reshape(len(X), -1) ** 2, axis=1) for g in jax.tree.leaves(one_by_one)]
    np.testing.assert_allclose(per_example.norms(factored) ** 2, sum(squares), rtol=1e-6)


@exhaustive
def test_a_vector_field_of_diffrax(example):
    """dy/dt = W y is solved by the exponential of a matrix."""
    field, y = Linear(2, use_bias=False), jnp.array([1.0, -2.0])
    params = {"W": jnp.array([[0.0, 1.0], [-1.0, 0.2]])}
    got = jax.jit(jax.value_and_grad(lambda p: example.diffrax_field(field, p, y, 0.7)[0]))
    want = jax.value_and_grad(lambda p: (jax.scipy.linalg.expm(0.7 * p["W"]) @ y)[0])
    chex.assert_trees_all_close(got(params), want(params), rtol=1e-4)


def test_least_squares_of_optimistix(example):
    params = Linear(2).init(jax.random.key(0), X[0])
    params, residuals = example.optimistix_fit(Linear(2), params, X, Y)
    with_one = np.column_stack([X, np.ones(len(X))])
    want, *_ = np.linalg.lstsq(with_one, Y, rcond=None)
    np.testing.assert_allclose(np.column_stack([params["W"], params["b"]]).T, want, atol=1e-4)
    np.testing.assert_allclose(residuals, with_one @ want - Y, atol=1e-4)


NOISE = 0.5


def posterior_of_a_line():
    """Mean and deviation of a linear model's weights; Bishop, equations 3.50 and 3.51."""
    with_one = np.column_stack([X, np.ones(len(X))])
    covariance = np.linalg.inv(np.eye(4) + with_one.T @ with_one / NOISE**2)
    mean = covariance @ with_one.T @ np.asarray(Y[:, :1]) / NOISE**2
    return mean[:, 0], np.sqrt(np.diag(covariance))


def is_posterior(samples, errors):
    flat = np.column_stack([samples["W"][:, 0], samples["b"]])
    mean, deviation = posterior_of_a_line()
    np.testing.assert_allclose((flat.mean(axis=0) - mean) / deviation, 0, atol=errors)
    np.testing.assert_allclose(flat.std(axis=0) / deviation, 1, atol=errors)


@exhaustive
def test_a_likelihood_of_numpyro(example):
    is_posterior(example.numpyro_posterior(Linear(1), X, Y[:, :1], NOISE, 2000), errors=0.15)


def test_a_sampler_of_flat_vectors(example):
    def loss(params):
        errors = jax.vmap(Linear(1), (None, 0))(params, X) - Y[:, :1]
        prior = sum(jnp.sum(w**2) for w in jax.tree.leaves(params)) / 2
        return jnp.sum(errors**2) / (2 * NOISE**2) + prior

    start = Linear(1).init(jax.random.key(0), X[0])
    draw = lambda key: example.langevin(loss, start, key, step=0.01, samples=20_000)
    is_posterior(jax.jit(draw)(jax.random.key(1)), errors=0.15)
