"""The loss: what it is given, over a batch, and of a network on inputs and targets."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.arguments import name_of
from fnn.batch import batch_size
from fnn.layers.layer import Layer, as_layer, run
from fnn.layers.mode import EVALUATE, Mode, training
from fnn.meshes import dealt_alike
from fnn.sharding import Layout
from fnn.train.devices import across, gathered

# ------------------------------------------------------------- a loss, of an example and of a batch

Loss = Callable[..., Any]

# The names of what a step, `fit` and `evaluate` put beside a loss's own metrics. A loss is refused
# them everywhere, so that one that serves in one place serves in the others.
RESERVED = (
    *("loss", "grad_norm", "skipped", "loss_scale", "seconds", "learning_rate", "rolled_back"),
    *("epoch", "step"),  # of the logs
)
RESERVED_PREFIX = "validation_"

# The name of the mapped axis over the batch, where a loss takes a mode.
AXIS = "batch"


class Extras(NamedTuple):
    """What a loss names beside `params` and `example`, and is therefore given: its arguments.

    Fields:
        key: a key for each example.
        mode: the `Mode`: training over the axis AXIS with a key for each example, or EVALUATE.
        state: the network's state; the loss returns the new one, last.
    """

    key: inspect.Parameter | None = None
    mode: inspect.Parameter | None = None
    state: inspect.Parameter | None = None

    @property
    def may_draw(self) -> bool:
        """Whether a key has a use."""
        return self.key is not None or self.mode is not None

    @property
    def needs_key(self) -> bool:
        return self.key is not None

    @property
    def needs_state(self) -> bool:
        return self.state is not None and self.state.default is self.state.empty


def extras(loss: Loss) -> Extras:
    """What a loss names of `key`, `mode` and `state`.

    A third argument that must be given is a key under other names too: `rng`, `k`, ...
    """
    positional = (arguments.positional(loss) or [])[2:]
    by_keyword = [p for p in arguments.parameters(loss) or [] if p.kind is p.KEYWORD_ONLY]
    named = {p.name: p for p in (*positional, *by_keyword) if p.name in Extras._fields}
    third = positional[0] if positional else None
    if third is not None and third.name not in Extras._fields and third.default is third.empty:
        named.setdefault("key", third)
    return Extras(**named)


def check_loss(where: str, loss: Any, name: str = "loss") -> None:
    """Raise a TypeError unless it can be called as `loss(params, example)`, with a key perhaps."""
    arguments.function(where, name, loss, "a function loss(params, example)")
    parameters, positional = arguments.parameters(loss), arguments.positional(loss)
    if parameters is None or positional is None:
        return
    names = ", ".join(p.name for p in positional)
    form = (
        f"{where}: {name} is called for one example, {name}(params, example), and is also given "
        f"what it names of key, mode and state, but {name_of(loss)}({names})"
    )
    gathers = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(positional) < 2 and not gathers:
        raise TypeError(f"{form} takes {len(positional)} of these arguments.")
    given = [p for p in extras(loss) if p is not None]
    known = [p for p in given if p.name in Extras._fields or _is_key(p)]
    others = [p.name for p in positional[2:] if p.default is p.empty and p not in known]
    if others:
        raise TypeError(
            f"{form} wants more: {', '.join(dict.fromkeys(others))}. One example may be a tuple of "
            "arrays: `x, y = example`. Close over what all examples share."
        )
    wanted = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if set(wanted) - set(Extras._fields):
        raise TypeError(
            f"{form} wants {', '.join(wanted)} by keyword: give it by functools.partial."
        )


def check_key(found: Extras, key: Any) -> None:
    """Raise a TypeError unless a key is there if the loss needs one, and not if it has no use."""
    if found.needs_key and key is None:
        raise TypeError(
            "the loss takes a key, loss(params, example, key): pass key=... to the step."
        )
    if key is not None and not found.may_draw:
        raise TypeError(
            "a key was passed, but the loss takes none: it must be loss(params, example, key), or "
            "loss(params, example, mode)."
        )
    if key is not None:
        arguments.key("train_step", "key", key)


def check_model_state(where: str, loss: Loss, given: Any) -> None:
    """Raise a TypeError if a network's state is given that the loss doesn't take."""
    if extras(loss).state is None and jax.tree.leaves(given):
        raise TypeError(
            f"{where}: model_state is given, but the loss {name_of(loss)} takes no state: it must "
            "be loss(params, example, state), and return the new state last. (Else leave "
            "model_state out.)"
        )


def call(
    loss: Loss,
    params: Any,
    example: Any,
    key: Any = None,
    mode: Mode = EVALUATE,
    state: Any = None,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """What a loss returns for one example: the scalar, its metrics, and the new state or None.

    An error inside the loss gets a note that there is one example.
    """
    found = extras(loss)
    values = key, mode, {} if state is None else state
    given = {
        parameter.name: value
        for parameter, value in zip(found, values, strict=True)
        if parameter is not None and not (parameter is found.key and value is None)
    }
    # By position in the loss's own order, with the defaults of what stands between.
    only = [p for p in (arguments.positional(loss) or [])[2:] if p.kind is p.POSITIONAL_ONLY]
    while only and only[-1].name not in given:
        only.pop()
    by_position = [given.pop(p.name, p.default) for p in only]
    with arguments.one_example(loss, example):
        out = loss(params, example, *by_position, **given)
    new = None
    if found.state is not None:
        if not isinstance(out, tuple) or len(out) not in (2, 3):
            got = f"a tuple of {len(out)}" if isinstance(out, tuple) else arguments.show(out)
            raise TypeError(
                f"the loss {name_of(loss)} takes a state, so it must return (loss, state) or "
                f"(loss, metrics, state), but returned {got}."
            )
        *rest, new = out
        out = rest[0] if len(rest) == 1 else tuple(rest)
    return *scalar_and_metrics(loss, out), new


def _is_key(parameter: inspect.Parameter) -> bool:
    name = parameter.name.lower().strip("_")
    return name in ("", "k", "r") or any(word in name for word in ("key", "rng", "rand", "seed"))


def batch_losses(
    loss: Loss,
    params: Any,
    batch: Any,
    size: int,
    key: Any = None,
    *,
    train: bool,
    state: Any = None,
    layout: Layout | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """The loss and the metrics of each example of a batch, and the new state of all.

    Args:
        loss: `loss(params, example)`, with what it names of `key`, `mode` and `state`.
        params: shared by all examples.
        batch: a tree of arrays with a leading axis of `size` examples.
        size: the number of examples.
        key: split into one for each example, or None.
        train: whether the mode is training.
        state: the network's, shared by all examples.
        layout: where all that lies, on a mesh of devices.

    Returns:
        `(losses, metrics, state)`: an array `(size,)`, a dict of arrays `(size, ...)`, and the
        state (None if the loss takes none).

    Raises:
        TypeError, ValueError: the loss isn't a real scalar, its metrics aren't a dict of
            arrays under names of their own, or it gives each example a state of its own.
    """
    keys = keys_of(key, size)
    return example_losses(loss, params, batch, keys, train=train, state=state, layout=layout)


def keys_of(key: Any, size: int) -> Any:
    """A key for each of `size` examples; None for None."""
    return None if key is None else jax.random.split(key, size)


def example_losses(
    loss: Loss,
    params: Any,
    batch: Any,
    keys: Any,
    *,
    train: bool,
    state: Any = None,
    layout: Layout | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """`batch_losses`, with a key for each example."""
    found = extras(loss)
    axis = AXIS if train and found.mode is not None else None

    def of_example(example, key):
        own = key
        if key is not None and found.key is not None and found.mode is not None:
            own, key = jax.random.split(key)
        mode = training(key, axis) if train else EVALUATE
        if layers is not None:
            mode = dataclasses.replace(mode, across=layers)
        return call(loss, params, example, own, mode, state)

    layers = across(layout, batch_size(batch))
    params = gathered(layout, params, found.mode is not None)
    batch, keys = dealt_alike((batch, keys))
    over_batch = jax.vmap(
        of_example,
        out_axes=(0, 0, None),
        axis_name=axis,
        spmd_axis_name=layout.batch if layout is not None and layers and layers.pinned else None,
    )
    try:
        return over_batch(batch, keys)
    except ValueError as error:
        if found.state is None or "out_axes" not in str(error):
            raise
        raise ValueError(
            f"the loss {name_of(loss)} returned a state that differs from example to example, but "
            "one state belongs to the whole batch: average over it by jax.lax.pmean(x, mode.axis)."
        ) from error


def counting(size: int, count: Any) -> jax.Array | None:
    """Whether each of a batch's `size` rows is one of the first `count`; None for all."""
    if count is None:
        return None
    count = jnp.asarray(count)
    return jnp.arange(size, dtype=count.dtype) < count


