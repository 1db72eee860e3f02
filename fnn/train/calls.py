"""Steps of training in calls of the device: many steps in one.

An epoch is cut into calls by how long they take.

A loop that looked for inf and nan in all that is new at every step would be slower by a tenth.
Instead, when a call is over, the losses and the gradients' norms are looked at, which the host has
anyway, and the state. If one isn't as it should be, the call counts for nothing: its steps are made
again from the state before it, one by one, up to the bad one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn.batch import types_of
from fnn.meshes import beside
from fnn.train.chunks import Chunk
from fnn.train.data import take
from fnn.train.devices import settled
from fnn.train.fitting import foresee
from fnn.train.nonfinite import NonFiniteError, became_nonfinite, holds_nonfinite, numbers_of
from fnn.train.programs import MOST_STEPS, How, Programs
from fnn.train.result import Work
from fnn.train.state import State
from fnn.train.step import TrainStep

# A call of the device takes about so many seconds at most: Ctrl-C waits for its end.
SECONDS = 0.5

# Where the host is asked at each step whether the loop goes on, unless its length is known when it
# is compiled; and how many seconds a step takes at most for that to be felt.
ASKING, SHORT = frozenset({"gpu"}), 0.005

# A state of more bytes is donated, and looked at before each update of it.
LARGE = 2**28


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
        networks = programs.networks  # of other sizes, too: the number of this one
        self._network = networks.setdefault(types_of(state), len(networks))
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
            length=None,
        )
        self._is_far = "cpu" not in platforms  # what is there is copied to be read
        self._asks = bool(platforms & ASKING) and not (stops and look)

    def __call__(self, work: Work, chunk: Chunk, at: int) -> int:
        """Some steps of a chunk from number `at` on; returns how many.

        Raises:
            NonFiniteError: one was bad (with nonfinite="raise").
        """
        layout = self._step.layout
        if layout is not None and chunk.kind == "batch":
            chunk = chunk._replace(data=settled(layout, chunk.data, chunk.fill), fill=None)
        self._latest = self._kind(chunk)
        done, count = 0, int(min(len(chunk.sizes) - at, self.affordable()))
        while done < count:
            done += self._once(work, chunk, at + done, self._steps(chunk, count - done))
        return done

    def affordable(self) -> int:
        """How many steps a call may have, by what the last ones took."""
        if self._most is not None:
            return self._most
        seconds = self._programs.seconds.get(self._latest)
        return max(1, int(SECONDS / seconds)) if seconds else 1

    def _steps(self, chunk: Chunk, most: int) -> int:
        """How many steps the next call makes, of so many that are to be done."""
        most = int(min(most, self._longest))
        return min(most, self._length(chunk) or most)

    def _length(self, chunk: Chunk) -> int | None:
        """How many steps a program of known length makes, if it is worth one.

        It is when the loops of unknown length have gone on for as long as it takes to compile.
        """
        programs, kind = self._programs, self._latest
        if not self._asks or self._how_of(chunk) in programs.alone:
            return None
        if not 0 < programs.seconds.get(kind, 0.0) < SHORT:
            return None
        if kind not in programs.lengths:
            if programs.looped.get(kind, 0.0) < programs.compiled.get(kind, math.inf):
                return None
            length = int(min(len(chunk.sizes), self.affordable(), self._longest, MOST_STEPS))
            if length == 1:
                return None
            programs.lengths[kind] = length
        return programs.lengths[kind]

    def _kind(self, chunk: Chunk) -> tuple:
        """The kind of batch, and which network's: where it is equal, a step takes as long."""
        shapes = [
            (x.shape[0 if chunk.kind == "batch" else 1 :], x.dtype)
            for x in jax.tree.leaves(chunk.data)
        ]
        return self._network, chunk.kind, chunk.rows is not None and chunk.rows.shape[1], *shapes

    def _how_of(self, chunk: Chunk) -> How:
        """What a program of unknown length depends on."""
        return self._how._replace(kind=chunk.kind, masked=chunk.masked)

    def _once(self, work: Work, chunk: Chunk, at: int, count: int) -> int:
        """One call of the device."""
        began, known = time.perf_counter(), len(self._programs.traces)
        count, was_ahead = self._call(work, chunk, at, count)
        waits = not (was_ahead and work.made[0][2].is_ready())
        self._go_ahead(work, chunk, at, count)
        done, good, records = self._read_result(work)
        now = time.perf_counter()
        since = self._read if was_ahead else began
        if len(self._programs.traces) > known:
            self._traced()
            if self._programs.traces[-1].length is None:
                self._programs.seconds[self._latest] = 0.0
                self._programs.compiled[self._latest] = now - began
        else:
            if waits and good:  # else it was over before anybody looked
                self._programs.seconds[self._latest] = (now - since) / max(1, done)
            looped = self._programs.looped.get(self._latest, 0.0)
            self._programs.looped[self._latest] = looped + now - since
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
        if (known := (args[0], self._latest, self._large)) not in self._programs.fitting:
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
        if self._is_far:  # all on their way before the first is waited for
            for x in (numbers, *metrics.values()):
                x.copy_to_host_async()
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
        if after is None or self._kind(after) != self._latest:
            return
        steps = self._steps(after, int(min(len(after.sizes) - at, self.affordable())))
        if steps * seconds > SECONDS:  # where training ends in between, this call is for nothing
            return
        state = work.made[0][0]
        args = self._arguments(after, at, steps, state, work.seen + count)
        if self._how_of(after) in self._programs.alone:
            return
        # What goes wrong does so again when its turn comes.
        with contextlib.suppress(Exception):
            self._ahead = Ahead(after, at, steps, state, [self._run(*args)])

    @property
    def _run(self) -> Callable:
        return self._programs.run_donated if self._large else self._programs.run

    def _arguments(self, chunk: Chunk, at: int, count: int, state: State, seen: int) -> tuple:
        """Those of a program: `count` steps from batch `at` on, of which `seen` were before."""
        length = count if count == self._length(chunk) else None
        how = self._how_of(chunk)._replace(length=length)
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


def _first(records: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return {name: values[:count].copy() for name, values in records.items()}


def _of_one(metrics: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value)[None] for name, value in metrics.items()}
