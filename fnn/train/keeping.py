"""Checkpoints of `fit`: taken up when it begins, written as it goes, all there at its end."""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from fnn.frames import warn
from fnn.train.checkpoint_files import CheckpointError, Files
from fnn.train.checkpoints import Checkpoints, Saved, write
from fnn.train.configuration import versions
from fnn.train.data import Arrays, Stream
from fnn.train.events import Listener
from fnn.train.interrupts import Interrupts
from fnn.train.nonfinite import NonFiniteError
from fnn.train.result import FitResult, Work, longest
from fnn.train.state import State, own
from fnn.train.together import in_all, in_all_or_none, processes_of

# Unless the user says how often: within long epochs every ten minutes, at the ends of short ones as
# often as takes no more than this part of the time.
LONG, PART = 600.0, 0.05

_ARRAY = re.compile(r"(\w+\[[\d,]*\]) [0-9a-f]{8}")  # as `of_arrays` tells of it

# What a change of versions or devices may change by itself: names in optax's source, and the last
# bits of parameters that were drawn.
_OF_THE_VERSIONS = ("optimizer", "step", "start")


@contextlib.contextmanager
def kept(
    options: Checkpoints,
    configuration: dict[str, Any],
    last: int,
    work: Work,
    training: Arrays | Stream,
    interrupts: Interrupts,
) -> Iterator[Keeper]:
    """The checkpoints of one call of `fit`, and its work where the newest one stands.

    Args:
        options, configuration, last, interrupts: see `Keeper`.
        work: at its beginning; it goes on where the checkpoint stands.
        training: the data; an iterator is read up to there.

    Raises:
        CheckpointError: the folder can't be written to, or is another run's; the checkpoint is
            damaged, of another tree, or of another call.
        ValueError: some processes don't take part in the training.
    """
    _check_processes(work.latest)
    keeper = Keeper(options, configuration, last, training.steps, interrupts)
    with keeper.open():
        begun = work.seen
        saved = keeper.resume(work.latest)
        if saved is not None:
            work.go_on(own(saved.state), saved.history, saved.steps, saved.sizes)
            work.best = None if saved.best is None else own(saved.best)
            work.best_by = saved.about.get("best_by")
            if isinstance(training, Stream) and isinstance(training.source, Iterator):
                collections.deque(itertools.islice(training.source, work.seen - begun), maxlen=0)
        del saved
        yield keeper


