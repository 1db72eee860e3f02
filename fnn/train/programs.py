"""The programs of a training step that make many steps, in a loop on the device.

The number of steps is an argument of such a program. So the same one, which gives the same numbers,
makes calls of all lengths. A GPU asks the host after each turn of such a loop whether there is
another: there, what has gone on for a while gets a second program, whose number of steps is known
when it is compiled.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from fnn.batch import types_of
from fnn.convolution import slow_in_a_loop
from fnn.jaxpr import Program, all_equations, program
from fnn.meshes import barrier, stacked_zeros
from fnn.readings import Kept
from fnn.train.data import take
from fnn.train.devices import FirstStates, dealt
from fnn.train.nonfinite import any_nonfinite
from fnn.train.state import State
from fnn.train.step import TrainStep

# The metrics of so many steps are kept on the device, or fewer if they are large.
MOST_STEPS, MOST_BYTES = 1024, 2**24

T = TypeVar("T")


class How(NamedTuple):
    """What a program depends on besides the types of its arguments.

    Fields:
        kind, masked: see `Chunk`.
        exact, look, folded: see `TrainStep.traced`.
        stop: whether training ends, or goes back, at a bad step.
        may_loop: whether all that a step may hold is as fast in a loop.
        length: how many steps the program makes, or None if an argument says so.
    """

    kind: str
    masked: bool
    exact: bool
    look: bool
    folded: bool
    stop: bool
    may_loop: bool
    length: int | None


def _run(
    step: TrainStep, how: How, state: State, data: Any, rows: Any, sizes: Any, key: Any, where: Any
) -> tuple[State, dict[str, jax.Array], jax.Array, bool]:
    """Steps of a chunk, traced.

    Args:
        data, rows, sizes: the chunk's.
        key: the loss's, or None.
        where: int32, the number of the first batch in the chunk, of all batches before it, and how
            many to do.

    Returns:
        The state, the metrics of each step along first axes, and how many steps there were, and
        whether all is finite, as two integers; and whether no step may come after a bad one.
    """
    first, seen, count = where[0], where[1], where[2]

    def batch_of(i):
        if how.kind == "batch":
            return data
        if how.kind == "stack":
            return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), data)
        batch = take(data, lax.dynamic_index_in_dim(rows, i, keepdims=False))
        return batch if step.layout is None else dealt(step.layout, batch)

    @jax.jit
    def advance(state, batch, key, size):
        counted = size if how.masked else None
        looks = how.exact, counted, how.look, how.folded
        new, metrics, told = step.traced(state, batch, key, *looks)
        good = jnp.ones((), bool)
        if how.stop:
            bad = ~(jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"]))
            good = ~bad if told is None else told[0] == 0
        return new, metrics, good

    def at(i):
        own = None if key is None else jax.random.fold_in(key, (seen + i).astype(jnp.uint32))
        # Where and how a batch lies must not change how the compiler orders a step's operations.
        batch, size, _ = barrier((batch_of(first + i), sizes[first + i], i))
        return batch, own, size

    start = jnp.zeros((), jnp.int32)
    closed, (_, metrics, _) = jax.make_jaxpr(advance, return_shape=True)(state, *at(start))
    flat = program(closed)
    alone = how.stop and not how.look and not may_go_on(flat)
    if not how.may_loop and slow_steps(flat):
        new, metrics, good = advance(state, *at(start))
        records = jax.tree.map(lambda x: x[None], metrics)
        return new, records, _packed(1, good & _looks_fine(how, new)), alone
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(metrics))
    places = max(1, min(MOST_STEPS, MOST_BYTES // size))
    if how.length is not None and how.length <= places and not alone:

        def following(state, i):
            new, metrics, _ = advance(state, *at(i))
            return new, metrics

        new, records = lax.scan(following, state, jnp.arange(how.length))
        return new, records, _packed(how.length, _looks_fine(how, new)), alone

    def one(carry):
        i, state, records, goes_on = carry
        new, metrics, good = advance(state, *at(i))
        put = lambda record, x: lax.dynamic_update_index_in_dim(record, x, i, 0)
        records = jax.tree.map(put, records, metrics)
        return i + 1, new, records, good if how.look or alone else goes_on

    records = jax.tree.map(lambda x: stacked_zeros(places, x), metrics)
    begin = start, state, records, jnp.ones((), bool)
    end = jnp.minimum(count, places)
    done, new, records, good = lax.while_loop(lambda c: (c[0] < end) & c[3], one, begin)
    return new, records, _packed(done, good & _looks_fine(how, new)), alone


def _packed(*numbers: Any) -> jax.Array:
    """In one array, which is read faster than several."""
    return jnp.stack([jnp.asarray(n, jnp.int32) for n in numbers])


def _looks_fine(how: How, new: State) -> jax.Array | bool:
    """Is all finite? Not looked at where each step looks, or nobody wants to know."""
    return True if how.look or not how.stop else ~any_nonfinite(new)


def slow_steps(flat: Program) -> bool:
    """Whether a program holds what is many times slower in a loop, on a CPU."""
    return any(slow_in_a_loop(equation, avals) for equation, avals in all_equations(flat))


def may_go_on(flat: Program) -> bool:
    """Whether steps after a bad one, which count for nothing, do no harm.

    A loop that runs until some error is small may run for ever at nan. What prints would tell of
    steps that weren't.
    """
    found = (equation for equation, _ in all_equations(flat))
    return not any(equation.has_effects or equation.name == "while" for equation in found)


class Programs:
    """The programs of one training step, and what is known of them.

    They don't keep the step alive: `serve` tells of one that is.

    Attributes:
        traces: an entry for each program that was traced.
        alone: of those, the ones in which no step may come after a bad one.
        networks: the types of the states that were trained -> a number.
        seconds: what a step took when it was last measured, by network and kind of batch.
        looped, compiled: for how long the host waited, likewise, for programs that take the number
            of their steps, and for the first of them, which was traced and compiled then.
        lengths: how many steps a program of known length makes, likewise.
        fitting: the programs that were looked at, whether they fit into the device's memory.
        first_states: those of a step that `kept_programs` was given.
    """

    def __init__(self) -> None:
        self.traces: list[How] = []
        self.alone: set[How] = set()
        self.networks: dict[tuple, int] = {}
        self.seconds: dict[Any, float] = {}
        self.looped: dict[Any, float] = {}
        self.compiled: dict[Any, float] = {}
        self.lengths: dict[Any, int] = {}
        self.fitting: set[tuple] = set()
        self.first_states = FirstStates()
        self._found: dict[tuple, Any] = {}
        self._steps: weakref.WeakSet[TrainStep] = weakref.WeakSet()
        # No method of self's is jitted: a cycle would keep what the programs hold for a while.
        steps, traces, alone = self._steps, self.traces, self.alone

        def run(how, *args):
            traces.append(how)
            *made, is_alone = _run(next(iter(steps)), how, *args)
            if is_alone:
                alone.add(how)
            return tuple(made)

        self.run = jax.jit(run, static_argnums=0)
        self.run_donated = jax.jit(run, static_argnums=0, donate_argnums=1)

    def serve(self, step: TrainStep) -> None:
        """A step whose programs these are."""
        self._steps.add(step)

    def found(self, what: str, find: Callable[..., T], *args: Any) -> T:
        """What is found of the step by tracing it, once for arguments of the same types.

        Args:
            what: a name for it.
            find: called with `args`; must keep neither the step nor an array.
        """
        types = what, types_of(args)
        if types not in self._found:
            self._found[types] = find(*args)
        return self._found[types]


def programs_of(step: TrainStep) -> Programs:
    """The programs of a step that `train_step` made: the step's own."""
    if step.programs is None:
        step.programs = Programs()
        step.programs.serve(step)
    return step.programs


_kept: Kept[Programs] = Kept()


def kept_programs(step: TrainStep) -> tuple[Programs, Callable[[], None]]:
    """The programs of an earlier step of the same loss and optimiser, if both read the same.

    Returns:
        The programs, and what keeps them for a later step, to be called when one was traced.
    """
    loss, optimizer, options = step.made_of
    functions, more = [loss, optimizer.init, optimizer.update], []
    for name in sorted(options.keys() - {"check"}):
        value = options[name]
        if inspect.isroutine(value) or (name == "trainable" and callable(value)):
            functions.append(value)
        else:
            more.append(tuple(value) if isinstance(value, list) else value)
    try:
        programs = _kept.find(tuple(functions), *more) or Programs()
    except TypeError:  # an option that can't be hashed
        programs = Programs()
    programs.serve(step)
    programs.first_states.serve(step.traced)
    step.first_states = programs.first_states

    def keep():
        with contextlib.suppress(TypeError):  # that, or no weak reference to a function
            _kept.keep(tuple(functions), *more, made=programs)

    return programs, keep
