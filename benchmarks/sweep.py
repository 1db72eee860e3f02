"""Sixty-four two-layer networks on the digits, 300 steps of 128 examples each, in several ways.

    python benchmarks/sweep.py [--networks 64] [--hidden 32] [--rounds 7] [--only NAME ...]
                               [--markdown]

Every network has its own seed: its own start and its own order of the examples in each epoch; the
optimiser is Adam. All run in one process and take turns, compiled before. `ms` is the median time of
a network, in milliseconds; `CPU ms` that of the processor, over all threads, which depends less on
what else the machine does; `/ fnn.sweep` the median, round by round, of the ratio of times.

    fnn.sweep       its own choice of layout, measured on the way there
    vmap            plain JAX: the whole training, a scan over the steps, mapped over the networks
    a loop          plain JAX: one network after another, a jitted step at a time
    PyTorch         one network after another, a step at a time
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import installed, machine, ratio, table
from sklearn.datasets import load_digits

import fnn
from fnn import ops
from fnn.layers import Linear, chain

BATCH, STEPS, RATE = 128, 300, 1e-3


def data() -> tuple[np.ndarray, np.ndarray]:
    """1408 digits, eleven batches an epoch, scaled."""
    images, labels = load_digits(return_X_y=True)
    images = (images - images.mean()) / images.std()
    return images[: 11 * BATCH].astype("float32"), labels[: 11 * BATCH].astype("int32")


def initial(hidden: int, seed):
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "W1": jax.random.normal(first, (hidden, 64)) * np.sqrt(2 / 64).astype("float32"),
        "b1": jnp.zeros(hidden),
        "W2": jax.random.normal(second, (10, hidden)) * np.sqrt(2 / hidden).astype("float32"),
        "b2": jnp.zeros(10),
    }


# -------------------------------------------------------------------------------------- fnn


def swept(networks: int, hidden: int, layout: str | None) -> Callable[[], object]:
    """The sweep's own training, its programs compiled and its layout chosen beforehand."""
    X, y = data()
    net = chain(hidden=Linear(hidden), f=ops.relu, output=Linear(10))
    loss = fnn.supervised(net, ops.softmax_cross_entropy)
    epochs = -(-STEPS // 11)

    def init(seed):
        params = initial(hidden, seed)
        return {
            "hidden": {"W": params["W1"], "b": params["b1"]},
            "output": {"W": params["W2"], "b": params["b2"]},
        }

    prepared = fnn.sweeps.Prepared(
        loss,
        {"seed": range(networks)},
        (X, y),
        optimizer=optax.adam(RATE),
        init=init,
        epochs=epochs,
        batch_size=BATCH,
        layout=layout,
        progress=False,
    )
    return prepared
