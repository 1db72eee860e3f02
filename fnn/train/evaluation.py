"""`evaluate`: the loss and the metrics on data that isn't trained on."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.train.bad_input import batch_size as size_of
from fnn.train.batch_loss import Loss, batch_losses, mean_metrics, takes_key
from fnn.train.batches import Arrays, Stream, batches_of
from fnn.train.history import weighted_mean


def evaluate(
    loss: Loss,
    params: Any,
    data: Any,
    *,
    batch_size: int | None = None,
    key: Any = None,
) -> dict[str, float]:
    """The mean loss and metrics over all examples of the data, each counted once.

    Args:
        loss: as for `train_step`, for one example.
        params: the parameters.
        data: arrays like `(X, y)`, or an iterable of batches, as for `fit`.
        batch_size: how many examples at once, for arrays; 128 by default.
        key: for a loss that takes one.

    Returns:
        `{"loss": ..., metric: ...}` as Python floats (arrays for metrics that are arrays).

    Raises:
        TypeError, ValueError: as in `fit`, for the data.
    """
    if takes_key(loss) and key is None:
        raise TypeError("the loss takes a key: pass key=...")
    source = batches_of(data, batch_size=batch_size, shuffle=False, epochs=1)
    return evaluate_batches(loss, params, source, key if takes_key(loss) else None)


def evaluate_batches(loss: Loss, params: Any, source: Arrays | Stream, key: Any) -> dict[str, Any]:
    """`evaluate`, for data that are batches already."""
    means, sizes = [], []
    for i, batch in enumerate(source.epoch(key)):
        sizes.append(size_of(batch))
        means.append(_means(loss, params, batch, fold_in(key, i)))
    if not means:
        raise ValueError("the data has no batches to evaluate.")
    return weighted_mean(jax.device_get(means), sizes)


@functools.partial(jax.jit, static_argnums=0)
def _means(loss: Loss, params: Any, batch: Any, key: Any) -> dict[str, jax.Array]:
    losses, metrics = batch_losses(loss, params, batch, size_of(batch), key)
    return {"loss": jnp.mean(losses), **mean_metrics(metrics)}


@jax.jit
def _fold(key, i):
    return jax.random.fold_in(key, i)


def fold_in(key: Any, i: int) -> Any:
    """The i-th key drawn from a key; None from None. Compiled: a loop calls it at each step."""
    return None if key is None else _fold(key, np.uint32(i))