def batch_means(
    loss: Loss,
    params: Any,
    batch: Any,
    size: int,
    key: Any = None,
    *,
    state: Any = None,
    count: Any = None,
    layout: Layout | None = None,
) -> dict[str, jax.Array]:
    """The mean loss, and each metric's (True is 1), of a batch that isn't trained on.

    See `batch_losses`.

    Args:
        count: how many of the batch's first examples count; all unless given.
    """
    losses, metrics, _ = batch_losses(
        loss, params, batch, size, key, train=False, state=state, layout=layout
    )

    counts = counting(size, count)

    def mean(values):
        if counts is None:
            return jnp.mean(values, axis=0)
        return jnp.mean(values, axis=0, where=counts.reshape(-1, *[1] * (values.ndim - 1)))

    return {"loss": mean(losses), **jax.tree.map(mean, metrics)}


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
        if not metric:
            raise ValueError(f"the loss {name} returns a metric whose name is empty.")
        if metric in RESERVED or metric.startswith(RESERVED_PREFIX):
            raise ValueError(
                f"the loss {name} returns a metric {metric!r}, a name that training itself uses "
                f"(as it does {', '.join(RESERVED)} and {RESERVED_PREFIX}...): choose another."
            )
        try:
            if entry is None:  # whose dtype would be float's
                raise TypeError
            dtype = jnp.result_type(entry)
        except TypeError:
            raise TypeError(
                f"the loss {name} returns a metric {metric!r} that is no array but a "
                f"{type(entry).__name__}."
            ) from None
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            raise TypeError(
                f"the loss {name} returns a metric {metric!r} of dtype {dtype}, but metrics are "
                "numbers."
            )
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"the loss {name} returns a metric {metric!r} of dtype {dtype}, but metrics are "
                "real: return its absolute value, or its real and imaginary parts."
            )
    return value, {metric: jnp.asarray(entry) for metric, entry in metrics.items()}


