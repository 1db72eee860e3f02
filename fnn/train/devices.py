"""Training on a layout of `fnn.sharding`: where the state, the batches and the key lie."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from fnn import arguments
from fnn.batch import types_of
from fnn.layers.mode import Across
from fnn.sharding import Layout
from fnn.sharding.placement import is_spread
from fnn.train.data import Arrays, Stream, filled

Function = TypeVar("Function", bound=Callable)


def check_layout(where: str, layout: Any, takes_mode: bool) -> None:
    """Raise a TypeError unless it is a layout that the loss can be trained on, or None."""
    if layout is None:
        return
    if not isinstance(layout, Layout):
        raise TypeError(
            f"{where}: layout must be one of fnn.sharding's, such as "
            f"fnn.sharding.fully_sharded(mesh), but got {arguments.show(layout)}."
        )
    if (layout.sequence or layout.stages) and not takes_mode:
        what = "a sequence's positions" if layout.sequence else "a network's blocks"
        raise TypeError(
            f"{where}: the layout divides {what}, and layers are told so by the mode: the loss "
            "must take one, loss(params, example, mode), and pass it on: net(params, x, "
            "mode=mode). fnn.supervised(net, ...) does."
        )


def across(layout: Layout | None, size: int | None = None) -> Across | None:
    """What layers must know of a layout, for a batch of this size."""
    if layout is None or not (layout.sequence or layout.stages or layout.shard):
        return None
    # shard_map over one axis of the mesh knows nothing of examples that are pinned to another.
    pinned = layout.deals_out(size) and not (layout.sequence or layout.stages)
    return Across(layout.mesh, layout.sequence, layout.stages, layout.microbatches or 1, pinned)


def gathered(layout: Layout | None, params: Any, takes_mode: bool) -> Any:
    """The parameters, traced, put together where the layout divides them though no rule does.

    Those of repeated blocks aren't, if the loss takes a mode: by it `repeat` has the compiler do so
    inside its loop, for a block at a time.
    """
    if layout is None or not layout.shard:
        return params
    stacked = layout.blocks if takes_mode else ()
    return jax.tree.map(_gathered, params, layout.shardings(params), layout.ruled(params, stacked))


def _gathered(x: Any, lies: NamedSharding, wanted: NamedSharding) -> Any:
    """x as wanted; its gradient is summed to where x lies."""
    if lies == wanted:
        return x

    @jax.custom_vjp
    def gather(x):
        return jax.lax.with_sharding_constraint(x, wanted)

    def backward(_, g):
        return (jax.lax.with_sharding_constraint(g, lies),)

    gather.defvjp(lambda x: (gather(x), None), backward)
    return gather(x)


class FirstStates:
    """The programs that make a step's first state on a layout, one for each kind of parameters.

    Else each run would compile one. They don't keep the step alive: `serve` tells of one that is.
    """

    def __init__(self) -> None:
        self._programs: dict[Any, Callable] = {}
        self._steps: weakref.WeakSet[Any] = weakref.WeakSet()

    def serve(self, traced: Any) -> None:
        """A step, as a traceable function, whose programs these are."""
        self._steps.add(traced)

    def __call__(self, layout: Layout, params: Any, model_state: Any) -> Any:
        """The state to start from."""
        steps = self._steps
        params, model_state = layout.place(params), layout.spread(model_state)
        types = jax.eval_shape(next(iter(steps)).first, params, model_state)
        kind = types_of(types)
        if kind not in self._programs:
            first = lambda *args: next(iter(steps)).first(*args)
            self._programs[kind] = jax.jit(first, out_shardings=layout.of_state(types))
        return self._programs[kind](params, model_state)


def held(layout: Layout, state: Any) -> Any:
    """A step's new state, traced, held where the layout has it."""
    return jax.lax.with_sharding_constraint(state, layout.of_state(state))


def dealt(layout: Layout, batch: Any) -> Any:
    """A batch, traced, dealt out to the devices."""
    at = lambda x: jax.lax.with_sharding_constraint(x, layout.of_batch(x.shape))
    return jax.tree.map(at, batch)


def everywhere(layout: Layout, tree: Any) -> Any:
    """What is traced, on all devices alike: metrics and reports, which every process reads."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, layout.everywhere), tree)


def on_mesh(layout: Layout | None) -> contextlib.AbstractContextManager:
    """Within it, the layout's mesh is the context's in the place of another that was set before.

    Where none was set, none is.

    (No generator's context: that writes to an error on its way, which one may refuse.)
    """
    if layout is None or jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.set_mesh(layout.mesh)


def on_its_mesh(function: Function) -> Function:
    """Decorate a function with an argument `layout`, or of a TrainStep with one: see `on_mesh`."""

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        layout = options.get("layout")
        if layout is None:
            first = args[0] if args else options.get("loss")
            layout = getattr(first, "layout", None)
        if not isinstance(layout, Layout):
            # Not within `on_mesh`: contextlib sets attributes of errors, and some are frozen.
            return function(*args, **options)
        with on_mesh(layout):
            return function(*args, **options)

    return run  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Placed:
    """Data whose batches are dealt out to a layout's devices.

    Of arrays each process reads the rows of its own devices. Of an iterable each gives its own
    part of every batch, which is looked at before it is placed; what lies on devices already stays
    there, to be placed by who trains (see `settled`).
    """

    source: Arrays | Stream
    layout: Layout
    look_at: Callable[[Any], None] = lambda batch: None

    def epoch(self, key: Any, start: int = 0) -> Iterator[Any]:
        """As of the source."""
        if isinstance(self.source, Arrays):
            rows = np.asarray(self.source.rows(key))
            for own, size in list(zip(rows, self.source.sizes, strict=True))[start:]:
                yield self.layout.take(self.source.data, own[:size])
            return
        for batch in self.source.epoch(key, start):
            self.look_at(batch)
            yield jax.tree.map(self._placed_from_host, batch)

    def _placed_from_host(self, x: Any) -> Any:
        of_others = is_spread(self.layout.mesh) and getattr(x, "is_fully_addressable", True)
        return self.layout.place_batch(x) if of_others or not isinstance(x, jax.Array) else x


def settled(layout: Layout, batch: Any, size: int | None) -> Any:
    """A batch, placed, and filled up to `size` examples if given.

    Not in the thread that reads the data: a program of several devices is begun by one thread
    alone, since two that are begun in another order on each device would wait for each other.
    """
    return layout.place_batch(filled(layout.place_batch(batch), size))
