"""`find_learning_rate`: a short training whose learning rate grows from step to step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import arguments
from fnn.batch import batch_size as size_of
from fnn.batch import example_types
from fnn.meshes import beside
from fnn.readings import Kept
from fnn.train.data import Arrays, batches_of, fold_in
from fnn.train.loss import Loss, check_loss, check_model_state, extras
from fnn.train.state import State, check_not_donated, floats_among, with_extra_args
from fnn.train.step import TrainStep, check_optimizer, train_step

# From four times the loss at the start on, training is taken to diverge.
_DIVERGED = 4.0


class LearningRates(NamedTuple):
    """What `find_learning_rate` returns; `fnn.plot.learning_rates` draws it.

    Fields:
        rates: the learning rate of each step, `(steps,)`, each larger than the one before by the
            same factor.
        losses: the loss of the next batch after each step, `(steps,)`.
        smoothed: the losses before training diverged, smoothed: at each rate the value of the
            line of least squares through the losses of the rates around it, `(at most steps,)`.
        suggestion: the rate, up to that of the lowest smoothed loss, at which that line falls most
            steeply against the logarithm of the rate; None if it falls nowhere.
        diverged: the smallest rate after which the loss was inf, nan, or four times that of the
            start (L + 3|L|, for a negative L too); None if there is none.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float | None
    diverged: float | None

    def __repr__(self) -> str:
        """What was found, in a line; the arrays stay out of it."""
        at = lambda rate: "none" if rate is None else f"{rate:.3g}"
        return (
            f"LearningRates(suggestion={at(self.suggestion)}, diverged={at(self.diverged)}, "
            f"{len(self.rates)} rates from {self.rates[0]:.3g} to {self.rates[-1]:.3g})"
        )


def find_learning_rate(
    loss: Loss,
    params: chex.ArrayTree | State,
    data: Any,
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.adam,
    *,
    lowest: float = 1e-6,
    highest: float = 10.0,
    steps: int = 100,
    batch_size: int | None = None,
    key: chex.PRNGKey | None = None,
    model_state: chex.ArrayTree | None = None,
) -> LearningRates:
    """Train for a few steps, each with a larger learning rate; see at which the loss falls fastest.

        found = fnn.find_learning_rate(loss, params, (X, y), optax.adam, key=jax.random.key(0))
        fnn.plot.learning_rates(found)
        result = fnn.fit(loss, params, (X, y), optax.adam(found.suggestion), ...)

    All steps are one compiled program, a scan, which is kept as long as loss and optimizer are. The
    parameters that are given stay as they are.

    Args:
        loss: for ONE example, as for `train_step`.
        params: the parameters to start from; or a training State, for them and the network's
            state. All floats among them are trained; integers stay as they are.
        data: as for `fit`: arrays like `(X, y)`, or an iterable of batches. Arrays are shuffled if
            there is a key, and gone over as often as the steps need. The steps' batches are on the
            device at once; short ones are left out.
        optimizer: a function of a learning rate that returns an optax transformation, as
            `optax.adam` is, or `lambda rate: optax.sgd(rate, momentum=0.9)`. It is called with an
            array under trace, as by `optax.inject_hyperparams`.
        lowest, highest: the first and the last rate. In between they grow exponentially.
        steps: how many.
        batch_size: for arrays; 128 by default.
        key: for shuffling, and for the loss.
        model_state: the network's state, for a loss that takes one; by default that of a State, or
            the one that a loss made by `supervised` makes.

    Returns:
        `LearningRates`.

    Raises:
        TypeError, ValueError: the arguments aren't such, or don't fit each other.

    The range test is Smith's ("Cyclical learning rates for training neural networks", 2017,
    arXiv:1506.01186, section 3.3); to take the steepest descent is the usual reading of it. The
    suggestion is where to begin, and not the best rate: a long training wants a smaller one.
    """
    where = "find_learning_rate"
    check_loss(where, loss)
    arguments.function(where, "optimizer", optimizer, "a function of a learning rate: optax.adam")
    steps = arguments.integer(where, "steps", steps, least=5)
    lowest = float(arguments.number(where, "lowest", lowest, above=0))
    highest = float(arguments.number(where, "highest", highest, above=lowest))
    if key is not None:
        arguments.key(where, "key", key)
    found = extras(loss)
    if found.needs_key and key is None:
        raise TypeError(f"{where}: the loss takes a key: pass key=...")
    check_model_state(where, loss, model_state)
    if isinstance(params, State):
        check_not_donated(params)
        if model_state is None and found.state is not None:
            model_state = params.model_state
        params = params.params
    rates = np.geomspace(lowest, highest, steps)
    order_key, loss_key, _ = (None,) * 3 if key is None else jax.random.split(key, 3)  # as in fit
    batches = _batches(where, data, batch_size, order_key, steps + 1)
    if model_state is None and found.state is not None and hasattr(loss, "init_state"):
        model_state = loss.init_state(example_types(jax.tree.map(lambda x: x[0], batches)))
    step = _step(loss, optimizer, rates, params)
    state = beside(step.init(params, model_state), batches)
    with _kept.found_or(_Search, loss, optimizer) as search:
        losses = search.losses(state, batches, loss_key, rates)
    # The loss that a step reports is that before it.
    return _read(rates, np.asarray(losses, float)[1:])