class Keeper(Listener):
    """The checkpoints of one call of `fit`.

    Attributes:
        is_over: whether the run ended before its last epoch where the checkpoint was written, as
            `early_stopping` or `after_epoch` wanted.

    Args:
        options: the user's.
        configuration: what the call is: a name -> a setting, or a dict of settings; of JSON.
        last: the number of the call's last epoch.
        steps: how many batches an epoch has, if that is known.
        interrupts: those of the call: a save isn't interrupted.
    """

    def __init__(
        self,
        options: Checkpoints,
        configuration: dict[str, Any],
        last: int,
        steps: int | None,
        interrupts: Interrupts,
    ):
        self._options, self._configuration = options, configuration
        self._last, self._steps, self._interrupts = last, steps, interrupts
        self._files = Files(options.folder)
        self._scores: dict[int, float] = {}
        self._at: tuple[int, ...] | None = None  # the position of the last checkpoint
        self._of_record: dict[str, float] = {}  # the numbers of its epoch's record
        self._batch = self._unrecorded = 0
        self._since = time.monotonic()
        self.is_over = False

    @contextlib.contextmanager
    def open(self) -> Iterator[Keeper]:
        """Hold the folder while entered.

        Raises:
            CheckpointError: the folder can't be written to, or is another run's.
        """
        with self._files.open():
            yield self

    def resume(self, like: State) -> Saved | None:
        """The newest checkpoint, if there is one.

        Raises:
            CheckpointError: it is damaged, of another tree, or of another call.
        """
        steps = self._files.steps()
        self._check_alike(steps)
        if not steps:
            return None
        saved = self._options._read(self._files, steps[-1], like)
        in_all_or_none(lambda: self._check(saved, steps[-1]), CheckpointError)
        self._scores = self._options._scores(self._files)
        about = saved.about
        self._at, self._of_record = _position(saved.state), about["scores"]
        self.is_over = bool(about["stopped"]) and self._last <= about["last_epoch"]
        return saved

    # ------------------------------------------------------------------------------- as it goes

    def begin(self, work: Work) -> None:
        self._batch, self._since = work.batch, time.monotonic()
        self._unrecorded = work.epoch - 1 - longest(work.log.history)  # by this call's history

    def call_over(self, work: Work) -> None:
        self._batch = work.batch
        every = self._options.every_steps
        if every is None:
            # Of several processes each has its own clock, and all must do the same.
            is_due = _alone() and time.monotonic() - self._since > LONG
        else:
            is_due = work.seen - (0 if self._at is None else self._at[2]) >= every
        is_end = self._steps is not None and work.batch >= self._steps  # which has its own
        if is_due and not is_end:
            self._save(work, work.state)

    def epoch_over(self, work: Work, epoch: int, record: dict[str, Any]) -> None:
        every, scores = self._options.every, _scalars(record)
        if every is None and not _alone():
            every = 1
        is_due = self._files.is_cheap(PART) if every is None else epoch % every == 0
        if self._is_best(scores) or is_due or epoch >= self._last:
            self._save(work, work.state, scores)

    def end(self, work: Work, result: FitResult) -> None:
        stopped = not result.interrupted and work.epoch <= self._last and not self.is_over
        if _alone() or not result.interrupted:  # the others may not be
            self._save(work, result.state, stopped=stopped)
        self._finish()

    def where_it_goes_on(self) -> str:
        """What to tell who interrupted it."""
        if _alone():
            return "All is saved: the same call goes on."
        return f"Several processes save at epochs' ends alone: {self._newest()}."

    def _newest(self) -> str:
        steps = self._files.steps()
        return f"the same call goes on from step {steps[-1]}" if steps else "nothing is saved yet"

    def failed(self, work: Work, result: FitResult, error: BaseException) -> None:
        if isinstance(error, CheckpointError):
            return
        if not (_alone() or isinstance(error, NonFiniteError)):  # which strikes all of them alike
            error.add_note(f"(fnn.fit: of several processes none saves alone: {self._newest()}.)")
            return
        try:
            self._save(work, result.state)
            self._finish()
        except Exception as problem:
            error.add_note(f"(fnn.fit: nor could it be saved: {problem})")
        else:
            at = self._files.steps()[-1:]
            error.add_note(f"(fnn.fit: saved as the checkpoint of step {at[0] if at else 0}.)")

    def _save(
        self,
        work: Work,
        state: State,
        scores: dict[str, float] | None = None,
        *,
        stopped: bool = False,
    ) -> None:
        """Begin to write a checkpoint, unless the last one was of the same place.

        Raises:
            CheckpointError: it, or the one before, can't be written.
        """
        position = _position(state)
        if position[0] - longest(work.log.history) > self._unrecorded:
            # Its validation was interrupted: the epoch will be ended, and recorded, again.
            position = (position[0] - 1, self._batch, position[2])
            state = state._replace(position=np.array(position, np.int32))
        if position == self._at and not stopped:
            return
        if scores is None:  # those of before, where it is written again
            scores = self._of_record if position == self._at else {}
        about = {
            "configuration": self._configuration,
            "epochs": position[0],
            "scores": scores,
            "stopped": stopped,
            "last_epoch": self._last,
            "best_by": work.best_by,
        }
        log = work.log
        saved = Saved(state, log.history, log.steps(), log.sizes(), about, work.best)
        with self._interrupts.held():
            self._files.wait()
            self._tidy()
            write(self._files, position[2], saved)
            if self._options.best in scores:
                self._scores[position[2]] = scores[self._options.best]
            self._at, self._of_record, self._since = position, scores, time.monotonic()

    def _finish(self) -> None:
        """Wait for what is being written."""
        with self._interrupts.held():
            self._files.wait()
            self._tidy()

    def _tidy(self) -> None:
        """Delete what needn't be kept."""
        steps = self._files.steps()
        there = {step: score for step, score in self._scores.items() if step in steps}
        kept = set(steps if self._options.keep is None else steps[-self._options.keep :])
        best = self._options._best(there)
        self._files.remove(lambda step: step in kept or step == best)

    def _is_best(self, scores: dict[str, float]) -> bool:
        """Is the epoch the best so far, in the number that is to be best?

        Raises:
            ValueError: the record has no such number.
        """
        name = self._options.best
        if name is None:
            return False
        if name not in scores:
            raise ValueError(
                f"Checkpoints: best={name!r} is no number of the epoch's record, which has "
                f"{', '.join(scores)}."
            )
        now = math.inf  # later than all others
        return self._options._best({**self._scores, now: scores[name]}) == now

    def _check_alike(self, steps: list[int]) -> None:
        """That all processes see the same checkpoints.

        Raises:
            CheckpointError: they don't.
        """
        newest = in_all(np.int32(steps[-1] if steps else -1))
        if (newest != newest[0]).any():
            seen = ", ".join("none" if n < 0 else f"step {n}" for n in newest.tolist())
            raise CheckpointError(
                f"the processes see other newest checkpoints in {self._options.folder}: {seen}. It "
                "must be a folder on a file system that all of them share.",
                str(self._options.folder),
            )

    def _check(self, saved: Saved, step: int) -> None:
        """That the checkpoint is of this call."""
        there, here = saved.about["versions"], versions()
        unlike = [
            f"{name} {there.get(name)} (now {here[name]})"
            for name in here
            if there.get(name) != here[name]
        ]
        skipped = {*self._options.allow_changed, *(_OF_THE_VERSIONS if unlike else ())}
        changed, lines = [], []
        old = saved.about["configuration"]
        for name, setting in self._configuration.items():
            found = _changes(name, old.get(name), setting)
            if found and name not in skipped:
                changed.append(name)
                lines += found[:4] + [f"and {len(found) - 4} more of {name}"] * (len(found) > 4)
        if lines:
            shown = "\n".join(f"  {line}" for line in lines)
            allowed = f"({changed[0]!r},)" if len(changed) == 1 else str(tuple(changed))
            raise CheckpointError(
                f"the checkpoints in {self._options.folder} are of another call of fit:\n{shown}\n"
                "Nothing was changed. The same call goes on from them; another run needs a folder "
                f"of its own. If the change is meant: Checkpoints(..., allow_changed={allowed}).",
                str(self._options.folder),
                step,
            )
        if unlike:
            warn(
                f"fit: the checkpoint of step {step} was written with {', '.join(unlike)}: what "
                "follows may differ in the last bits from an uninterrupted run."
            )


