"""`fit`: training steps over epochs, which Ctrl-C ends between two steps."""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import optax

from fnn import arguments
from fnn.batch import batch_size as size_of
from fnn.batch import example_types
from fnn.params import Where
from fnn.train.checks import check_values
from fnn.train.data import Arrays, Stream, batches_of, is_tree_of_arrays
from fnn.train.evaluation import Evaluation, fold_in
from fnn.train.loss import Extras, Loss, check_loss, extras
from fnn.train.loss_scaling import DynamicLossScale
from fnn.train.nonfinite import NonFiniteError
from fnn.train.outcome import NonFinite
from fnn.train.progress import progress_for
from fnn.train.result import FitResult, Work, attach
from fnn.train.state import State, check_optimizer, own
from fnn.train.step import TrainStep

# ------------------------------------------------------------------------------------------- Ctrl-C
# Ctrl-C between steps, never inside one.
#
# A step donates the state. A KeyboardInterrupt that struck after the step has run and before
# its result has a name would lose both.

GRACE = 1.0


class Interrupts:
    """While entered, Ctrl-C waits for the end of a block `with interrupts.held():`.

    Elsewhere it raises a KeyboardInterrupt as always (so does a second Ctrl-C inside the
    block: the step may hang). For a second after it was raised, others are let pass: a hurried
    or bouncing key must not strike what saves the work. Outside the main thread, or where the
    program has a handler of its own for the signal, nothing changes.
    """

    def __init__(self):
        self._holding = False
        self._pending = False
        self._installed = False
        self._raised = -math.inf

    def __enter__(self) -> Interrupts:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *_):
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._installed = False

    def _handle(self, signum, frame):
        if time.monotonic() - self._raised < GRACE:
            return
        if self._holding and not self._pending:
            self._pending = True
        else:
            self._raise()

    def _raise(self):
        self._pending = False
        self._raised = time.monotonic()
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let the block end before a Ctrl-C inside it is raised."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending:
            self._raise()


# ---------------------------------------------------------------------------------------------- fit


