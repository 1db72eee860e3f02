"""The models in Equinox."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from equinox import nn
from jax import lax

from peers import GPT, LEARNING_RATE, Training, count, cross_entropy


class Keys:
    """A new key at each call."""

    def __init__(self):
        self.key = jax.random.key(0)

    def __call__(self):
        self.key, key = jax.random.split(self.key)
        return key


def lenet(key: Keys) -> nn.Sequential:
    return nn.Sequential(
        [
            *(nn.Conv2d(1, 6, 5, key=key()), nn.Lambda(jnp.tanh), nn.AvgPool2d(2, 2)),
            *(nn.Conv2d(6, 16, 5, key=key()), nn.Lambda(jnp.tanh), nn.AvgPool2d(2, 2)),
            nn.Lambda(jnp.ravel),
            *(nn.Linear(400, 120, key=key()), nn.Lambda(jnp.tanh)),
            *(nn.Linear(120, 84, key=key()), nn.Lambda(jnp.tanh)),
            nn.Linear(84, 10, key=key()),
        ]
    )


def norm(features: int) -> nn.BatchNorm:
    return nn.BatchNorm(features, axis_name="batch", mode="batch")


class BasicBlock(nn.StatefulLayer):
    conv1: nn.Conv2d
    norm1: nn.BatchNorm
    conv2: nn.Conv2d
    norm2: nn.BatchNorm
    project: nn.Conv2d | None
    norm3: nn.BatchNorm | None

    def __init__(self, features: int, out: int, stride: int, key: Keys):
        conv = lambda i, o, k, **options: nn.Conv2d(i, o, k, use_bias=False, key=key(), **options)
        self.conv1 = conv(features, out, 3, stride=stride, padding=1)
        self.conv2 = conv(out, out, 3, padding=1)
        self.norm1, self.norm2 = norm(out), norm(out)
        self.project = self.norm3 = None
        if stride != 1 or features != out:
            self.project, self.norm3 = conv(features, out, 1, stride=stride), norm(out)

    def __call__(self, x, state, *, key=None):
        y, state = self.norm1(self.conv1(x), state)
        y, state = self.norm2(self.conv2(jax.nn.relu(y)), state)
        if self.project is not None:
            x, state = self.norm3(self.project(x), state)
        return jax.nn.relu(x + y), state


def resnet(key: Keys) -> nn.Sequential:
    stem = nn.Conv2d(3, 64, 3, padding=1, use_bias=False, key=key())
    layers: list[Any] = [stem, norm(64), nn.Lambda(jax.nn.relu)]
    features = 64
    for i, out in enumerate((64, 128, 256, 512)):
        for stride in (1 if i == 0 else 2, 1):
            layers.append(BasicBlock(features, out, stride, key))
            features = out
    mean = nn.Lambda(lambda x: jnp.mean(x, axis=(1, 2)))
    return nn.Sequential([*layers, mean, nn.Linear(512, 10, key=key())])


class Block(eqx.Module):
    norm1: nn.LayerNorm
    attention: nn.MultiheadAttention
    norm2: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear

    def __init__(self, width: int, heads: int, key: Keys):
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        bias = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.attention = nn.MultiheadAttention(heads, width, key=key(), **bias)
        self.up = nn.Linear(width, 4 * width, key=key())
        self.down = nn.Linear(4 * width, width, key=key())

    def __call__(self, x, mask=None):
        h = jax.vmap(self.norm1)(x)
        x = x + self.attention(h, h, h, mask=mask)
        h = jax.vmap(self.up)(jax.vmap(self.norm2)(x))
        # GPT-2's gelu is by tanh, the ViT's exact.
        return x + jax.vmap(self.down)(jax.nn.gelu(h, approximate=mask is not None))


class ViT(eqx.Module):
    patches: nn.Conv2d
    token: jax.Array
    positions: jax.Array
    blocks: list
    norm: nn.LayerNorm
    head: nn.Linear

    def __init__(self, key: Keys):
        self.patches = nn.Conv2d(3, 192, 4, stride=4, key=key())
        self.token = jnp.zeros((1, 192))
        self.positions = 0.02 * jax.random.normal(key(), (65, 192))
        self.blocks = [Block(192, 3, key) for _ in range(12)]
        self.norm, self.head = nn.LayerNorm(192), nn.Linear(192, 10, key=key())

    def __call__(self, x):
        x = self.patches(x).reshape(192, 64).T
        x = jnp.concatenate([self.token, x]) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[0]))


class GPT2(eqx.Module):
    embed: nn.Embedding
    positions: nn.Embedding
    blocks: list
    norm: nn.LayerNorm

    def __init__(self, blocks: int, width: int, heads: int, length: int, key: Keys):
        self.embed = nn.Embedding(256, width, key=key())
        self.positions = nn.Embedding(length, width, key=key())
        self.blocks = [Block(width, heads, key) for _ in range(blocks)]
        self.norm = nn.LayerNorm(width)

    def __call__(self, x):
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        x = jax.vmap(self.embed)(x) + jax.vmap(self.positions)(jnp.arange(len(x)))
        for block in self.blocks:
            x = block(x, mask)
        return jax.vmap(self.norm)(x) @ self.embed.weight.T


class LSTM(eqx.Module):
    embed: nn.Embedding
    cells: list
    head: nn.Linear

    def __init__(self, key: Keys):
        self.embed = nn.Embedding(256, 256, key=key())
        self.cells = [nn.LSTMCell(256, 256, key=key()) for _ in range(2)]
        self.head = nn.Linear(256, 256, key=key())

    def __call__(self, x):
        x = jax.vmap(self.embed)(x)
        for cell in self.cells:

            def one(carry, x, cell=cell):
                carry = cell(x, carry)
                return carry, carry[0]

            _, x = lax.scan(one, (jnp.zeros(256), jnp.zeros(256)), x)
        return jax.vmap(self.head)(x)


def training(model: str, **sizes: int) -> Training:
    key = Keys()
    make = {
        "lenet": lambda: lenet(key),
        "resnet": lambda: resnet(key),
        "vit": lambda: ViT(key),
        "gpt": lambda: GPT2(**(GPT | sizes), key=key),
        "lstm": lambda: LSTM(key),
    }[model]
    has_state = model == "resnet"
    made, rest = nn.make_with_state(make)() if has_state else (make(), None)
    params, static = eqx.partition(made, eqx.is_inexact_array)

    def loss(params, rest, x, y):
        network = eqx.combine(params, static)
        if not has_state:
            return cross_entropy(jax.vmap(network)(x), y), rest
        logits, rest = jax.vmap(network, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            x, rest
        )
        return cross_entropy(logits, y), rest

    optimizer = optax.adam(LEARNING_RATE)

    @eqx.filter_jit(donate="all-except-first")
    def of_batch(batch, state):
        params, rest, opt_state = state
        gradient, rest = eqx.filter_grad(loss, has_aux=True)(params, rest, *batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return eqx.apply_updates(params, updates), rest, opt_state

    def inputs(x, y):
        if x.ndim == 4:
            x = np.moveaxis(x, -1, 1)  # its convolutions want the channels first
        return jnp.asarray(x), jnp.asarray(y)

    class Step:
        """Called with the state first, as the others are."""

        def __call__(self, state, x, y):
            return of_batch((x, y), state)

        def lower(self, state, x, y):
            return of_batch.lower((x, y), state).lowered

    return Training(Step(), (params, rest, optimizer.init(params)), count(params), inputs)
