"""From the loss of one example to the loss of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.layers.layer import name_of
from fnn.train.meshes import dealt_alike

Loss = Callable[..., Any]

# The names of what a step, `fit` and `evaluate` put beside a loss's own metrics. A loss is refused
# them everywhere, so that one that serves in one place serves in the others.
RESERVED = ("loss", "grad_norm", "skipped", "seconds")
RESERVED_PREFIX = "validation_"


def takes_key(loss: Loss) -> bool:
    """Whether a loss is `loss(params, example, key)` rather than `loss(params, example)`."""
    return _key_parameter(loss) is not None


def check_loss(where: str, loss: Any, name: str = "loss") -> None:
    """Raise a TypeError unless it can be called as `loss(params, example)`, with a key perhaps."""
    arguments.function(where, name, loss, "a function loss(params, example)")
    parameters, positional = arguments.parameters(loss), arguments.positional(loss)
    if parameters is None or positional is None:
        return
    needed = [p for p in positional if p.default is p.empty]
    names = ", ".join(p.name for p in positional)
    form = (
        f"{where}: {name} is called for one example, {name}(params, example) or "
        f"{name}(params, example, key), but {name_of(loss)}({names})"
    )
    gathers = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(positional) < 2 and not gathers:
        raise TypeError(f"{form} takes {len(positional)} of these arguments.")
    others = [p.name for p in needed[2:] if not _is_key(p)] + [p.name for p in needed[3:]]
    if others:
        raise TypeError(
            f"{form} wants more: {', '.join(dict.fromkeys(others))}. One example may be a tuple of "
            "arrays: `x, y = example`. Close over what all examples share."
        )
    wanted = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if set(wanted) - {"key"}:
        raise TypeError(
            f"{form} wants {', '.join(wanted)} by keyword: give it by functools.partial."
        )


def call(loss: Loss, params: Any, example: Any, key: Any = None) -> Any:
    """What a loss returns for one example; an error inside it gets a note that there is one."""
    with arguments.one_example(loss, example):
        if key is None:
            return loss(params, example)
        parameter = _key_parameter(loss)
        if parameter is not None and parameter.kind is parameter.KEYWORD_ONLY:
            return loss(params, example, key=key)
        return loss(params, example, key)


def _key_parameter(loss: Loss) -> inspect.Parameter | None:
    """A third argument that must be given or is named key, or a keyword `key`."""
    third = (arguments.positional(loss) or [])[2:3]
    by_name = [
        p for p in arguments.parameters(loss) or [] if p.kind is p.KEYWORD_ONLY and p.name == "key"
    ]
    named = [p for p in third if p.default is p.empty or p.name == "key"]
    return next(iter(named + by_name), None)


def _is_key(parameter: inspect.Parameter) -> bool:
    name = parameter.name.lower().strip("_")
    return name in ("", "k", "r") or any(word in name for word in ("key", "rng", "rand", "seed"))


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
        return scalar_and_metrics(loss, call(loss, params, example, *key))

    if key is None:
        return jax.vmap(of_example)(dealt_alike(batch))
    return jax.vmap(of_example)(*dealt_alike((batch, jax.random.split(key, size))))


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
            raise TypeError(
                f"the loss {name} returns a metric whose name is {arguments.show(metric)}."
            )
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