def fit(
    loss: Loss,
    params: chex.ArrayTree | State,
    data: Any,
    optimizer: optax.GradientTransformation,
    *,
    epochs: int,
    batch_size: int | None = None,
    key: chex.PRNGKey | None = None,
    shuffle: bool = True,
    steps_per_epoch: int | None = None,
    validation: Any = None,
    validation_loss: Loss | None = None,
    after_epoch: Callable[[int, State, dict[str, Any]], Any] | None = None,
    progress: bool = True,
    nonfinite: NonFinite = "raise",
    check: bool = True,
    model_state: chex.ArrayTree | None = None,
    trainable: Where | None = None,
    accumulate: int = 1,
    compute: Any = None,
    loss_scale: float | str | DynamicLossScale | None = None,
    ema: float | None = None,
    clip: float | None = None,
) -> FitResult:
    """Train: `epochs` times over the data, a batch at a time.

        result = fnn.fit(loss, params, (X, y), optax.adam(1e-3), epochs=20, key=jax.random.key(0))

    Args:
        loss: for ONE example: `loss(params, example)`, which returns a scalar, or a scalar and a
            dict of metrics (not called `loss`, `grad_norm`, `skipped`, `loss_scale`, `seconds` or
            `validation_...`). It is given what else it names of `key`, `mode` and `state`; see
            `train_step`, and `supervised`, which writes it. It must depend on a parameter.
        params: the parameters to start from (they stay yours), or the `state` of a FitResult
            to go on from. With the same data, batch size and key, 2 epochs and 2 more are the
            same as 4, to the last bit: the state knows its place in the data, also in the midst
            of an epoch, and epochs are counted on from there.
        data: a tuple, dict or other tree of arrays with the examples along their first axes,
            like `(X, y)`; or a list or any iterable of batches; or a function that returns an
            iterable for each epoch, of no arguments or of a key. (A list is always an
            iterable of batches.) Arrays of other libraries, and lists of numbers, are converted;
            numbers that JAX has no room for (2³² + 1 where it computes in 32 bits), masked
            entries and arrays of anything but numbers are refused.
        optimizer: any optax transformation; see `train_step`.
        epochs: how many times to go over the data (from here on, for a `state`; the rest of an
            epoch that was interrupted counts as one).
        batch_size: for arrays; 128 by default. The last batch of an epoch may be smaller (one
            more shape to compile); no example is left out.
        key: for shuffling, and for the loss. The same key, data and program give the same
            result.
        shuffle: whether to shuffle arrays anew in each epoch.
        steps_per_epoch: for an iterable that doesn't end, how many batches to call an epoch. An
            epoch with fewer is an error.
        validation: arrays or an iterable of batches, evaluated after each epoch.
        validation_loss: the loss for that; by default `loss`.
        after_epoch: called with the epoch's number (from 1, counted on for a `state`), the State
            and the epoch's record; if it returns True, training stops. The state's buffers are
            only good until it returns: copy what you keep.
        progress: show a bar on a terminal (if `rich` is there). Elsewhere print lines: at most
            21 for the epochs (each of up to 20 epochs; of more the first, the last, and every
            n-th, n = ⌈epochs / 20⌉), and one every half minute within a long epoch.
        nonfinite: what to do about inf and nan; see `train_step`.
        check: look at the values of the data before the first step (of an iterable's batches as
            they come, see `TrainStep`): nan, and labels out of range. Shapes are always checked.
        model_state: the network's state to start from, `net.init_state(x)`, for a loss that takes
            one; a loss made by `supervised` makes it itself. It is trained in `state.model_state`.
        trainable, accumulate, compute, loss_scale, ema, clip: see `train_step`.

    Returns:
        A `FitResult`. Ctrl-C ends training early and returns what was trained so far, with
        `interrupted=True`.

    Raises:
        TypeError, ValueError: the arguments don't fit each other; before anything is compiled
            where it can be known.
        NonFiniteError: with nonfinite="raise".
        Exception: whatever the data, `after_epoch` or a step raises passes through.
        Once training has begun, every error has an attribute `result`: the FitResult up to the
        last good step, to go on from. (If the device failed in a step, which had taken the state:
        up to the last epoch of which a copy was kept. fit keeps one as often as it costs less
        than a hundredth of the time.) What is wrong with stdout ends the display alone.

    The host waits for the device once an epoch, to read the metrics.
    """
    check_loss("fit", loss)
    check_optimizer("fit", optimizer)
    if not isinstance(params, State):
        arguments.no_result("fit", "params", params)
    epochs = arguments.integer("fit", "epochs", epochs, least=0)
    arguments.choice("fit", "nonfinite", nonfinite, ("raise", "skip", "ignore"))
    for name, value in {"shuffle": shuffle, "progress": progress, "check": check}.items():
        arguments.flag("fit", name, value)
    if key is not None:
        arguments.key("fit", "key", key)
    if validation_loss is not None:
        check_loss("fit", validation_loss, "validation_loss")
        if validation is None:
            raise ValueError("fit: validation_loss is given, but no data for it: validation=...")
    if after_epoch is not None:
        form = "a function after_epoch(epoch, state, record)"
        arguments.function("fit", "after_epoch", after_epoch, form)
    found = extras(loss)
    if found.needs_key and key is None:
        raise TypeError("the loss takes a key, loss(params, example, key): pass key=... to fit.")
    if isinstance(params, State) and model_state is not None:
        raise TypeError("fit: params is a training State, which has a model_state: give only one.")
    training = batches_of(
        "fit", data, batch_size=batch_size, shuffle=shuffle, epochs=epochs, steps=steps_per_epoch
    )
    whole = training.data if isinstance(training, Arrays) else None  # to be looked at once
    if whole is not None and shuffle and key is None:
        raise ValueError(
            "shuffling needs a key: pass key=jax.random.key(0), say, or shuffle=False."
        )
    step = TrainStep(
        loss,
        optimizer,
        nonfinite=nonfinite,
        check=check and whole is None,
        trainable=trainable,
        accumulate=accumulate,
        compute=compute,
        loss_scale=loss_scale,
        ema=ema,
        clip=clip,
    )
    if not isinstance(params, State):
        model_state = _initial_model_state(loss, found, training, model_state)
    start = functools.partial(_start, step, params, model_state)
    state = start()
    order_key, loss_key, validation_key = (None,) * 3 if key is None else jax.random.split(key, 3)
    if whole is not None and check:
        check_values(
            step.find_labels,
            state.params,
            whole,
            key if found.may_draw else None,
            state.model_state,
            "data",
        )
    validate = _validation(
        validation, validation_loss or loss, state, batch_size, epochs, validation_key, check
    )

    work = Work(step, state, start, training.steps)
    first = work.epoch
    last = first + epochs - 1
    display = progress_for(progress, last, training.steps, first)
    with Interrupts() as interrupts:
        try:
            for epoch in range(first, last + 1):
                began, keys = time.perf_counter(), fold_in(order_key, epoch)
                for batch in training.epoch(keys, work.batch):
                    with interrupts.held():
                        own_key = fold_in(loss_key, work.seen) if found.may_draw else None
                        work.size = size_of(batch)
                        state, metrics = step(state, batch, key=own_key)
                        work.log.add(metrics, work.size)
                    display.step(epoch, work.batch, work.log.latest)
                if work.batch == 0:
                    raise ValueError(f"data gave no batches in epoch {epoch}.")
                with interrupts.held():
                    work.made.clear()
                    step.finish(state)
                    record = work.log.epoch_means() if work.log.epoch_has_begun else {}
                    state = work.epoch_over(state)
                record |= validate(state)
                record["seconds"] = time.perf_counter() - began
                with interrupts.held():
                    work.log.end_epoch(record)
                    work.save(state)
                display.epoch(epoch, record)
                if after_epoch is not None and after_epoch(epoch, state, record):
                    break
            result = work.result(state)
        except KeyboardInterrupt:
            result = work.result(state, interrupted=True)
            display.say(f"Interrupted in epoch {work.epoch}, after {work.log.count} steps.")
        except BaseException as error:
            attach(error, work.result(state, failed=not isinstance(error, NonFiniteError)))
            raise
        finally:
            display.close()
    return result


