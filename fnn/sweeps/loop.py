"""`sweep`: many networks trained by one program, whichever way is fastest on this machine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import chex
import jax
import numpy as np
import optax

from fnn import arguments
from fnn.batch import example_types
from fnn.sweeps.axes import Axes, Group, told
from fnn.sweeps.halving import Halving, checked
from fnn.sweeps.layout import LAYOUTS, Layout
from fnn.sweeps.machine import platform
from fnn.sweeps.program import Program, Shared
from fnn.sweeps.recipe import WHERE, Recipe
from fnn.sweeps.result import SweepResult
from fnn.sweeps.training import Book, Training
from fnn.train.calls import ASKING
from fnn.train.checks import check_values, find_labels
from fnn.train.coupling import is_coupled
from fnn.train.data import Arrays, as_arrays, batches_of, is_tree_of_arrays
from fnn.train.interrupts import Interrupts
from fnn.train.loss import Loss, extras
from fnn.train.progress import progress_for
from fnn.train.result import annotate, carry
from fnn.train.step import TrainStep

Function = TypeVar("Function", bound=Callable)


def _off_meshes(function: Function) -> Function:
    """Decorate a function: `jax.set_mesh` around its call doesn't concern it."""

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        if jax.sharding.get_abstract_mesh().empty:
            return function(*args, **options)
        with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):
            return function(*args, **options)

    return run  # type: ignore[return-value]


@_off_meshes
def sweep(
    loss: Loss | TrainStep | Callable[..., Any],
    axes: Mapping[Any, Any],
    data: Any,
    *,
    optimizer: optax.GradientTransformation | Callable[..., Any] | None = None,
    init: chex.ArrayTree | Callable[..., Any],
    epochs: int,
    batch_size: int | None = None,
    key: chex.PRNGKey | Callable[..., Any] | None = None,
    shuffle: bool = True,
    validation: Any = None,
    validation_loss: Loss | Callable[..., Any] | None = None,
    static: str | tuple[str, ...] = (),
    halving: Halving | None = None,
    layout: Layout | None = None,
    at_once: int | None = None,
    progress: bool = True,
    check: bool = True,
    model_state: chex.ArrayTree | Callable[..., Any] | None = None,
) -> SweepResult:
    """Train a network for every combination of hyperparameters, all by one program.

        found = fnn.sweep(
            loss,
            {"seed": range(8), "learning_rate": jnp.logspace(-4, -1, 8)},
            (X, y),
            optimizer=lambda learning_rate: optax.adam(learning_rate),
            init=lambda seed: net.init(jax.random.key(seed), x),
            epochs=20,
            validation=(Xv, yv),
        )
        found.best().params
        found.mean(over="seed").best()

    Each network is what `fnn.fit` makes of the same hyperparameters and key, to rounding: the
    same order of the examples, the same draws, whatever the layout. One that diverges (its loss
    or its parameters are inf or nan) goes on by itself, harms no other, and is named in
    `found.diverged`. There is one copy of the data, not one for each network.

    Args:
        loss: `loss(params, example)`, as for `fit`; it may name hyperparameters too,
            `loss(params, example, smoothing)`. Or a `TrainStep`. Or a function of
            hyperparameters that returns one of these: `lambda width: loss_of(net(width))`.
        axes: for each hyperparameter its values; the grid of all combinations is trained. Those
            that change together lie on one axis: `{("learning_rate", "decay"): (rates, decays)}`.
            Numbers go into the program as arrays. What is no number (an activation, a name, True
            or False) is static: each of its values has a program of its own. So is "batch_size",
            which is the size of a batch. Each must be named by a function below, or be one of
            those that `optax.inject_hyperparams` keeps in the optimiser's state; "seed" makes
            the key.
        data: a tree of arrays with the examples along their first axes, like `(X, y)`.
        optimizer: an optax transformation, or a function of hyperparameters that returns one.
        init: the parameters to start from, or a function of hyperparameters that makes them.
        epochs: how many times to go over the data.
        batch_size: 128 by default.
        key: a key for all networks, or a function of hyperparameters. By default
            `jax.random.key(seed)`, for an axis "seed". As in `fit`, it shuffles, and is the
            loss's.
        shuffle: whether to shuffle the data anew in each epoch.
        validation: arrays, evaluated after each epoch.
        validation_loss: the loss for that; by default `loss`.
        static: the numeric hyperparameters that functions need as Python's numbers: widths,
            counts of layers. Each of their values has a program of its own.
        halving: an `fnn.Halving`: keep the best after some epochs, and train only those on.
        layout: how the networks lie on the machine; by default, the fastest of those that suit
            the device, found by measuring a few steps, once for each program (but only the
            likeliest is compiled where all training takes about as long as compiling another):
            "vmap": all are one batch; each operation is done for all of them. Best on
            accelerators, which small operations leave idle.
            "scan": one after another, inside one program. For networks that fill the device.
            "threads": one on each core of a CPU, each thread with a whole network; its
            parameters and a batch fit into the core's cache.
            "devices": dealt out over all devices of this process, in each of them as "vmap" ("scan"
            on CPUs).
        at_once: how many networks are trained at the same time; the others wait for their turn.
            By default, as many as the memory holds, judging by what the compiled program needs
            and the device has free; for "threads", one for each core.
        progress: print lines, or show a bar on a terminal, as `fit` does.
        check: look at the values of the data first, as `fit` does.
        model_state: the network's state to start from, or a function of hyperparameters; a loss
            made by `supervised` makes it itself.

    Returns:
        A `SweepResult`. Ctrl-C ends the training early and returns what was trained so far.

    Raises:
        TypeError, ValueError: the arguments don't fit each other; the message names the axis or
            the argument.
        FloatingPointError: a network met nan where `jax_debug_nans` is on, or inf where
            `jax_debug_infs` is.
        Exception: what the functions raise passes through. If training has begun, the error's
            attribute `result` is the SweepResult so far. (All functions are called before, for
            each of their static hyperparameters.)
    """
    began = time.perf_counter()
    grid = Axes(WHERE, axes, static)
    recipe = Recipe(grid, loss, optimizer, init, key, model_state, validation_loss)
    epochs = arguments.integer(WHERE, "epochs", epochs, least=1)
    for name, flag in {"shuffle": shuffle, "progress": progress, "check": check}.items():
        arguments.flag(WHERE, name, flag)
    if layout is not None:
        arguments.choice(WHERE, "layout", layout, LAYOUTS)
    if at_once is not None:
        at_once = arguments.integer(WHERE, "at_once", at_once, least=1)
    if validation_loss is not None and validation is None:
        raise ValueError("sweep: validation_loss is given, but no data for it: validation=...")
    if shuffle and not recipe.has_key:
        raise ValueError(
            "sweep: shuffling needs a key: an axis 'seed', key=jax.random.key(0), say, or "
            "shuffle=False."
        )
    sizes = _batch_sizes(grid, batch_size)
    halving = checked(halving, grid)
    data = _arrays(data, "data")
    validation = None if validation is None else _arrays(validation, "validation")
    start = as_arrays(recipe.start, "init", only_arrays=True)
    model_state = as_arrays(recipe.model_state, "model_state", only_arrays=True)
    shared = _on_device(Shared(data, validation, recipe.key, (start, model_state)))

    def training_of(group: Group) -> Training:
        size = group.static.get("batch_size", sizes)
        cut = batches_of(WHERE, data, batch_size=size, shuffle=shuffle, epochs=epochs)
        assert isinstance(cut, Arrays)
        first = grid.of(group.members[0])
        example = example_types(data)
        begin = functools.partial(recipe.begin, first, example)
        uneven = cut.size % cut.batch_size > 0
        state = jax.eval_shape(begin, shared.start) if check or uneven else None
        if check:
            _check(recipe, first, state, data, validation)
        program = Program(
            recipe,
            group.static,
            batch_size=cut.batch_size,
            size=cut.size,
            validation_batch_size=_smaller(size, validation),
            epochs=epochs,
            shuffle=shuffle,
            draws=platform() != "cpu",
            asks=platform() in ASKING,
            pads=uneven and not _is_coupled(recipe, first, state, example),
        )
        return Training(program, shared, group, layout, at_once)

    groups = []
    for group in grid.groups():
        try:
            groups.append(training_of(group))
        except Exception as error:
            if group.static:
                annotate(error, f"(fnn.sweep: for the networks with {told(group.static)}.)")
            raise
    book = Book(grid, groups, epochs, halving)
    interrupted = False
    display = progress_for(progress, epochs, None)
    with Interrupts():
        try:
            book.train(display)
        except KeyboardInterrupt:
            if not book.has_begun:
                raise
            interrupted = True
            display.say(f"Interrupted after {book.mean_epochs:.1f} of {epochs} epochs.")
        except BaseException as error:
            if book.has_begun:
                found = book.result(False, time.perf_counter() - began)
                note = "(fnn.sweep: `result` of this error is the SweepResult so far.)"
                carry(error, found, note)
            raise
        finally:
            display.close()
    return book.result(interrupted, time.perf_counter() - began)


