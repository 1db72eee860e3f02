"""Sums in at least float32, and numbers of several dtypes together, however strict promotion is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import exhaustive

from fnn import curvature, models, ops, per_example
from fnn.layers import LRU, LSTM, Linear, adapters, chain
from fnn.precision import wide, wide_dtype, wide_together, widest

NET = chain(hidden=Linear(5), tanh=ops.tanh, out=Linear(3))
X = np.random.default_rng(0).normal(size=(4, 6))
Y = np.arange(4) % 3
KEY = jax.random.key(0)


def predict(params, x):
    hidden, out = params["hidden"], params["out"]
    h = ops.tanh(hidden["W"] @ x.astype(hidden["W"].dtype) + hidden["b"])
    return out["W"] @ h.astype(out["W"].dtype) + out["b"]


def loss(params, example):
    x, y = example
    return ops.softmax_cross_entropy(predict(params, x), y)


def test_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        for narrow in ("bfloat16", "float16", "float8_e4m3fn", "int32", "bool"):
            assert wide_dtype(jnp.dtype(narrow)) == jnp.float32
        for kept in ("float32", "float64", "complex64", "complex128"):
            assert wide_dtype(jnp.dtype(kept)) == kept
        assert widest(jnp.bfloat16, jnp.float16) == jnp.float32
        assert widest(jnp.float64, jnp.complex64) == jnp.complex128
        assert wide(jnp.ones(70_000, jnp.float16)).sum() == 70_000
        both = wide_together(jnp.ones(1, jnp.bfloat16), jnp.ones(1, jnp.float64))
        assert [x.dtype for x in both] == [jnp.float64] * 2


def params_of(kind):
    params = NET.init(KEY, X[0].astype(np.float32))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return narrow if kind == "bfloat16" else params | {"hidden": narrow["hidden"]}


def per_example_quantities(params):
    losses, g = per_example.grads(loss)(params, (X, Y))
    yield "norms", per_example.norms(g)
    yield "gram", per_example.gram(g)
    yield "variance", per_example.variance(g)
    yield "sum of two", per_example.norms(per_example.add(g, g))
    yield "noise scale", per_example.noise_scale(g)
    clipped = per_example.clipped_grad(loss, 0.1, noise_multiplier=1.0)
    yield "clipped", clipped(params, (X, Y), noise_key=KEY)


def curvature_quantities(params):
    of_output = ops.softmax_cross_entropy
    for name in ("ggn_diagonal", "ggn_trace", "ggn_gram", "kronecker_factors"):
        yield name, getattr(curvature, name)(predict, of_output)(params, (X, Y))
    optimizer = curvature.kfac(predict, of_output, (X, Y), learning_rate=0.1)
    g = jax.grad(lambda p: jnp.mean(jax.vmap(loss, (None, 0))(p, (X, Y))))(params)
    yield "kfac", optimizer.update(g, optimizer.init(params), params, batch=(X, Y))[0]


@pytest.mark.parametrize("quantities", [per_example_quantities, curvature_quantities])
@pytest.mark.parametrize("kind", ["mixed", pytest.param("bfloat16", marks=exhaustive)])
def test_strict_promotion_changes_no_quantity(kind, quantities):
    assert_same(lambda params: dict(quantities(params)), params_of(kind))


def assert_same(function, *args):
    """Of functions traced alone: that is when JAX's promotion refuses, and it decides on types."""
    wanted = jax.eval_shape(lambda *args: function(*args), *args)
    with jax.numpy_dtype_promotion("strict"):
        found = jax.eval_shape(lambda *args: function(*args), *args)
    assert jax.tree.leaves(found) == jax.tree.leaves(wanted)


def network_values():
    """Of layers and models that join dtypes, with parameters of 16 bits."""
    narrow = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    x = jnp.asarray(np.random.default_rng(1).random((7, 6)), jnp.bfloat16)
    for layer in (LRU(4), LSTM(5)):
        params = narrow(layer.init(KEY, x))
        yield jax.value_and_grad(lambda p, layer=layer: wide(layer(p, x)).sum())(params)
    vae = models.vae((7, 6), 2, 5)
    params = narrow(vae.init(KEY, x))
    yield jax.value_and_grad(lambda p: models.negative_elbo(vae(p, x), x))(params)
    A = {"W": {"A": jnp.ones((2, 6)), "B": jnp.ones((5, 2))}}
    yield adapters.merge({"W": jnp.ones((5, 6), jnp.bfloat16)}, A)
    gpt = models.gpt2(vocabulary=11, length=12, features=8, heads=2, depth=1, dropout=0.0)
    tokens = jnp.arange(4)
    options = {"temperature": 0.7, "top_p": 0.8}
    yield models.generate(gpt, narrow(gpt.init(KEY, tokens)), tokens, 5, KEY, **options)


@exhaustive
def test_strict_promotion_changes_no_network():
    assert_same(lambda: list(network_values()))