def _start(step: TrainStep, params: Any, model_state: Any) -> State:
    """The state to start from, in arrays of its own."""
    return own(params) if isinstance(params, State) else step.init(params, model_state)


def _initial_model_state(loss: Loss, found: Extras, training: Arrays | Stream, given: Any) -> Any:
    """The network's state to start from: the one given, or what `supervised` knows to make."""
    if given is not None or found.state is None:
        return given
    make = getattr(loss, "init_state", None)
    if make is None and found.needs_state:
        raise TypeError(
            "the loss takes a state: pass model_state=net.init_state(x) to fit, for an example x."
        )
    if make is None or not isinstance(training, Arrays):
        return None  # batches of an iterable are looked at once only
    return make(example_types(training.data))


def _validation(
    data: Any,
    loss: Loss,
    state: State,
    batch_size: int | None,
    epochs: int,
    key: Any,
    check: bool,
) -> Callable[[State], dict[str, Any]]:
    """A function from the state to the validation's part of an epoch's record."""
    if data is None:
        return lambda state: {}
    draws = extras(loss).needs_key
    if draws and key is None:
        raise TypeError("the validation loss takes a key: pass key=... to fit.")
    size = batch_size if is_tree_of_arrays(data) else None
    source = batches_of(
        "fit", data, batch_size=size, shuffle=False, epochs=epochs, name="validation"
    )
    evaluation = Evaluation(lambda: loss)
    if check and isinstance(source, Arrays):  # before training begins, and no more
        check_values(
            evaluation.find_labels,
            state.params,
            source.data,
            key if draws else None,
            state.model_state,
            "validation",
        )
        check = False

    def validate(state):
        means = evaluation.means(state.params, state.model_state, source, key, check, "validation")
        return {f"validation_{name}": value for name, value in means.items()}

    return validate
