"""Steps of training in calls of the device: many steps in one, in a loop that runs there.

The number of steps of a call is an argument of its program. So an epoch is cut into calls by how
long they take, and the same program, which gives the same numbers, makes all of them.

A loop that looked for inf and nan in all that is new at every step would be slower by a tenth.
Instead, when a call is over, the losses and the gradients' norms are looked at, which the host has
anyway, and the state. If one isn't as it should be, the call counts for nothing: its steps are made
again from the state before it, one by one, up to the bad one.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn.batch import types_of
from fnn.convolution import slow_in_a_loop
from fnn.jaxpr import Program, all_equations, program
from fnn.meshes import barrier, beside, stacked_zeros
from fnn.readings import Kept
from fnn.train.chunks import Chunk
from fnn.train.data import take
from fnn.train.devices import FirstStates, dealt, settled
from fnn.train.fitting import foresee
from fnn.train.nonfinite import (
    NonFiniteError,
    any_nonfinite,
    became_nonfinite,
    holds_nonfinite,
    numbers_of,
)
from fnn.train.result import Work
from fnn.train.state import State
from fnn.train.step import TrainStep

# A call of the device takes about so many seconds at most: Ctrl-C waits for its end.
SECONDS = 0.5

# The metrics of so many steps are kept on the device, or fewer if they are large.
MOST_STEPS, MOST_BYTES = 1024, 2**24

# A state of more bytes is donated, and looked at before each update of it.
LARGE = 2**28


T = TypeVar("T")


class How(NamedTuple):
    """What a program depends on besides the types of its arguments.

    Fields:
        kind, masked: see `Chunk`.
        exact, look, folded: see `TrainStep.traced`.
        stop: whether training ends, or goes back, at a bad step.
        may_loop: whether all that a step may hold is as fast in a loop.
    """

    kind: str
    masked: bool
    exact: bool
    look: bool
    folded: bool
    stop: bool
    may_loop: bool


# ----------------------------------------------------------------------------------- the program


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
        seconds: what a step took when it was last measured, by kind of batch.
        fitting: the programs that were looked at, whether they fit into the device's memory.
        first_states: those of a step that `kept_programs` was given.
    """

    def __init__(self) -> None:
        self.traces: list[How] = []
        self.alone: set[How] = set()
        self.seconds: dict[Any, float] = {}
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


# ---------------------------------------------------------------------------------- on the host


class Ahead(NamedTuple):
    """A call that the device was given before the result of the one before was read.

    Fields:
        chunk, at, steps: what it does, as in `Calls`.
        state: what it goes on from.
        made: what it makes, the only entry of a list.
    """

    chunk: Chunk
    at: int
    steps: int
    state: State
    made: list

    def follows(self, work: Work, chunk: Chunk, at: int) -> bool:
        """Whether that is the call whose turn it is."""
        place = self.chunk.sizes is chunk.sizes and self.at == at
        return place and self.state is work.latest


