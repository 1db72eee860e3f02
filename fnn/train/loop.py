"""`fit`: training over epochs, in as few calls of the device as can be."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import optax

from fnn import arguments
from fnn.batch import example_types
from fnn.logs import Logs, Writer
from fnn.params import Where
from fnn.sharding import Layout
from fnn.train.call_checks import check_call, step_of
from fnn.train.calls import Calls
from fnn.train.checkpoints import Checkpoints
from fnn.train.checks import check_values
from fnn.train.chunks import Resident
from fnn.train.configuration import of_call
from fnn.train.data import Arrays, Stream, batches_of
from fnn.train.devices import on_its_mesh
from fnn.train.early_stopping import BestKeeper, EarlyStopping
from fnn.train.epoch_end import AfterEpoch, Logged, Shown, validation_of
from fnn.train.events import Listener, Listeners
from fnn.train.interrupts import Interrupts
from fnn.train.keeping import kept
from fnn.train.learning_rate import rate_of
from fnn.train.loss import Extras, Loss, check_key, extras
from fnn.train.loss_scaling import DynamicLossScale
from fnn.train.nonfinite import NonFiniteError
from fnn.train.outcome import NonFinite
from fnn.train.programs import Programs, kept_programs, programs_of
from fnn.train.progress import progress_for
from fnn.train.result import FitResult, Work, attach
from fnn.train.rolling_back import RollingBack
from fnn.train.sources import chunks_of, looking, placed, source_of
from fnn.train.state import State, own
from fnn.train.step import TrainStep


@on_its_mesh
def fit(
    loss: Loss | TrainStep,
    params: chex.ArrayTree | State,
    data: Any,
    optimizer: optax.GradientTransformation | None = None,
    *,
    epochs: int,
    batch_size: int | None = None,
    key: chex.PRNGKey | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    steps_per_epoch: int | None = None,
    steps_per_call: int | None = None,
    validation: Any = None,
    validation_loss: Loss | None = None,
    early_stopping: EarlyStopping | None = None,
    schedule: Callable[[int], Any] | None = None,
    after_epoch: Callable[[int, State, dict[str, Any]], Any] | None = None,
    logs: Sequence[Writer] = (),
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
    checkpoints: Checkpoints | None = None,
    layout: Layout | None = None,
) -> FitResult:
    """Train: `epochs` times over the data, a batch at a time.

        result = fnn.fit(loss, params, (X, y), optax.adam(1e-3), epochs=20, key=jax.random.key(0))

    Args:
        loss: for ONE example: `loss(params, example)`, which returns a scalar, or a scalar and a
            dict of metrics (not called `loss`, `grad_norm`, `skipped`, `loss_scale`, `seconds`,
            `learning_rate`, `rolled_back`, `epoch`, `step` or `validation_...`). It is given what
            else it names of `key`, `mode` and `state`; see `train_step`, and `supervised`, which
            writes it. It must depend on a parameter. Or a `TrainStep`.
        params: the parameters to start from (they stay yours), or the `state` of a FitResult
            to go on from. With the same data, batch size and key, 2 epochs and 2 more are the
            same as 4, to the last bit: the state knows its place in the data, also in the midst
            of an epoch, and epochs are counted on from there.
        data: a tuple, dict or other tree of arrays with the examples along their first axes,
            like `(X, y)`; or a list or any iterable of batches; or a function that returns an
            iterable for each epoch, of no arguments or of a key. (A list is always an
            iterable of batches.) Arrays of other libraries, and lists of numbers, are converted;
            numbers that JAX has no room for (2³² + 1 where it computes in 32 bits), masked
            entries and arrays of anything but numbers are refused. Arrays of up to a quarter of
            the device's memory are put there and shuffled there. Larger ones (`numpy.memmap`, for
            one), and iterables, are read by a thread ahead of the device; an iterator, which can't
            be read twice, in the thread of `fit`.
        optimizer: any optax transformation; see `train_step`. Not given with a TrainStep.
        epochs: how many times to go over the data (from here on, for a `state`; the rest of an
            epoch that was interrupted counts as one).
        batch_size: for arrays; 128 by default. The last batch of an epoch may be smaller; no
            example is left out. It is filled up with examples that don't count, so that it needs no
            program of its own. (Not so if the loss sums over `mode.axis`, as batch statistics do,
            or if the optimiser reads the batch itself, as KFAC does: then it has one.)
        key: for shuffling, and for the loss. The same key, data and program give the same
            result, however epochs are cut into calls.
        shuffle: whether to shuffle arrays anew in each epoch.
        drop_last: for arrays, leave out a last batch that is smaller.
        steps_per_epoch: for an iterable that doesn't end, how many batches to call an epoch. An
            epoch with fewer is an error.
        steps_per_call: how many steps the device makes in one call: as many as take about half a
            second, unless given. Between calls, Ctrl-C is heard and progress is shown.
        validation: arrays or an iterable of batches, evaluated after each epoch.
        validation_loss: the loss for that; by default `loss`.
        early_stopping: an `EarlyStopping`, which ends training where it no longer gets better.
            `result.best` is then the state at the end of the best epoch. (It counts on where a
            checkpoint's did if that had the same monitor, higher and least; else it begins anew.)
        schedule: the learning rate that the optimiser uses, as a function of the number of steps
            before, to be shown in the record as `learning_rate`. (It is shown without this where
            the optimiser's state has it, as with `optax.inject_hyperparams`.)
        after_epoch: called with the epoch's number (from 1, counted on for a `state`), the State
            and the epoch's record; if it returns True, training stops. The state's buffers are
            only good until it returns: copy what you keep.
        logs: where to write each epoch's record, `[fnn.logs.CSV("log.csv"), ...]`: see `fnn.logs`.
            One that can't be begun is an error at once; one that fails later ends nothing.
        progress: show a bar in a notebook, and on a terminal (if `rich` is there). Elsewhere print
            a line for each epoch, and one every half minute within a long epoch.
        nonfinite: what to do about inf and nan; see `train_step`. (A TrainStep has its own: leave
            this out.) With "raise", an update that makes something inf or nan though loss
            and gradient are finite is noticed at the end of a call, whose steps are then made again
            up to the bad one. "roll_back": parameters, optimiser and all else of the state go back
            to the last state of which `fit` kept a copy (see below), the start at first; the
            data go on behind the bad batch. `rolled_back` in the history counts it. The fourth time
            in an epoch it raises.
        check: look at the values of the data before the first step (of an iterable's batches as
            they come, see `TrainStep`): nan, and labels out of range. Shapes are always checked.
        model_state: the network's state to start from, `net.init_state(x)`, for a loss that takes
            one; a loss made by `supervised` makes it itself. It is trained in `state.model_state`.
        checkpoints: `fnn.Checkpoints(folder)`: all is saved there as training goes on, and the same
            call again goes on where the newest checkpoint stands. `epochs` counts from the first
            call's beginning, then.
        trainable, accumulate, compute, loss_scale, ema, clip: see `train_step`.
        layout: how parameters, state and batches are divided over a mesh of devices; see
            `fnn.sharding`. Arrays that fit lie on each of its devices. Of several processes each
            has the same arrays, of which it reads its devices' rows, a step at a time; of an
            iterable each gives its own part of every batch.

    Returns:
        A `FitResult`. Ctrl-C (with checkpoints, SIGTERM too) ends training early and returns what
        was trained so far, with `interrupted=True`.

    Raises:
        TypeError, ValueError: the arguments don't fit each other; before anything is compiled
            where it can be known.
        NonFiniteError: with nonfinite="raise".
        MemoryError: the steps' program is larger than the device's memory; before it runs.
        CheckpointError: a checkpoint can't be written or read, or is of another call.
        Exception: whatever the data, `after_epoch` or a step raises passes through.
        Once training has begun, every error has an attribute `result`: the FitResult up to the
        last good step, to go on from; with checkpoints it is saved, too. (If the device failed in
        a step, which had taken the state: up to the last epoch of which a copy was kept. fit keeps
        one as often as it costs less than a hundredth of the time.) What is wrong with stdout ends
        the display alone.

    Steps run in a loop on the device. (But one by one where a step holds a convolution that XLA's
    CPU backend would run many times slower in a loop; fnn's own it doesn't.) Their program is
    compiled once for a TrainStep; and once for the same loss and optimiser objects, as long as the
    loss reads the same variables besides its arguments, as by `evaluate`.
    """
    epochs = arguments.integer("fit", "epochs", epochs, least=0)
    options: dict[str, Any] = {"nonfinite": nonfinite, "trainable": trainable, "layout": layout}
    options |= {"accumulate": accumulate, "compute": compute, "loss_scale": loss_scale}
    options |= {"ema": ema, "clip": clip}
    step = step_of(loss, optimizer, options, check)
    loss = step.loss
    check_call(
        loss,
        params,
        flags={"shuffle": shuffle, "progress": progress, "check": check, "drop_last": drop_last},
        key=key,
        model_state=model_state,
        checkpoints=checkpoints,
        validates=validation is not None,
        validation_loss=validation_loss,
        early_stopping=early_stopping,
        schedule=schedule,
        after_epoch=after_epoch,
    )
    if steps_per_call is not None:
        steps_per_call = arguments.integer("fit", "steps_per_call", steps_per_call, least=1)
    books = Logs("fit", logs)
    found = extras(loss)
    training = batches_of(
        "fit",
        data,
        batch_size=batch_size,
        shuffle=shuffle,
        epochs=epochs,
        steps=steps_per_epoch,
        drop_last=drop_last,
    )
    if isinstance(training, Arrays) and shuffle and key is None:
        raise ValueError(
            "shuffling needs a key: pass key=jax.random.key(0), say, or shuffle=False."
        )
    there = placed(training, step)
    if optimizer is None:
        programs, traced = programs_of(step), lambda: None
    else:
        programs, traced = kept_programs(step)
    if not isinstance(params, State):
        model_state = _initial_model_state(loss, found, training, model_state, programs)
    start = functools.partial(_start, step, params, model_state)
    state = start()
    order_key, loss_key, validation_key = (None,) * 3 if key is None else jax.random.split(key, 3)
    if not found.may_draw:
        loss_key = None
    elif step.layout is not None:
        loss_key = step.layout.spread(loss_key)
    check_key(found, loss_key)
    if isinstance(params, State):
        step.traced.check(state)
    find_labels = functools.partial(programs.found, "labels", step.find_labels)

    if isinstance(training, Arrays) and check:
        check_values(find_labels, state.params, training.data, loss_key, state.model_state, "data")
    look_at = looking(find_labels, state, loss_key, check and isinstance(training, Stream))

    work = Work(state, start, training.steps)
    last = work.epoch + epochs - 1
    interrupts = Interrupts(terminated=checkpoints is not None)
    with contextlib.ExitStack() as stack:
        keeper = None
        if checkpoints is not None:
            options = {"steps_per_epoch": steps_per_epoch, "drop_last": drop_last}
            call = of_call(training, state, step, key, **options)
            keeper = stack.enter_context(kept(checkpoints, call, last, work, training, interrupts))
            state = work.latest
        calls = Calls(step, programs, traced, state, loss_key, steps_per_call)
        advance = RollingBack(calls, step.traced.nonfinite == "roll_back")
        source = source_of(training, there, step, programs, state, loss_key, look_at, calls, last)
        first = last + 1 if keeper and keeper.is_over else work.epoch
        validate = validation_of(
            stack,
            validation,
            validation_loss or loss,
            state,
            batch_size,
            epochs,
            validation_key,
            check,
            step.layout,
        )
        del state
        display = progress_for(progress, last, training.steps, first)
        stack.callback(display.close)
        stack.callback(books.close)
        listeners: list[Listener] = [Shown(display)]
        if epochs:  # before what is saved: of an epoch in a checkpoint there is a line in the log
            listeners.append(Logged(books))
        if early_stopping is not None:
            listeners.append(BestKeeper(early_stopping))
        else:  # a checkpoint's best leaves out the epochs to come
            work.best = work.best_by = None
        if keeper:
            listeners.append(keeper)
        if after_epoch is not None:
            listeners.append(AfterEpoch(after_epoch))
        told = Listeners(*listeners)
        stack.enter_context(interrupts)
        try:
            told.begin(work)
            for epoch in range(first, last + 1):
                began = time.perf_counter()
                if isinstance(source, Resident):
                    calls.next_chunk = functools.partial(source.after, order_key, epoch)
                with chunks_of(source, order_key, epoch, work.batch) as chunks:
                    for chunk in chunks:
                        at = chunk.start
                        while at < len(chunk.sizes):
                            with interrupts.held():
                                at += advance(work, chunk, at)
                            told.call_over(work)
                if work.batch == 0:
                    raise ValueError(f"data gave no batches in epoch {epoch}.")
                with interrupts.held():
                    record = work.log.epoch_means() if work.log.epoch_has_begun else {}
                    record |= advance.of_epoch()
                    work.epoch_over()
                record |= validate(work.latest)
                record |= rate_of(work.latest, schedule)
                record["seconds"] = time.perf_counter() - began
                with interrupts.held():
                    work.log.end_epoch(record)
                    work.save()
                if told.epoch_over(work, epoch, record):
                    break
            result = work.result()
            told.end(work, result)
        except KeyboardInterrupt:
            result = work.result(interrupted=True)
            saved = f" {keeper.where_it_goes_on()}" if keeper else ""
            steps = work.log.count
            try:
                told.end(work, result)
            except BaseException as error:  # a full disk, say
                attach(error, result)
                raise
            display.say(f"Interrupted in epoch {work.epoch}, after {steps} steps.{saved}")
        except BaseException as error:
            result = work.result(failed=not isinstance(error, NonFiniteError))
            attach(error, result)
            told.failed(work, result, error)
            raise
    return result


def _start(step: TrainStep, params: Any, model_state: Any) -> State:
    """The state to start from, in arrays of its own."""
    if not isinstance(params, State):
        return step.init(params, model_state)
    return own(params if step.layout is None else step.layout.place(params))


def _initial_model_state(
    loss: Loss, found: Extras, training: Arrays | Stream, given: Any, programs: Programs
) -> Any:
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
    made: list = []

    def empty(example):
        made.append(make(example))
        return None if jax.tree.leaves(made) else made[0]

    # Most networks have none, which is remembered. Arrays are made anew: none is kept.
    example = example_types(training.data)
    nothing = programs.found("model_state", empty, example)
    if made:
        return made[0]
    return make(example) if nothing is None else nothing
