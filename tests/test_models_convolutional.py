"""LeNet, ResNet, ConvNeXt and U-Net: the sizes of the papers, and what the tiny ones compute."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from sweeps import exhaustive, sweep

from fnn import models
from fnn.layers import LayerError, training

KEY = jax.random.key(0)
R = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape))

# The model, the shape of its image and of its output, and the parameters that are published: of
# torchvision's modules, and of the papers' configuration.
SIZES = {
    "lenet": (models.lenet, (32, 32, 1), (10,), 61_706),
    "resnet18": (models.resnet18, (224, 224, 3), (1000,), 11_689_512),
    "resnet50": (models.resnet50, (224, 224, 3), (1000,), 25_557_032),
    "convnext": (models.convnext, (224, 224, 3), (1000,), 28_589_128),
    "unet": (models.unet, (572, 572, 1), (388, 388, 2), 31_030_658),
}


@pytest.mark.parametrize("name", sweep(SIZES, ["lenet", "resnet18"]))
def test_as_many_parameters_as_published(name):
    make, shape, output, count = SIZES[name]
    model, x = make(), jax.ShapeDtypeStruct(shape, "float32")
    params, state = jax.eval_shape(model.init, KEY, x), jax.eval_shape(model.init_state, x)
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == count
    assert jax.eval_shape(model.apply, params, state, x)[0].shape == output


TINY = {
    "lenet": (lambda: models.lenet(3), (32, 32, 1)),
    "resnet": (lambda: models.resnet((1, 1), 3, features=4, small=True), (6, 6, 2)),
    "bottleneck": (lambda: models.resnet((1, 1), 3, features=2, bottleneck=True), (12, 12, 2)),
    "convnext": (lambda: models.convnext((1, 1), (4, 6), 3, layer_scale=0.5), (8, 8, 2)),
    "unet": (lambda: models.unet(2, 3, 1, padding="same"), (6, 4, 1)),
}


def start(name):
    make, shape = TINY[name]
    model, x = make(), R(1, *shape)
    params, state = model.init(KEY, x), model.init_state(x)
    # Nothing at its start: biases, scales and statistics of their own.
    keys = iter(range(2, 1000))
    moved = lambda p: p + 0.1 * jnp.abs(R(next(keys), *p.shape))
    return model, jax.tree.map(moved, params), jax.tree.map(moved, state), x


def conv(p, x, stride=1, pad=None, groups=1):
    W = p["W"]
    pad = [(W.shape[-1] // 2,) * 2] * 2 if pad is None else [(pad, pad)] * 2
    y = lax.conv_general_dilated(
        x[None],
        W,
        (stride, stride),
        pad,
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
        feature_group_count=groups,
    )[0]
    return y + p.get("b", 0)


def linear(p, x):
    return x @ p["W"].T + p["b"]


def normal(p, x):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return p["scale"] * (x - mean) / jnp.sqrt(variance + 1e-6) + p["bias"]


def pool(x, start, op, size):
    return lax.reduce_window(x, start, op, (size, size, 1), (size, size, 1), "VALID")


def lenet(p, s, x):
    mean = lambda x: pool(x, 0.0, lax.add, 2) / 4
    x = mean(jnp.tanh(conv(p["c1"], x, pad=0)))
    x = mean(jnp.tanh(conv(p["c3"], x, pad=0)))
    x = jnp.tanh(conv(p["c5"], x, pad=0)).reshape(-1)
    return linear(p["output"], jnp.tanh(linear(p["f6"], x)))


def resnet(p, s, x):
    s = s["statistics"]
    relu = jax.nn.relu

    def norm(p, s, x):
        return p["scale"] * (x - s["mean"]) / jnp.sqrt(s["variance"] + 1e-5) + p["bias"]

    def block(p, s, x, stride):
        last = "3" if "conv3" in p else "2"
        y = x
        for i in "123"[: int(last)]:
            at = stride if i == ("2" if last == "3" else "1") else 1
            y = norm(p[f"bn{i}"], s[f"bn{i}"], conv(p[f"conv{i}"], y, at))
            y = relu(y) if i != last else y
        if "downsample" in p:
            p, s = p["downsample"], s["downsample"]
            x = norm(p["1"], s["1"], conv(p["0"], x, stride))
        return relu(x + y)

    is_small = p["conv1"]["W"].shape[-1] == 3
    x = relu(norm(p["bn1"], s["bn1"], conv(p["conv1"], x, 1 if is_small else 2)))
    if not is_small:
        pads = [(1, 1), (1, 1), (0, 0)]
        x = lax.reduce_window(x, -jnp.inf, lax.max, (3, 3, 1), (2, 2, 1), pads)
    x = block(p["layer1"]["0"], s["layer1"]["0"], x, 1)
    x = block(p["layer2"]["0"], s["layer2"]["0"], x, 2)
    return linear(p["fc"], x.mean((0, 1)))


def convnext(p, s, x):
    def block(p, x):
        y = normal(p["norm"], conv(p["conv"], x, groups=x.shape[-1]))
        y = linear(p["reduce"], jax.nn.gelu(linear(p["expand"], y), approximate=False))
        return x + p["scale"]["gamma"] * y

    x = normal(p["stem"]["1"], conv(p["stem"]["0"], x, 4, 0))
    x = block(p["stage0"]["0"], x)
    x = conv(p["down1"]["1"], normal(p["down1"]["0"], x), 2, 0)
    x = block(p["stage1"]["0"], x)
    return linear(p["output"], normal(p["norm"], x.mean((0, 1))))


def unet(p, s, x):
    twice = lambda p, x: jax.nn.relu(conv(p["2"], jax.nn.relu(conv(p["0"], x))))
    top = twice(p["down0"], x)
    x = twice(p["bottom"], pool(top, -jnp.inf, lax.max, 2))
    tiles = jnp.einsum("ijc,cfab->iajbf", x, p["grow0"]["W"])
    x = tiles.reshape(*top.shape[:2], -1) + p["grow0"]["b"]
    return conv(p["output"], twice(p["up0"], jnp.concatenate([top, x], -1)))


FORMULAS = [lenet, resnet, resnet, convnext, unet]


@exhaustive
@pytest.mark.parametrize("name", sweep(TINY, ["resnet", "unet"]))
def test_the_formula(name):
    model, params, state, x = start(name)
    formula = dict(zip(TINY, FORMULAS, strict=True))[name]
    ours, plain = jax.jit(lambda p, s, x: (model.apply(p, s, x)[0], formula(p, s, x)))(
        params, state, x
    )
    np.testing.assert_allclose(ours, plain, rtol=1e-9, atol=1e-9)


@exhaustive
def test_training_moves_the_statistics():
    model, params, state, x = start("resnet")
    xs = jnp.stack([x, 2 * x, x - 1])

    def loss(params):
        apply = lambda x: model.apply(params, state, x, mode=training(KEY, axis="batch"))
        y, new = jax.vmap(apply, axis_name="batch", out_axes=(0, None))(xs)
        return jnp.sum(y**2), new

    g, new = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert all(bool(jnp.isfinite(leaf).all()) and leaf.any() for leaf in jax.tree.leaves(g))
    mean = new["statistics"]["bn1"]["mean"]
    first = jax.vmap(lambda x: conv(params["conv1"], x))(xs).mean((0, 1, 2))
    wanted = 0.9 * state["statistics"]["bn1"]["mean"] + 0.1 * first
    np.testing.assert_allclose(mean, wanted, rtol=1e-9)


def test_what_does_not_fit():
    with pytest.raises(LayerError, match="halves the image 1 times, but after 0 of them"):
        models.unet(2, 3, 1).init(KEY, jnp.zeros((7, 6, 1)))
    for wrong, message in [
        (lambda: models.resnet((2, 0)), "resnet: blocks must be"),
        (lambda: models.convnext((1, 1), (4,)), "blocks and features must be as many"),
        (lambda: models.convnext(drop_path=1.0), "convnext: drop_path must be"),
        (lambda: models.unet(padding="circular"), "unet: padding must be"),
        (lambda: models.lenet(0), "lenet: classes must be"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            wrong()
    with pytest.raises(TypeError, match="resnet: blocks must be how many each stage has"):
        models.resnet(18)