class Calls:
    """Calls of the device, as long as they should be.

    Args:
        step: what one step is.
        programs: its programs.
        traced: called when one was traced.
        state: the first.
        nonfinite: see `train_step`.
        key: the loss's, or None.
        most: how many steps a call has; None for as many as take about half a second.

    Attributes:
        next_chunk: tells what comes after a chunk: another one, or None where that isn't known.
    """

    def __init__(
        self,
        step: TrainStep,
        programs: Programs,
        traced: Callable[[], None],
        state: State,
        key: Any,
        most: int | None,
    ):
        self._step, self._programs, self._traced = step, programs, traced
        self._key, self._most = key, most
        self._latest: Any = None  # the kind of batch
        self._on_mesh = False  # whether the state lies where the data do
        self.next_chunk: Callable[[Chunk], Chunk | None] = lambda chunk: None
        self._ahead: Ahead | None = None
        self._read = 0.0  # when the last result was
        self._longest = math.inf  # how many steps a call of this program makes at most
        nonfinite = step.traced.nonfinite
        stops = nonfinite in ("raise", "roll_back")
        size = sum(x.nbytes for x in jax.tree.leaves(numbers_of(state)))
        self._large = size > LARGE
        scales = step.traced.scaling is not None  # which leaves out steps
        look = nonfinite == "skip" or (stops and (self._large or scales))
        devices = {d for x in jax.tree.leaves(state) for d in x.devices()}
        platforms = {d.platform for d in devices}
        on_one_cpu = len(devices) == 1 and "cpu" in platforms
        # Programs of several devices wait for each other: two at a time might do so for ever.
        self._may_go_ahead = len(devices) == 1 and not self._large
        self._how = How(
            "",
            False,
            exact=look and holds_nonfinite(step.traced.trainable.split(state)[0]),
            look=look,
            folded=on_one_cpu,
            stop=stops,
            may_loop="cpu" not in platforms,
        )

    def __call__(self, work: Work, chunk: Chunk, at: int) -> int:
        """Some steps of a chunk from number `at` on; returns how many.

        Raises:
            NonFiniteError: one was bad (with nonfinite="raise").
        """
        layout = self._step.layout
        if layout is not None and chunk.kind == "batch":
            chunk = chunk._replace(data=settled(layout, chunk.data, chunk.fill), fill=None)
        self._latest = _kind(chunk)
        done, count = 0, int(min(len(chunk.sizes) - at, self.affordable()))
        while done < count:
            done += self._once(work, chunk, at + done, int(min(count - done, self._longest)))
        return done

    def affordable(self) -> int:
        """How many steps a call may have, by what the last ones took."""
        if self._most is not None:
            return self._most
        seconds = self._programs.seconds.get(self._latest)
        return max(1, int(SECONDS / seconds)) if seconds else 1

    def _once(self, work: Work, chunk: Chunk, at: int, count: int) -> int:
        """One call of the device."""
        began, known = time.perf_counter(), len(self._programs.traces)
        count, was_ahead = self._call(work, chunk, at, count)
        waits = not (was_ahead and work.made[0][2].is_ready())
        self._go_ahead(work, chunk, at, count)
        done, good, records = self._read_result(work)
        now = time.perf_counter()
        if len(self._programs.traces) > known:
            self._traced()
            self._programs.seconds[self._latest] = 0.0
        elif waits and good:  # else it was over before anybody looked
            since = self._read if was_ahead else began
            self._programs.seconds[self._latest] = (now - since) / max(1, done)
        self._read = now
        if done != count or not good:
            self._ahead = None  # what it goes on from isn't where training goes on
        if good:
            if done < count:
                self._longest = done
            work.enter(work.made[0][0], _first(records, done), chunk.sizes[at : at + done])
            return done
        if self._how.look:  # the bad step was the last, and not applied
            done = done - 1
            work.enter(work.made[0][0], _first(records, done), chunk.sizes[at : at + done])
            self._tell(work, chunk, at + done)
            return done + 1
        for i in range(done):
            self._call(work, chunk, at + i, 1)
            _, good, records = self._read_result(work)
            if good:
                work.enter(work.made[0][0], _first(records, 1), chunk.sizes[at + i : at + i + 1])
            else:
                self._tell(work, chunk, at + i)
        return done

    def _call(self, work: Work, chunk: Chunk, at: int, count: int) -> tuple[int, bool]:
        """Have the device run; what it makes stands in `work.made`.

        Returns:
            How many steps it was asked for, and whether that was before.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.follows(work, chunk, at):
            work.made[:] = ahead.made
            return ahead.steps, True
        state = work.latest
        if not self._on_mesh:
            state, self._on_mesh = beside(state, chunk.data), True
        args = self._arguments(chunk, at, count, state, work.seen)
        if (known := (args[0], _kind(chunk), self._large)) not in self._programs.fitting:
            types = jax.eval_shape(lambda x: batch_of(chunk._replace(data=x), at), chunk.data)
            foresee("fit", self._step, self._run, args, state, types, self._key)
            self._programs.fitting.add(known)
        work.made.clear()
        # No signal's handler can come between a call's end and its result's place in the list:
        # they run between Python's instructions, and `extend` is one.
        work.made.extend(map(self._run, *((x,) for x in args)))
        return count, False

    def _read_result(self, work: Work) -> tuple[int, bool, dict[str, np.ndarray]]:
        """How many steps a call did up to the first bad one, whether all was good, and the metrics.

        It waits for the call.
        """
        new, metrics, numbers = work.made[0]
        done, good = np.asarray(numbers).tolist()
        records = {name: np.asarray(values) for name, values in metrics.items()}
        if self._how.stop and not self._how.look:
            fine = np.isfinite(records["loss"][:done]) & np.isfinite(records["grad_norm"][:done])
            if not fine.all():
                return int(fine.argmin()) + 1, False, records
            # Some optimisers' states hold inf from the start: the best loss so far, for one.
            good = good or not became_nonfinite(new, beside(work.latest, new))
        return done, bool(good), records

    def _go_ahead(self, work: Work, chunk: Chunk, at: int, count: int) -> None:
        """Give the device the call after this one, whose result isn't read yet.

        It goes on from the state that this call is making, so that the device needn't wait for
        what the host does in between.
        """
        seconds = self._programs.seconds.get(self._latest)
        if not (seconds and self._may_go_ahead):
            return
        after: Chunk | None = chunk
        at += count
        if at == len(chunk.sizes):
            after, at = self.next_chunk(chunk), 0
        if after is None or _kind(after) != self._latest:
            return
        steps = int(min(len(after.sizes) - at, self.affordable(), self._longest))
        if steps * seconds > SECONDS:  # where training ends in between, this call is for nothing
            return
        state = work.made[0][0]
        args = self._arguments(after, at, steps, state, work.seen + count)
        if args[0] in self._programs.alone:
            return
        # What goes wrong does so again when its turn comes.
        with contextlib.suppress(Exception):
            self._ahead = Ahead(after, at, steps, state, [self._run(*args)])

    @property
    def _run(self) -> Callable:
        return self._programs.run_donated if self._large else self._programs.run

    def _arguments(self, chunk: Chunk, at: int, count: int, state: State, seen: int) -> tuple:
        """Those of a program: `count` steps from batch `at` on, of which `seen` were before."""
        how = self._how._replace(kind=chunk.kind, masked=chunk.masked)
        where = np.array([at, seen, count], np.int32)
        sizes = chunk.sizes
        if chunk.kind == "stack":  # with a place for each batch, there or not
            sizes = np.resize(sizes, len(jax.tree.leaves(chunk.data)[0]))
        return how, state, chunk.data, chunk.rows, sizes, self._key, where

    def _tell(self, work: Work, chunk: Chunk, i: int) -> None:
        """Make batch i's step with all that explains why it is bad.

        Raises:
            NonFiniteError: as was to be expected. (It may be that one program overflows and the
                other, which rounds otherwise, doesn't: then the step is done.)
        """
        batch, size = batch_of(chunk, i), chunk.sizes[i : i + 1]
        key = None if self._key is None else jax.random.fold_in(self._key, np.uint32(work.seen))
        state = jax.tree.map(jnp.copy, work.latest)
        new, metrics = self._step.advance(state, batch, key, look_at=False)
        try:
            self._step.finish(new)
        except NonFiniteError:
            # The batch is over, though its step isn't applied: who goes on, goes on behind it.
            work.enter(work.latest, _of_one(metrics), size)
            raise
        work.enter(new, _of_one(metrics), size)


def batch_of(chunk: Chunk, i: int) -> Any:
    """Batch i of a chunk, without what fills it up."""
    size = chunk.sizes[i]
    if chunk.kind == "rows":
        return take(chunk.data, np.asarray(chunk.rows)[i, :size])
    whole = chunk.data if chunk.kind == "batch" else jax.tree.map(lambda x: x[i], chunk.data)
    return jax.tree.map(lambda x: x[:size], whole) if chunk.masked else whole


def _kind(chunk: Chunk) -> tuple:
    shapes = [x.shape[0 if chunk.kind == "batch" else 1 :] for x in jax.tree.leaves(chunk.data)]
    return chunk.kind, chunk.rows is not None and chunk.rows.shape[1], *shapes


def _first(records: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return {name: values[:count].copy() for name, values in records.items()}


def _of_one(metrics: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value)[None] for name, value in metrics.items()}
