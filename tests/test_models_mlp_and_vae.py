"""`mlp` and `vae` against their formulas; the VAE's bound, its gradients and its training."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import exhaustive

import fnn
from fnn import models
from fnn.layers import BatchNorm, LayerError, LayerNorm, training

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).uniform(size=(7, 4, 3)))


def linear(p, x):
    return p["W"] @ x + p["b"]


def gradients(loss, params, batch):
    """Of the examples: factored, and formed from the factors."""

    @jax.jit
    def of(params, batch):
        grads = fnn.per_example.grads(loss)(params, batch)[1]
        return grads, fnn.per_example.materialize(grads)

    return of(params, batch)


def test_mlp():
    net = models.mlp(3, (6, 5))
    params = net.init(KEY, X[0])
    assert list(params) == ["hidden0", "hidden1", "output"]
    h = jax.nn.relu(linear(params["hidden0"], X[0].ravel()))
    wanted = linear(params["output"], jax.nn.relu(linear(params["hidden1"], h)))
    np.testing.assert_allclose(net(params, X[0]), wanted, rtol=1e-9)
    assert models.mlp(3).init(KEY, X[0])["hidden1"]["W"].shape == (100, 300)
    linear_alone = models.mlp(3, ())
    assert list(linear_alone.init(KEY, X[0])) == ["output"]
    normed = models.mlp(3, (6,), norm=BatchNorm(), dropout=0.5)
    assert set(normed.init(KEY, X[0])) == {"hidden0", "norm0", "output"}
    assert normed.init_state(X[0])["statistics"]["norm0"]["mean"].shape == (6,)
    with pytest.raises(TypeError, match="mlp: hidden must be a sequence of widths, but got 300"):
        models.mlp(3, 300)
    with pytest.raises(ValueError, match="mlp: hidden must be an integer of at least 1, but got 0"):
        models.mlp(3, (5, 0))


def test_gradients_of_examples_of_an_mlp():
    net = models.mlp(3, (8, 8), norm=LayerNorm(), activation=jnp.tanh)
    params = net.init(KEY, X[0])
    loss = lambda p, x: fnn.ops.softmax_cross_entropy(net(p, x), 1)
    grads, formed = gradients(loss, params, X)
    wanted = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, X)
    chex.assert_trees_all_close(formed, wanted, rtol=1e-9, atol=1e-12)
    text = str(fnn.per_example.explain(grads))
    assert len(re.findall(r"\['W'\] .*gradient is Gᵀ A", text)) == 3


MODEL = models.vae((4, 3), latent=2, hidden=8)


@exhaustive
def test_vae_is_its_formula():
    params = MODEL.init(KEY, X[0])
    assert models.vae((4, 3)).init(KEY, X[0])["mean"]["W"].shape == (20, 500)
    h = jnp.tanh(linear(params["encode"]["hidden"], X[0].ravel()))
    mean, s = linear(params["mean"], h), linear(params["log_variance"], h)

    def logits(z):
        h = jnp.tanh(linear(params["decode"]["hidden"], z))
        return linear(params["decode"]["output"], h).reshape(4, 3)

    found = MODEL(params, X[0])
    chex.assert_trees_all_close(tuple(found), (logits(mean), mean, s), rtol=1e-9)
    np.testing.assert_allclose(
        models.decode(MODEL, params, mean), jax.nn.sigmoid(found.logits), rtol=1e-9
    )
    # In training z is drawn from the normal distribution.
    draw = lambda key: MODEL(params, X[0], mode=training(key)).logits
    keys = jax.random.split(KEY, 3000)
    drawn = jax.jit(jax.vmap(draw))(keys)
    epsilon = jax.random.normal(jax.random.key(1), (3000, 2))
    wanted = jax.vmap(logits)(mean + jnp.exp(s / 2) * epsilon)
    np.testing.assert_allclose(drawn.mean(0), wanted.mean(0), atol=0.1)
    np.testing.assert_allclose(drawn.std(0), wanted.std(0), atol=0.1)
    p = jnp.clip(jax.nn.sigmoid(found.logits), 1e-12)
    error = -jnp.sum(X[0] * jnp.log(p) + (1 - X[0]) * jnp.log(1 - p))
    kl = jnp.sum(0.5 * (mean**2 + jnp.exp(s) - 1 - s))
    np.testing.assert_allclose(models.negative_elbo(found, X[0]), error + kl, rtol=1e-9)
    np.testing.assert_allclose(
        models.negative_elbo(found, X[0], beta=3.0), error + 3 * kl, rtol=1e-9
    )
    with jax.numpy_dtype_promotion("strict"):
        found = models.negative_elbo(found, X[0], beta=jnp.float16(3))
    np.testing.assert_allclose(found, error + 3 * kl, rtol=1e-9)


@exhaustive
def test_gradients_of_examples_of_a_vae():
    params, keys = MODEL.init(KEY, X[0]), jax.random.split(KEY, 7)

    def loss(p, example):
        x, key = example
        return models.negative_elbo(MODEL(p, x, mode=training(key)), x)

    grads, formed = gradients(loss, params, (X, keys))
    wanted = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, (X, keys))
    chex.assert_trees_all_close(formed, wanted, rtol=1e-9, atol=1e-12)
    text = str(fnn.per_example.explain(grads))
    assert len(re.findall(r"\['W'\] .*gradient is Gᵀ A", text)) == 4 + 1 - ("its factors" in text)


@exhaustive
def test_training_a_vae_finds_the_latent_of_its_data():
    """Bars at one of four places: two bits, which z must tell."""
    images = np.repeat(np.eye(4)[:, :, None], 3, 2)
    data = images[np.random.default_rng(0).integers(0, 4, 64)]
    loss = fnn.supervised(MODEL, models.negative_elbo)
    options = {"epochs": 150, "batch_size": 64, "key": KEY, "progress": False}
    start = MODEL.init(KEY, data[0])
    result = fnn.fit(loss, start, (data, data), optax.adam(0.02), **options)
    # Each image has probability 1/4: no model's loss is below log 4 nats; one that sees none, 6.7.
    assert np.log(4) < result.history["loss"][-1] < 3
    means = jax.vmap(lambda x: models.decode(MODEL, result.params, MODEL(result.params, x).mean))
    np.testing.assert_allclose(means(images), images, atol=0.2)


def test_errors():
    params = MODEL.init(KEY, X[0])
    with pytest.raises(LayerError, match=r"^encode.flatten: wants an input of shape \(4, 3\)"):
        MODEL(params, X)
    with pytest.raises(LayerError, match=r"^sample: draws z in training"):
        MODEL(params, X[0], mode=training(None))
    with pytest.raises(TypeError, match="vae: shape must be an example's shape, but got 12"):
        models.vae(12)
    with pytest.raises(ValueError, match="vae: latent must be"):
        models.vae((4,), latent=0)
    with pytest.raises(TypeError, match="vae: hidden must be"):
        models.vae((4,), hidden="a")
    with pytest.raises(ValueError, match=r"negative_elbo: argument 'x' has shape .*\(4, 3\)"):
        models.negative_elbo(MODEL(params, X[0]), X)
    with pytest.raises(TypeError, match="decode: model must be made by vae"):
        models.decode(models.mlp(3), params, jnp.ones(2))
    for other, got in ((params["decode"], r"\['hidden', 'output'\]"), (None, "None")):
        with pytest.raises(LayerError, match=f"decode wants .* key 'decode', but got {got}"):
            models.decode(MODEL, other, jnp.ones(2))
