"""Five models as the users of five libraries write them, each with a step of training.

`of_nnx`, `of_linen`, `of_equinox`, `of_haiku`, `of_torch`, and `of_fnn` hold each a function

    training(model, **sizes) -> Training

whose step does one step of Adam on the mean softmax cross-entropy of a batch.

    lenet     32x32x1: 5x5 convolutions (6, 16) with tanh and 2x2 average pooling, 120, 84, 10
    resnet    ResNet-18 for 32x32x3: a 3x3 convolution for the stem, no pooling behind it
    vit       ViT-tiny on 4x4 patches of 32x32x3: 12 blocks of width 192 with 3 heads
    gpt       GPT-2 on bytes: `blocks`, `width`, `heads`, `length`; tied output
    lstm      bytes: embedding of 256, two LSTMs of 256, linear output

All of them with the library's own layers and defaults, without dropout, in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

MODELS = ("lenet", "resnet", "vit", "gpt", "lstm")
PARAMETERS = {
    "lenet": 61_706,
    "resnet": 11_173_962,
    "vit": 5_362_762,
    "gpt": 4_837_376,
    "lstm": 1_181_952,  # PyTorch's, with a second bias, has 2,048 more
}
GPT = {"blocks": 6, "width": 256, "heads": 4, "length": 128}
LEARNING_RATE = 1e-3


class Training(NamedTuple):
    """A step of training.

    Fields:
        step: `(state, x, y) -> state`, compiled, which donates the state's memory.
        state: to begin with.
        parameters: how many there are.
        inputs: makes of numpy's x, y what step takes.
    """

    step: Callable
    state: Any
    parameters: int
    inputs: Callable = lambda x, y: (jnp.asarray(x), jnp.asarray(y))


def data(model: str, batch: int, length: int = GPT["length"]) -> tuple[np.ndarray, np.ndarray]:
    """A batch of inputs and labels: images `(batch, 32, 32, channels)`, or bytes."""
    rng = np.random.default_rng(0)
    if model in ("lenet", "resnet", "vit"):
        shape = batch, 32, 32, 1 if model == "lenet" else 3
        return rng.standard_normal(shape, "float32"), rng.integers(0, 10, batch, "int32")
    length = 64 if model == "lstm" else length
    text = rng.integers(0, 256, (batch, length + 1), "int32")
    return text[:, :-1], text[:, 1:]


def count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def adam_step(loss: Callable, optimizer: Any) -> Callable:
    """`(params, rest, opt_state), x, y -> the same`; loss(params, rest, x, y) -> loss, rest."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x, y):
        params, rest, opt_state = state
        gradient, rest = jax.grad(loss, has_aux=True)(params, rest, x, y)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state

    return step
