"""Convolutional layers, pools and upsampling: against formulas, Flax and PyTorch's shapes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from sweeps import exhaustive, sweep

import fnn
from fnn import ops
from fnn.layers import (
    AdaptiveAveragePool,
    AdaptiveMaxPool,
    AveragePool,
    Conv,
    ConvTranspose,
    GlobalAveragePool,
    GlobalMaxPool,
    LayerError,
    MaxPool,
    PixelShuffle,
    SqueezeExcite,
    Upsample,
    chain,
    summary,
)

KEY = jax.random.key(0)
R = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@exhaustive
def test_conv_is_flaxs():
    x = R(0, 2, 7, 6, 4)
    for options, theirs in [
        ({}, {}),
        ({"stride": (2, 1), "groups": 2}, {"strides": (2, 1), "feature_group_count": 2}),
        ({"padding": "circular", "dilation": 2}, {"padding": "CIRCULAR", "kernel_dilation": 2}),
        ({"padding": ((1, 0), 2), "use_bias": False}, {"padding": ((1, 0), 2), "use_bias": False}),
    ]:
        layer, flax = Conv(6, 3, **options), linen.Conv(6, (3, 3), **theirs)
        params = layer.init(KEY, x)
        kernel = jnp.transpose(params["W"], (2, 3, 1, 0))
        bias = {"bias": params["b"] + 1} if "b" in params else {}
        params |= {"b": params["b"] + 1} if "b" in params else {}
        close(layer(params, x), flax.apply({"params": {"kernel": kernel, **bias}}, x))
        close(layer(params, x[0]), layer(params, x)[0])


def test_parameters():
    layer = Conv(6, (3, 1), groups=2)
    params = layer.init(KEY, jnp.zeros((5, 5, 4), jnp.bfloat16))
    assert jax.tree.map(lambda p: (p.shape, p.dtype.name), params) == {
        "W": ((6, 2, 3, 1), "float64"),  # the tests run with 64 bits
        "b": ((6,), "float64"),
    }
    deviation = jnp.std(Conv(500, 3).init(KEY, jnp.zeros((5, 5, 50)))["W"])
    close(deviation, np.sqrt(2 / 450))
    params = ConvTranspose(6, 2, groups=2).init(KEY, jnp.zeros((5, 5, 4)))
    assert params["W"].shape == (4, 3, 2, 2) and params["b"].shape == (6,)


TRANSPOSES = [
    (64, 3, 4, {"stride": 2}),
    (64, 16, 3, {"groups": 4}),
    (256, 128, 2, {"stride": 2}),
    (3, 64, 3, {}),
    (64, 16, 3, {"stride": 4, "dilation": 2, "padding": "valid"}),
]


@pytest.mark.parametrize("which", sweep(range(5), [0, 1]))
def test_conv_transpose_begins_with_he_s_variance(which):
    """2 of inputs of variance 1, over the outputs that a window reaches."""
    ins, outs, window, options = TRANSPOSES[which]
    layer, x = ConvTranspose(outs, window, **options), jax.random.normal(KEY, (12, 12, ins))
    inner = lambda key: layer(layer.init(key, x), x)[4:-4, 4:-4]
    y = jax.jit(jax.vmap(inner))(jax.random.split(KEY, 16))
    assert 1.8 < np.mean(np.square(y[y != 0])) < 2.2


def test_conv_transpose_shows_its_initialiser_outputs_and_inputs():
    """As a convolution's weight; of groups, too."""
    seen = []

    def init(key, shape, dtype):
        seen.append(shape)
        return jax.random.normal(key, shape, dtype)

    x = jnp.zeros((5, 5, 4))
    W = ConvTranspose(6, 3, groups=2, weight_init=init).init(KEY, x)["W"]
    assert seen == [(6, 2, 3, 3)] and W.shape == (4, 3, 3, 3)
    # One output's weights, for it alone in its group, are those of one row of init's.
    drawn = init(jax.random.split(KEY)[0], (6, 2, 3, 3), W.dtype)
    for f in range(6):
        group = f // 3
        np.testing.assert_array_equal(W[2 * group : 2 * group + 2, f % 3], drawn[f])
    with pytest.raises(TypeError, match="ConvTranspose: weight_init must be an initialiser"):
        ConvTranspose(6, 3, weight_init=2)


