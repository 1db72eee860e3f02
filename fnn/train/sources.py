"""Where the batches of `fit` come from: arrays on the device, or a stream that is read ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from fnn.batch import example_types
from fnn.sharding.placement import is_spread
from fnn.train.calls import Calls
from fnn.train.checks import BatchChecks
from fnn.train.chunks import Resident, Streamed, fits, on_device
from fnn.train.coupling import is_coupled
from fnn.train.data import Arrays, Stream
from fnn.train.devices import Placed
from fnn.train.prefetch import prefetched
from fnn.train.programs import Programs
from fnn.train.state import State
from fnn.train.step import TrainStep

# How many chunks of batches that come one by one are made ahead.
AHEAD = 2


def looking(find: Callable, state: State, key: Any, values: bool) -> Callable[[Any], None]:
    """What checks each batch that comes.

    Args:
        find: `find_labels` of the loss.
        state: any of the training; its types are kept.
        key: the loss's, or None.
        values: whether to look at values, too.
    """
    checks = BatchChecks(find, values)
    types = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state.params, state.model_state)
    )
    return lambda batch: checks.look_at(types[0], batch, key, types[1])


def placed(training: Arrays | Stream, step: TrainStep) -> Any:
    """Arrays that fit, on their way to the device; else None.

    To bring large ones there takes a while, in which the host looks at the values and traces.
    """
    layout = step.layout
    # Of several processes each would make calls of other lengths: there a call is one step.
    here = layout is None or not is_spread(layout.mesh)
    if here and isinstance(training, Arrays) and fits(training.data, layout):
        return on_device(training, layout)
    return None


def source_of(
    training: Arrays | Stream,
    there: Any,
    step: TrainStep,
    programs: Programs,
    state: State,
    key: Any,
    look_at: Callable[[Any], None],
    calls: Calls,
    last: int,
) -> Resident | Streamed:
    """Where the chunks come from.

    Args:
        training: the data.
        there: the same on the device, see `placed`.
        step: what is trained.
        programs: its programs.
        state: the first; its types are kept.
        key: the loss's, or None.
        look_at: called with each batch that comes.
        calls: by which a stream that can't be read twice knows how much to read.
        last: the number of the last epoch.
    """
    # Types alone: the state must not be kept.
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    known: list[bool] = []

    def may_pad(batch):
        if not known:
            find = functools.partial(is_coupled, step)
            known.append(not programs.found("coupled", find, types, example_types(batch), key))
        return known[0]

    layout = step.layout
    if there is not None and isinstance(training, Arrays):
        even = training.sizes[-1] == training.batch_size
        pad = not even and may_pad(training.data)
        return Resident(training, there, pad, last, on_mesh=layout is not None)
    if layout is not None:
        return Streamed(Placed(training, layout, look_at), lambda batch: None, may_pad)
    source = Streamed(training, look_at, may_pad)
    # Of what comes once, no more is read than the next call trains on.
    return dataclasses.replace(source, most=calls.affordable) if source.comes_once else source


def chunks_of(source: Resident | Streamed, key: Any, epoch: int, start: int) -> Any:
    """An epoch's chunks, to be closed; those that come are read ahead, if they may be."""
    make = lambda: source.chunks(key, epoch, start)
    ahead = isinstance(source, Streamed) and source.may_run_ahead
    return contextlib.closing(prefetched(make, AHEAD if ahead else 0))
