"""The models in Haiku."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from peers import GPT, LEARNING_RATE, Training, adam_step, count, cross_entropy, data


def lenet(x):
    for features in (6, 16):
        x = jnp.tanh(hk.Conv2D(features, 5, padding="VALID")(x))
        x = hk.avg_pool(x, (2, 2, 1), (2, 2, 1), "VALID")
    x = hk.Flatten()(x)
    for features in (120, 84):
        x = jnp.tanh(hk.Linear(features)(x))
    return hk.Linear(10)(x)


def norm(x):
    return hk.BatchNorm(True, True, 0.99)(x, is_training=True)


def basic_block(x, features, stride):
    y = jax.nn.relu(norm(hk.Conv2D(features, 3, stride, with_bias=False)(x)))
    y = norm(hk.Conv2D(features, 3, with_bias=False)(y))
    if x.shape != y.shape:
        x = norm(hk.Conv2D(features, 1, stride, with_bias=False)(x))
    return jax.nn.relu(x + y)


def resnet(x):
    x = jax.nn.relu(norm(hk.Conv2D(64, 3, with_bias=False)(x)))
    for i, features in enumerate((64, 128, 256, 512)):
        for stride in (1 if i == 0 else 2, 1):
            x = basic_block(x, features, stride)
    return hk.Linear(10)(jnp.mean(x, axis=(1, 2)))


def block(x, width, heads, mask=None):
    layer_norm = lambda x: hk.LayerNorm(-1, True, True)(x)
    init = hk.initializers.VarianceScaling(1.0)
    h = layer_norm(x)
    x = x + hk.MultiHeadAttention(heads, width // heads, w_init=init)(h, h, h, mask)
    h = hk.Linear(4 * width)(layer_norm(x))
    # GPT-2's gelu is by tanh, the ViT's exact.
    return x + hk.Linear(width)(jax.nn.gelu(h, approximate=mask is not None))


def vit(x):
    x = hk.Conv2D(192, 4, 4, padding="VALID")(x).reshape(x.shape[0], 64, 192)
    token = hk.get_parameter("token", (1, 1, 192), init=jnp.zeros)
    positions = hk.get_parameter("positions", (65, 192), init=hk.initializers.RandomNormal(0.02))
    x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1) + positions
    for _ in range(12):
        x = block(x, 192, 3)
    return hk.Linear(10)(hk.LayerNorm(-1, True, True)(x[:, 0]))


def gpt(x, blocks, width, heads, length):
    embed = hk.Embed(256, width)
    mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
    x = embed(x) + hk.Embed(length, width)(jnp.arange(length))
    for _ in range(blocks):
        x = block(x, width, heads, mask)
    return hk.LayerNorm(-1, True, True)(x) @ embed.embeddings.T


def lstm(x):
    x = hk.Embed(256, 256)(x)
    for _ in range(2):
        core = hk.LSTM(256)
        x, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
    return hk.Linear(256)(x)


def training(model: str, **sizes: int) -> Training:
    sizes = GPT | sizes
    body = {
        "lenet": lenet,
        "resnet": resnet,
        "vit": vit,
        "gpt": lambda x: gpt(x, **sizes),
        "lstm": lstm,
    }[model]
    made = hk.without_apply_rng(hk.transform_with_state(body))
    x, _ = data(model, 1, length=sizes["length"])
    params, rest = jax.jit(made.init)(jax.random.key(0), x)

    def loss(params, rest, x, y):
        logits, rest = made.apply(params, rest, x)
        return cross_entropy(logits, y), rest

    optimizer = optax.adam(LEARNING_RATE)
    state = params, rest, optimizer.init(params)
    return Training(adam_step(loss, optimizer), state, count(params))