# ---------------------------------------------------------------------------- the loss of a network


def supervised(
    net: Layer | Callable[[Any, Any], Any],
    loss: Callable[[Any, Any], Any],
    **metrics: Callable[[Any, Any], Any],
) -> Supervised:
    """The loss of a network for `train_step`, `fit` and `evaluate`: loss(net(params, x), target).

        right = lambda scores, label: jnp.argmax(scores) == label
        loss = fnn.supervised(net, ops.softmax_cross_entropy, accuracy=right)
        result = fnn.fit(loss, params, (X, y), optax.adam(1e-3), epochs=10, key=key)

    Args:
        net: a layer; or any function `net(params, x)` of one example.
        loss: `loss(output, target)`, a scalar.
        **metrics: `metric(output, target)`, by name.

    Returns:
        A function `(params, example)` of one example, a pair `(x, target)`. It returns the loss,
        or with metrics a pair of the loss and a dict of them. It also takes the `mode` in which
        the network is called (evaluation unless given), and the network's `state`; with a state
        it returns the new one, last. The training step gives it both; `fit` begins with
        `net.init_state(x)` unless told otherwise.

    Raises:
        TypeError: net, loss or a metric isn't a function; (when called) the example is no pair.
    """
    if not isinstance(net, Layer):
        form = "a layer, or a function net(params, x)"
        arguments.function("supervised", "net", net, form)
        if isinstance(net, type):
            as_layer(net, "supervised")  # says that it makes a layer
    arguments.function("supervised", "loss", loss, "a function loss(output, target)")
    for name, metric in metrics.items():
        arguments.function("supervised", name, metric, "a function metric(output, target)")
    return Supervised(net, loss, tuple(metrics.items()))


@dataclasses.dataclass(frozen=True, repr=False)
class Supervised:
    """See `supervised`, which makes it.

    Fields:
        net, loss: as given there.
        metrics: pairs of a name and a function.
    """

    net: Layer | Callable
    loss: Callable
    metrics: tuple[tuple[str, Callable], ...] = ()

    def __call__(
        self, params: Any, example: Any, *, mode: Mode = EVALUATE, state: Any = None
    ) -> Any:
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise TypeError(
                f"{self} wants one example as a pair (x, target), but got "
                f"{arguments.shapes(example)}."
            )
        x, target = example
        if isinstance(self.net, Layer):
            output, new = run(self.net, params, {} if state is None else state, (x,), mode)
        else:
            output, new = self.net(params, x), state
        found = [self.loss(output, target)]
        if self.metrics:
            found.append({name: metric(output, target) for name, metric in self.metrics})
        if state is not None:
            found.append(new)
        return found[0] if len(found) == 1 else tuple(found)

    def init_state(self, example: Any) -> Any:
        """The network's state to start from, `net.init_state(x)`."""
        return self.net.init_state(example[0]) if isinstance(self.net, Layer) else {}

    def __repr__(self) -> str:
        parts = [repr(self.net) if isinstance(self.net, Layer) else arguments.name_of(self.net)]
        parts.append(arguments.name_of(self.loss))
        parts += [f"{name}={arguments.name_of(metric)}" for name, metric in self.metrics]
        return f"supervised({', '.join(parts)})"