def test_conv_transpose_adds_each_window():
    """Without overlap: each pixel becomes a tile."""
    x = R(0, 3, 2, 4)
    layer = ConvTranspose(5, 2, stride=2)
    params = layer.init(KEY, x)
    tiles = jnp.einsum("ijc,cfab->iajbf", x, params["W"]) + params["b"]
    close(layer(params, x), tiles.reshape(6, 4, 5))
    assert ConvTranspose(5, 3, stride=2, padding=1, output_padding=1, use_bias=False)(
        {"W": R(1, 4, 5, 3, 3)}, x
    ).shape == (6, 4, 5)


def test_squeeze_and_excitation():
    layer, x = SqueezeExcite(2), R(0, 2, 3, 5, 6)
    params = layer.init(KEY, x[0])
    linear = lambda p, h: p["W"] @ h + p["b"]
    hidden = jax.nn.relu(linear(params["reduce"], x[1].mean((0, 1))))
    close(layer(params, x)[1], x[1] * jax.nn.sigmoid(linear(params["expand"], hidden)))


LAYERS = [
    (MaxPool(2), ops.max_pool, (2,)),
    (AveragePool(3, stride=2, padding=1, count_padding=False), None, None),
    (AdaptiveAveragePool(2), ops.adaptive_average_pool, (2,)),
    (AdaptiveMaxPool((2, 3)), ops.adaptive_max_pool, ((2, 3),)),
    (GlobalAveragePool(), lambda x: x.mean((-3, -2)), ()),
    (GlobalMaxPool(1), lambda x: x.max(-2), ()),
    (Upsample(2), ops.upsample, (2,)),
    (PixelShuffle(2), ops.pixel_shuffle, (2,)),
]


@pytest.mark.parametrize("layer, op, options", LAYERS, ids=[str(c[0]) for c in LAYERS])
def test_layers_without_parameters(layer, op, options):
    x = R(0, 2, 6, 4, 8)
    if op is None:
        wanted = ops.average_pool(x, 3, stride=2, padding=1, count_padding=False)
    else:
        wanted = op(x, *options)
    assert layer.init(KEY, x) == {}
    close(layer({}, x), wanted)
    close(layer({}, x[1]), wanted[1])


def network():
    return chain(
        stem=Conv(8, 3, stride=2),
        activation=ops.relu,
        pool=MaxPool(2),
        gate=SqueezeExcite(2),
        mix=Conv(8, 3, groups=8),
        up=ConvTranspose(4, 2, stride=2),
        mean=GlobalAveragePool(),
    )


@exhaustive
def test_per_example_gradients_and_kronecker_factors():
    net, xs = network(), R(1, 3, 8, 8, 3)
    params = net.init(KEY, xs[0])
    loss = lambda p, x: jnp.sum(net(p, x) ** 2)

    def both(params, xs):
        _, g = fnn.per_example.grads(loss)(params, xs)
        plain = jax.vmap(jax.grad(loss), (None, 0))(params, xs)
        why.extend(r["why"] for r in fnn.per_example.explain(g) if r["path"].endswith("['W']"))
        return fnn.per_example.materialize(g), plain

    why = []
    found, plain = jax.jit(both)(params, xs)
    jax.tree.map(close, found, plain)
    # Factored, or dense because that is smaller; nothing lost its factors on the way.
    seen = ("gradient is x convolved with G", "its factors hold", "gradient is Gᵀ A")
    assert len(why) == 5 and all(any(s in w for s in seen) for w in why), why
    of = fnn.curvature.kronecker_factors(net, lambda z, y: 0.5 * jnp.sum((z - y) ** 2))
    factors = of(params, (xs, jnp.zeros((3, 4))))
    assert factors["stem"]["W"].A.shape == (1, 27, 27)


