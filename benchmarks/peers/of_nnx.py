"""The models in Flax NNX."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from peers import GPT, LEARNING_RATE, Training, adam_step, count, cross_entropy


def lenet(rngs: nnx.Rngs) -> Any:
    pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
    conv = functools.partial(nnx.Conv, kernel_size=(5, 5), padding="VALID", rngs=rngs)
    return nnx.Sequential(
        *(conv(1, 6), nnx.tanh, pool, conv(6, 16), nnx.tanh, pool),
        lambda x: x.reshape(x.shape[0], -1),
        *(nnx.Linear(400, 120, rngs=rngs), nnx.tanh, nnx.Linear(120, 84, rngs=rngs), nnx.tanh),
        nnx.Linear(84, 10, rngs=rngs),
    )


class BasicBlock(nnx.Module):
    def __init__(self, features: int, out: int, stride: int, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1 = conv(features, out, (3, 3), strides=stride)
        self.conv2 = conv(out, out, (3, 3))
        self.norm1, self.norm2 = (nnx.BatchNorm(out, rngs=rngs) for _ in range(2))
        self.shortcut = nnx.data(None)
        if stride != 1 or features != out:
            project = conv(features, out, (1, 1), strides=stride)
            self.shortcut = nnx.data(nnx.Sequential(project, nnx.BatchNorm(out, rngs=rngs)))

    def __call__(self, x):
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 64, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        blocks, features = [], 64
        for i, out in enumerate((64, 128, 256, 512)):
            for stride in (1 if i == 0 else 2, 1):
                blocks.append(BasicBlock(features, out, stride, rngs))
                features = out
        self.blocks = nnx.Sequential(*blocks)
        self.head = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x):
        x = self.blocks(nnx.relu(self.norm(self.stem(x))))
        return self.head(jnp.mean(x, axis=(1, 2)))


class Bottleneck(nnx.Module):
    def __init__(self, features: int, out: int, stride: int, rngs: nnx.Rngs, dtype: Any):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs, dtype=dtype)
        norm = functools.partial(nnx.BatchNorm, rngs=rngs, dtype=dtype)
        self.convs = nnx.List(
            [
                conv(features, out, (1, 1)),
                conv(out, out, (3, 3), strides=stride),
                conv(out, 4 * out, (1, 1)),
            ]
        )
        self.norms = nnx.List([norm(out), norm(out), norm(4 * out)])
        self.shortcut = nnx.data(None)
        if features != 4 * out:
            project = conv(features, 4 * out, (1, 1), strides=stride)
            self.shortcut = nnx.data(nnx.Sequential(project, norm(4 * out)))

    def __call__(self, x):
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y if i == 0 else nnx.relu(y)))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet50(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, dtype: Any = None):
        options: dict[str, Any] = {"rngs": rngs, "dtype": dtype}
        self.stem = nnx.Conv(3, 64, (7, 7), strides=2, padding=3, use_bias=False, **options)
        self.norm = nnx.BatchNorm(64, **options)
        blocks, features = [], 64
        for i, (out, depth) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
            for j in range(depth):
                stride = 2 if i and j == 0 else 1
                blocks.append(Bottleneck(features, out, stride, **options))
                features = 4 * out
        self.blocks = nnx.Sequential(*blocks)
        self.head = nnx.Linear(features, 1000, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = self.blocks(nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))))
        return self.head(jnp.mean(x.astype(jnp.float32), axis=(1, 2)))


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs, dtype: Any = None):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.norm1, self.norm2 = (nnx.LayerNorm(width, **options) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, **options)
        self.up = nnx.Linear(width, 4 * width, **options)
        self.down = nnx.Linear(4 * width, width, **options)

    def __call__(self, x, mask=None):
        x = x + self.attention(self.norm1(x), mask=mask)
        # GPT-2's gelu is by tanh, the ViT's exact.
        h = nnx.gelu(self.up(self.norm2(x)), approximate=mask is not None)
        return x + self.down(h)


class ViT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.patches = nnx.Conv(3, 192, (4, 4), strides=4, rngs=rngs)
        self.token = nnx.Param(jnp.zeros(192))
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (65, 192)))
        self.blocks = nnx.List([Block(192, 3, rngs) for _ in range(12)])
        self.norm, self.head = nnx.LayerNorm(192, rngs=rngs), nnx.Linear(192, 10, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(x.shape[0], 64, 192)
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, 192))
        x = jnp.concatenate([token, x], axis=1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class GPT2(nnx.Module):
    def __init__(
        self,
        blocks: int,
        width: int,
        heads: int,
        length: int,
        rngs: nnx.Rngs,
        vocabulary: int = 256,
        dtype: Any = None,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(vocabulary, width, **options)
        self.positions = nnx.Embed(length, width, **options)
        self.blocks = nnx.List([Block(width, heads, **options) for _ in range(blocks)])
        self.norm = nnx.LayerNorm(width, **options)

    def __call__(self, x):
        mask = nnx.make_causal_mask(x)
        x = self.embed(x) + self.positions(jnp.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x, mask)
        return self.embed.attend(self.norm(x))


class LSTM(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, 256, rngs=rngs)
        cell = functools.partial(nnx.OptimizedLSTMCell, 256, 256, rngs=rngs)
        self.first, self.second = nnx.RNN(cell()), nnx.RNN(cell())
        self.head = nnx.Linear(256, 256, rngs=rngs)

    def __call__(self, x):
        rngs = nnx.Rngs(0)  # the carry to begin with isn't drawn, but its cell asks for a key
        return self.head(self.second(self.first(self.embed(x), rngs=rngs), rngs=rngs))


def training(model: str, **sizes: Any) -> Training:
    """The functional way that Flax's guide to performance recommends."""
    rngs = nnx.Rngs(0)
    made = {
        "lenet": lenet,
        "resnet": ResNet,
        "resnet50": lambda rngs: ResNet50(rngs, **sizes),
        "vit": ViT,
        "gpt": lambda rngs: GPT2(**(GPT | sizes), rngs=rngs),
        "lstm": LSTM,
    }[model](rngs)
    graph, params, rest = nnx.split(made, nnx.Param, ...)

    def loss(params, rest, x, y):
        network = nnx.merge(graph, params, rest, copy=True)
        value = cross_entropy(network(x), y)
        return value, nnx.split(network, nnx.Param, ...)[2]

    optimizer = optax.adam(LEARNING_RATE)
    state = params, rest, optimizer.init(params)
    return Training(adam_step(loss, optimizer), state, count(params))