class _Search:
    """The program of a search.

    Args:
        loss, optimizer: functions that return them.
    """

    def __init__(self, loss: Callable[[], Loss], optimizer: Callable[[], Callable]):
        traces: list[str] = []
        self.traces = traces

        @jax.jit
        def losses(state, batches, key, rates):
            traces.append("losses")
            step = _step(loss(), optimizer(), rates, state.params)
            own_key = key if extras(loss()).may_draw else None

            def one(state, numbered):
                i, batch = numbered
                own = None if own_key is None else jax.random.fold_in(own_key, i)
                state, metrics = step(state, batch, key=own)
                return state, metrics["loss"]

            return jax.lax.scan(one, state, (jnp.arange(len(rates) + 1), batches))[1]

        self.losses = losses


_kept: Kept[_Search] = Kept()


def _step(loss: Loss, optimizer: Callable, rates: Any, params: Any) -> TrainStep:
    """The step. It trains the floats: there may be integers that `trainable=...` left out."""
    where = "find_learning_rate"
    growing = _growing(where, optimizer, rates)
    is_float = lambda path, x: jnp.issubdtype(x.dtype, jnp.inexact)
    trainable = None if all(floats_among(where, params, "to train")) else is_float
    return train_step(loss, growing, nonfinite="ignore", check=False, trainable=trainable)


def _read(rates: np.ndarray, losses: np.ndarray) -> LearningRates:
    """What the losses say."""
    around = max(2, len(rates) // 20)
    finite = np.isfinite(losses)
    before = int(np.argmin(np.append(finite, False)))  # how many are, before the first that isn't
    start = float(np.mean(losses[: min(around + 1, before)])) if before else 0.0
    limit = start + (_DIVERGED - 1) * abs(start)
    bad = np.flatnonzero(~(finite & (losses <= limit)))
    end = int(bad[0]) if bad.size else len(losses)
    diverged = float(rates[end]) if bad.size else None
    smoothed, slopes = np.full(end, np.nan), np.full(end, np.nan)
    for i in range(end):
        near = slice(max(0, i - around), min(end, i + around + 1))
        x = np.log(rates[near]) - np.log(rates[i])
        if x.size < 3:
            smoothed[i] = losses[i]
            continue
        slopes[i], smoothed[i] = np.polyfit(x, losses[near], 1)
    # Beyond the lowest loss it may rise, and fall again from there: that is no training.
    until = slopes[: int(np.argmin(smoothed)) + 1] if end else slopes
    falls = np.nanmin(until, initial=0.0) < 0
    suggestion = float(rates[int(np.nanargmin(until))]) if falls else None
    return LearningRates(rates, losses, smoothed, suggestion, diverged)


def _batches(where: str, data: Any, size: int | None, key: Any, count: int) -> Any:
    """The batches of the steps, stacked: arrays `(count, size, ...)`."""
    source = batches_of(where, data, batch_size=size, shuffle=key is not None, epochs=1)
    taken: list[Any] = []
    for epoch in itertools.count(1):
        before = len(taken)
        for batch in source.epoch(fold_in(key, epoch)):
            if not taken or size_of(batch) == size_of(taken[0]):
                taken.append(batch)
            if len(taken) == count:
                return jax.tree.map(lambda *xs: jnp.stack(list(map(jnp.asarray, xs))), *taken)
        if len(taken) == before or not (isinstance(source, Arrays) or _comes_again(data)):
            raise ValueError(
                f"{where}: {count - 1} steps take {count} batches of one size, but data gave "
                f"{len(taken)}: pass fewer steps, or arrays."
            )
    raise AssertionError


def _comes_again(data: Any) -> bool:
    """Whether an iterable of batches can be gone over once more."""
    return callable(data) or not hasattr(data, "__next__")


def _growing(where: str, optimizer: Callable, rates: Any) -> optax.GradientTransformationExtraArgs:
    """An optimiser that takes its next rate at each step."""

    def at(rate):
        made = optimizer(rate)
        check_optimizer(where, made)
        return with_extra_args(made)

    def init(params):
        return jnp.zeros((), jnp.int32), at(jnp.asarray(rates[0])).init(params)

    def update(updates, state, params=None, **extra):
        count, inner = state
        # The step after the last is taken for its loss, and isn't looked at.
        rate = jnp.asarray(rates)[jnp.minimum(count, len(rates) - 1)]
        updates, inner = at(rate).update(updates, inner, params, **extra)
        return updates, (count + 1, inner)

    return optax.GradientTransformationExtraArgs(init, update)
