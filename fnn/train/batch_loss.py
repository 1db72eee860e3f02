"""From the loss of one example to the loss of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn.arguments import show
from fnn.layers.layer import name_of

Loss = Callable[..., Any]

# The names of what a step, `fit` and `evaluate` put beside a loss's own metrics. A loss is refused
# them everywhere, so that one that serves in one place serves in the others.
RESERVED = ("loss", "grad_norm", "skipped", "seconds")
RESERVED_PREFIX = "validation_"


def takes_key(loss: Loss) -> bool:
    """Whether a loss is `loss(params, example, key)` rather than `loss(params, example)`."""
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and (p.default is p.empty or p.name == "key")
    ]
    return len(positional) >= 3


def batch_losses(loss: Loss, params: Any, batch: Any, size: int, key: Any = None):
    """The loss and the metrics of each example of a batch.

    Args:
        loss: `loss(params, example)` or, if there is a key, `loss(params, example, key)`, a
            scalar or a pair of a scalar and a dict of metrics.
        params: shared by all examples.
        batch: a tree of arrays with a leading axis of `size` examples.
        size: the number of examples.
        key: split into one for each example, or None.

    Returns:
        `(losses, metrics)`: an array `(size,)` and a dict of arrays `(size, ...)`.

    Raises:
        TypeError, ValueError: the loss isn't a real scalar, or its metrics aren't a dict of
            arrays under names of their own.
    """

    def of_example(example, *key):
        return scalar_and_metrics(loss, loss(params, example, *key))

    if key is None:
        return jax.vmap(of_example)(batch)
    return jax.vmap(of_example)(batch, jax.random.split(key, size))


def mean_loss(loss: Loss, params: Any, batch: Any, size: int, key: Any = None):
    """`(mean loss, (losses, metrics))`, the form that `value_and_grad` takes with `has_aux`."""
    losses, metrics = batch_losses(loss, params, batch, size, key)
    return jnp.mean(losses), (losses, metrics)


def mean_metrics(metrics: dict) -> dict:
    """Each metric's mean over the examples (True is 1)."""
    return {name: jnp.mean(value, axis=0) for name, value in metrics.items()}


def scalar_and_metrics(loss: Loss, out: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What a loss returned for one example, as a pair; or an error that says what it must be."""
    name = name_of(loss)
    metrics: dict[str, Any] = {}
    if isinstance(out, tuple):
        if len(out) != 2 or not isinstance(out[1], dict):
            got = f"a tuple of {len(out)}: ({', '.join(type(o).__name__ for o in out)})"
            raise TypeError(
                f"the loss {name} must return a scalar, or a scalar and a dict of metrics, for "
                f"one example, but returned {got}."
            )
        out, metrics = out
    if not hasattr(out, "shape") and not isinstance(out, (int, float)):
        raise TypeError(
            f"the loss {name} must return a scalar, but returned a {type(out).__name__}."
        )
    value = jnp.asarray(out)
    if value.shape != ():
        raise ValueError(
            f"the loss {name} must return a scalar for one example, but returned an array of shape "
            f"{value.shape}. (A loss sees one example; train_step maps it over the batch.)"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"the loss {name} must return a real float, but returned {value.dtype}.")
    for metric, entry in metrics.items():
        if not isinstance(metric, str):
            raise TypeError(f"the loss {name} returns a metric whose name is {show(metric)}.")
        if metric in RESERVED or metric.startswith(RESERVED_PREFIX):
            raise ValueError(
                f"the loss {name} returns a metric {metric!r}, a name that training itself uses "
                f"(as it does {', '.join(RESERVED)} and {RESERVED_PREFIX}...): choose another."
            )
        try:
            jnp.result_type(entry)
        except TypeError:
            raise TypeError(
                f"the loss {name} returns a metric {metric!r} that is no array but a "
                f"{type(entry).__name__}."
            ) from None
    return value, {metric: jnp.asarray(entry) for metric, entry in metrics.items()}