@exhaustive
def test_summary():
    text = str(summary(network(), jnp.zeros((8, 8, 3))))
    assert "Conv(8, 3, stride=2)" in text and "[4,4,8]" in text
    assert "ConvTranspose(4, 2, stride=2)" in text


X = jnp.ones((4, 4, 3))
WRONG = [
    (lambda: Conv(8, 3).init(KEY, X[0]), "wants an array of shape (height, width, in)"),
    (lambda: Conv(8, (3,)).init(KEY, X[0, 0]), "wants an array of shape (length, in)"),
    (lambda: Conv(8, 3)({"W": X, "b": X}, X), "wants W of shape (8, 3, 3, 3), but got"),
    (lambda: Conv(8, 3, groups=2).init(KEY, X), "features that 2 groups divide"),
    (lambda: ConvTranspose(8, 3)({}, X), "wants parameters with the keys ['W', 'b']"),
    (lambda: SqueezeExcite(2).init(KEY, X[0]), "wants an array of shape (height, width, in)"),
    (lambda: MaxPool(2)({}, X[0]), "wants an array of shape (height, width, in)"),
    (lambda: MaxPool(2)({"W": X}, X), "has no parameters"),
    (lambda: GlobalMaxPool(3)({}, X), "wants an array of shape (*space, in)"),
    (lambda: Upsample(2)({}, X[0]), "wants an array of shape (height, width, in)"),
    (lambda: given_two_features(Conv(8, 3)), "(8, 3, 3, 3), with an input of shape (4, 4, 2)"),
    (
        lambda: given_two_features(SqueezeExcite(5)),
        "SqueezeExcite(5) wants W of shape (5, 2), but got one of shape (5, 3), with an input of",
    ),
]


def given_two_features(layer):
    return layer(layer.init(KEY, X), X[..., :2])


@pytest.mark.parametrize("wrong, message", WRONG, ids=range(len(WRONG)))
def test_what_does_not_fit(wrong, message):
    with pytest.raises(LayerError, match=re.escape(message)):
        wrong()


PADDED = [
    functools.partial(Conv, 8, 3),
    functools.partial(ConvTranspose, 8, 3),
    functools.partial(MaxPool, 2),
    functools.partial(AveragePool, 2),
]
OPTIONS = [
    (lambda: Conv(0, 3), "Conv: features must be"),
    (lambda: Conv(8, 0), "Conv: window must be"),
    (lambda: Conv(8, 3, stride=(1,)), "Conv: stride must be one integer or one for each"),
    (lambda: Conv(8, 3, padding="all"), "Conv: padding must be"),
    (lambda: Conv(9, 3, groups=2), "Conv: features must be a multiple of groups"),
    (lambda: ConvTranspose(8, 3, padding="circular"), "ConvTranspose: padding must be"),
    (lambda: ConvTranspose(8, 3, output_padding=-1), "ConvTranspose: output_padding must be"),
    (lambda: SqueezeExcite(0), "SqueezeExcite: hidden must be"),
    (lambda: AveragePool(2, padding="all"), "AveragePool: padding must be"),
    (lambda: Upsample(2, method="cubic"), "Upsample: method must be"),
    (lambda: PixelShuffle(0), "PixelShuffle: scale must be"),
    *((lambda new=new: new(padding=-1), "padding must be") for new in PADDED),
    *((lambda new=new: new(padding=((1, 2),)), "each of the 2 axes of space") for new in PADDED),
]


@pytest.mark.parametrize("wrong, message", OPTIONS, ids=range(len(OPTIONS)))
def test_options(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        wrong()


def test_options_that_are_not_of_their_kind():
    for new in PADDED:
        for bad in (None, float("nan")):
            with pytest.raises(TypeError, match="padding must be"):
                new(padding=bad)
    with pytest.raises(TypeError, match="MaxPool: dilation must be"):
        MaxPool(2, dilation=None)