def _alone() -> bool:
    return jax.process_count() == 1


def _check_processes(state: State) -> None:
    """Raise a ValueError unless all processes train this state together."""
    count, own = jax.process_count(), processes_of(state)
    if len(own) < count:
        raise ValueError(
            f"fit: checkpoints are written by all {count} processes together, but the training "
            f"state lies on devices of {len(own)} of them alone: give fit a layout=... whose mesh "
            "has the devices of all, jax.make_mesh((jax.device_count(),), ('data',)), say."
        )


def _position(state: State) -> tuple[int, ...]:
    return tuple(int(n) for n in np.asarray(state.position))


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record; without arrays."""
    return {name: float(value) for name, value in record.items() if np.ndim(value) == 0}


def _changes(name: str, old: Any, new: Any) -> list[str]:
    """What is different about a setting, a line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        entries = dict.fromkeys([*new, *old])
        return [line for e in entries for line in _changes(e, old.get(e), new.get(e))]
    if old == new:
        return []
    array = _ARRAY.fullmatch(str(old)), _ARRAY.fullmatch(str(new))
    if array[0] and array[1] and array[0][1] == array[1][1]:
        return [f"{name} ({array[0][1]}) holds other numbers than then"]
    return [f"{name}: {_shown(old)} in the checkpoint, {_shown(new)} here"]


def _shown(setting: Any, most: int = 100) -> str:
    if setting is None:
        return "nothing"
    text = setting if isinstance(setting, str) else repr(setting)
    return text if len(text) <= most else text[: most - 3] + "..."
