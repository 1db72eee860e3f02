"""The models in Flax Linen."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from peers import GPT, LEARNING_RATE, Training, adam_step, count, cross_entropy, data


class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (6, 16):
            x = nn.tanh(nn.Conv(features, (5, 5), padding="VALID")(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for features in (120, 84):
            x = nn.tanh(nn.Dense(features)(x))
        return nn.Dense(10)(x)


class BasicBlock(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        y = nn.relu(norm()(conv((3, 3), strides=self.stride)(x)))
        y = norm()(conv((3, 3))(y))
        if x.shape != y.shape:
            x = norm()(conv((1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        for i, features in enumerate((64, 128, 256, 512)):
            for stride in (1 if i == 0 else 2, 1):
                x = BasicBlock(features, stride)(x)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


class Block(nn.Module):
    width: int
    heads: int

    @nn.compact
    def __call__(self, x, mask=None):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(h, mask=mask)
        h = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
        # GPT-2's gelu is by tanh, the ViT's exact.
        return x + nn.Dense(self.width)(nn.gelu(h, approximate=mask is not None))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(192, (4, 4), strides=4)(x).reshape(x.shape[0], 64, 192)
        token = self.param("token", nn.initializers.zeros, (1, 1, 192))
        positions = self.param("positions", nn.initializers.normal(0.02), (65, 192))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1) + positions
        for _ in range(12):
            x = Block(192, 3)(x)
        return nn.Dense(10)(nn.LayerNorm()(x[:, 0]))


class GPT2(nn.Module):
    blocks: int
    width: int
    heads: int
    length: int

    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(256, self.width)
        mask = nn.make_causal_mask(x)
        x = embed(x) + nn.Embed(self.length, self.width)(jnp.arange(x.shape[1]))
        for _ in range(self.blocks):
            x = Block(self.width, self.heads)(x, mask)
        return embed.attend(nn.LayerNorm()(x))


class LSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(256, 256)(x)
        for _ in range(2):
            x = nn.RNN(nn.OptimizedLSTMCell(256))(x)
        return nn.Dense(256)(x)


def training(model: str, **sizes: int) -> Training:
    made = {
        "lenet": LeNet,
        "resnet": ResNet,
        "vit": ViT,
        "gpt": lambda: GPT2(**(GPT | sizes)),
        "lstm": LSTM,
    }[model]()
    x, _ = data(model, 1, **({"length": sizes["length"]} if "length" in sizes else {}))
    variables = jax.jit(made.init)(jax.random.key(0), x)
    params = variables.pop("params")

    def loss(params, rest, x, y):
        logits, rest = made.apply({"params": params, **rest}, x, mutable=list(rest))
        return cross_entropy(logits, y), rest

    optimizer = optax.adam(LEARNING_RATE)
    state = params, variables, optimizer.init(params)
    return Training(adam_step(loss, optimizer), state, count(params))