def _batch_sizes(axes: Axes, batch_size: Any) -> int | None:
    """The size for all groups, or None."""
    if "batch_size" not in axes.names:
        return batch_size
    if batch_size is not None:
        raise TypeError("sweep: batch_size is an axis: leave out batch_size=...")
    for value in axes.values("batch_size"):
        arguments.integer(WHERE, "batch_size", value, least=1)
    return None


def _arrays(data: Any, name: str) -> Any:
    """Arrays that JAX computes in."""
    if not is_tree_of_arrays(data):
        raise TypeError(
            f"sweep: {name} must be arrays with the examples along their first axes, like (X, y), "
            f"but got {arguments.show(data)}. (All networks share them, so they must be there at "
            "once.)"
        )
    found = batches_of(WHERE, data, batch_size=None, shuffle=False, epochs=1, name=name)
    assert isinstance(found, Arrays)
    return found.data


def _on_device(shared: Shared) -> Shared:
    """On the first device, where they aren't; what is dealt out over several is gathered."""
    # Not by the device alone: then the type of an array from an explicit mesh still tells of it.
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.device_put(x, place), shared)


def _smaller(size: int | None, data: Any) -> int:
    if data is None:
        return 1
    return min(size or 128, int(jax.tree.leaves(data)[0].shape[0]))


def _is_coupled(recipe: Recipe, hyper: Any, state: Any, example: Any) -> bool:
    """Whether a batch can't be filled up with other examples; see `is_coupled`."""
    key = jax.random.key(0) if recipe.has_key else None
    return is_coupled(recipe.step(hyper), state, example, key)


def _check(recipe: Recipe, hyper: Any, state: Any, data: Any, validation: Any) -> None:
    """Look at the values of the data, as `fit` does; `state` holds the types of the first."""
    for name, source, loss, trained in (
        ("data", data, recipe.loss(hyper), True),
        ("validation", validation, recipe.validation_loss(hyper), False),
    ):
        if source is None:
            continue
        found = extras(loss)
        draws = found.may_draw if trained else found.needs_key
        own_key = jax.random.key(0) if draws and recipe.has_key else None

        def find(params, example, key, state, loss=loss, trained=trained):
            return find_labels(loss, params, example, key, state, trained=trained)

        check_values(find, state.params, source, own_key, state.model_state, name)
