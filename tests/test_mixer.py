"""`MLP` and `MixerBlock` against their formulas."""

import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import exhaustive

import fnn
from fnn import ops
from fnn.layers import MLP, LayerError, MixerBlock, chain, repeat, training

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)))
shapes = lambda params: jax.tree.map(jnp.shape, params)


def by_hand(p, x):
    h = jax.nn.gelu(x @ p["hidden"]["W"].T + p["hidden"]["b"])
    return h @ p["output"]["W"].T + p["output"]["b"]


def norm(p, x):
    deviation = np.sqrt(np.var(x, -1, keepdims=True) + 1e-5)
    return p["scale"] * (x - np.mean(x, -1, keepdims=True)) / deviation + p["bias"]


def gradients(loss, params, batch):
    """Of the examples: factored, and formed from the factors."""

    @jax.jit
    def of(params, batch):
        grads = fnn.per_example.grads(loss)(params, batch)[1]
        return grads, fnn.per_example.materialize(grads)

    return of(params, batch)


@exhaustive
def test_mlp():
    layer = MLP(8)
    params = layer.init(KEY, X)
    wanted = {"hidden": {"W": (8, 6), "b": (8,)}, "output": {"W": (6, 8), "b": (6,)}}
    assert shapes(params) == wanted
    np.testing.assert_allclose(layer(params, X), by_hand(params, X), rtol=1e-9)
    narrow = MLP(8, 2, activation=jnp.tanh, use_bias=False)
    params = narrow.init(KEY, X[0])
    y = params["output"]["W"] @ jnp.tanh(params["hidden"]["W"] @ X[0])
    np.testing.assert_allclose(narrow(params, X[0]), y, rtol=1e-9)
    assert repr(narrow) == "MLP(8, 2, activation=tanh, use_bias=False)"
    assert pickle.loads(pickle.dumps(layer)) == layer == MLP(8, activation=ops.gelu)
    with pytest.raises(LayerError, match=r"^hidden: Linear\(8.*\) has a W of shape \(8, 6\)"):
        narrow(params, X[0, :4])


@exhaustive
def test_mixer_block():
    layer = MixerBlock(7, 8)
    params = layer.init(KEY, X)
    assert shapes(params["tokens"]["hidden"]) == {"W": (7, 5), "b": (7,)}
    assert shapes(params["channels"]["output"]) == {"W": (6, 8), "b": (6,)}
    u = X + by_hand(params["tokens"], norm(params["norm_tokens"], X).T).T
    wanted = u + by_hand(params["channels"], norm(params["norm_channels"], u))
    np.testing.assert_allclose(layer(params, X), wanted, rtol=1e-9)
    blocks = repeat(MixerBlock(7, 8, dropout=0.5), 3)
    params = jax.jit(blocks.init)(KEY, X)
    run = jax.jit(lambda key: blocks(params, X, mode=training(key)))
    y, other = run(KEY), run(jax.random.key(1))
    assert y.shape == X.shape and not np.allclose(y, other)
    assert "MixerBlock" in str(fnn.layers.summary(chain(mix=layer, out=MLP(4)), X))
    with pytest.raises(LayerError, match=r"MixerBlock\(7, 8\) wants .*\(patches, channels\)"):
        layer.init(KEY, X[0])


@exhaustive
def test_gradients_of_examples():
    layer = MixerBlock(12, 12)
    batch = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 3)))
    params = layer.init(KEY, batch[0])
    loss = lambda p, x: jnp.sum(jnp.sin(layer(p, x)))
    grads, formed = gradients(loss, params, batch)
    wanted = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
    chex.assert_trees_all_close(formed, wanted, rtol=1e-9, atol=1e-12)
    text = str(fnn.per_example.explain(grads))
    # Of the MLP across channels the patches are positions: two, whose factors are fewer numbers
    # than the gradient. Of the one across patches, the three channels: more numbers.
    assert re.search(r"\['channels'\]\['hidden'\]\['W'\] .*gradient is Gᵀ A", text), text
    assert re.search(r"\['tokens'\]\['hidden'\]\['W'\] .*its factors hold 42 numbers", text), text
