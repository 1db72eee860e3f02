"""The models in fnn."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

import fnn
from fnn import models, ops
from peers import GPT, LEARNING_RATE, Training, count, data


def training(model: str, unrolled: bool = False, **sizes: int) -> Training:
    sizes = GPT | sizes
    blocks = sizes["blocks"]
    net = {
        "lenet": lambda: models.lenet(),
        "resnet": lambda: models.resnet18(10, small=True),
        "vit": lambda: models.vit(10, 32, 4, 192, 12, 3, 768, dropout=0.0),
        "gpt": lambda: models.gpt2(
            256,
            sizes["length"],
            sizes["width"],
            blocks,
            sizes["heads"],
            dropout=0.0,
            unroll=blocks if unrolled else 1,
        ),
        "lstm": lambda: models.lstm_language_model(256, 256, dropout=0.0),
    }[model]()

    def of_text(params, example):
        tokens, targets = example
        return jnp.mean(ops.softmax_cross_entropy(net(params, tokens), targets))

    def of_gpt(params, example):
        return jnp.mean(net(params, *example))

    of_images = fnn.supervised(net, ops.softmax_cross_entropy)
    loss = {"gpt": of_gpt, "lstm": of_text}.get(model, of_images)
    step = fnn.train_step(loss, optax.adam(LEARNING_RATE), nonfinite="ignore")
    x, _ = data(model, 1, sizes["length"])
    params = jax.jit(net.init)(jax.random.key(0), x[0])
    state = step.init(params, net.init_state(x[0]))

    @functools.partial(jax.jit, donate_argnums=0)
    def one(state, x, y):
        return step(state, (x, y))[0]

    return Training(one, state, count(params))
