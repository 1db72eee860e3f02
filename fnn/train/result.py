"""What `fit` has to show for its work, whenever and however it ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn.train.history import Log
from fnn.train.state import State, size_of_tree
from fnn.train.step import TrainStep


class FitResult(NamedTuple):
    """What `fit` returns.

    Fields:
        params: the trained parameters.
        history: for each quantity, its value in each whole epoch, a list of floats: `loss`,
            `grad_norm` and the loss's metrics (means over the epoch's examples in this call, as
            they were when their step came), `validation_loss` and so on (at the epoch's end),
            `seconds`.
        steps: for each of `loss`, `grad_norm` and the metrics, its value at each step.
        state: the whole training state; give it to `fit` in the place of params to go on.
        interrupted: whether Ctrl-C ended it early.
    """

    params: Any
    history: dict[str, list]
    steps: dict[str, np.ndarray]
    state: State
    interrupted: bool

    def __repr__(self) -> str:
        """The last epoch's record and what there is, in a few lines; the arrays stay out of it."""
        return _shown(self)


class Work:
    """The book that `fit` keeps: where it stands, and what of it can be saved.

    Attributes:
        log: the metrics.
        epoch: the number of the epoch under way, counted from 1.
        size: how many examples the last batch had.
        made: what the last step made, noted before any signal can strike. See `TrainStep`.
    """

    def __init__(
        self, step: TrainStep, state: State, origin: Callable[[], State], steps: int | None
    ):
        """Begin where the state stands; `origin` makes the first state anew."""
        self.log = Log()
        self.made: list = []
        step._made = self.made
        self.size = 0
        epochs, batch, self._seen_before = (int(n) for n in np.asarray(state.position))
        if steps is not None and batch >= steps:
            epochs, batch = epochs + 1, 0
        self.epoch = epochs + 1
        self._batches_before, self._count_before = batch, 0
        self._kept = (origin, 0, 0, (epochs, batch))
        self._keep_after = 0.0

    @property
    def batch(self) -> int:
        """How many batches of the epoch under way are over."""
        return self._batches_before + self.log.count - self._count_before

    @property
    def seen(self) -> int:
        """How many batches are over in all."""
        return self._seen_before + self.log.count

    def epoch_over(self, state: State) -> State:
        """Go to the next epoch; return the state with its place."""
        self._begin(self.epoch + 1, 0)
        return self._placed(state)

    def save(self, state: State) -> None:
        """Keep a copy of the state at an epoch's end, unless that would take too much time."""
        began = time.monotonic()
        if began < self._keep_after:
            return
        with contextlib.suppress(Exception):  # no memory, or parts on other machines: the older
            copy = jax.tree.map(_to_host, state)
            epochs = _longest(self.log.history)
            self._kept = (lambda: _to_device(copy), epochs, self.log.count, (self.epoch - 1, 0))
        now = time.monotonic()
        self._keep_after = now + 100 * (now - began)

    def result(self, state: State, *, interrupted: bool = False, failed: bool = False) -> FitResult:
        """What there is, also if an error struck between a step's end and its entry in the book.

        Args:
            state: the last state that has a name.
            interrupted: whether Ctrl-C ended it.
            failed: whether the device may have failed, so that the state can't be read.
        """
        if self.made:
            new, metrics, _ = self.made[0]
            if new is state or _is_lost(state):
                state = new
                if not self.log.has(metrics):
                    self.log.add(metrics, self.size)
        if _is_lost(state) or (failed and not _can_be_read(state)):
            make, epochs, count, (epoch, batch) = self._kept
            state = make()
            self.log.rewind(epochs, count)
            self._begin(epoch + 1, batch)
        state = self._placed(state)
        return FitResult(state.params, self.log.history, self.log.steps(), state, interrupted)

    def _begin(self, epoch: int, batch: int) -> None:
        self.epoch = epoch
        self._batches_before, self._count_before = batch, self.log.count

    def _placed(self, state: State) -> State:
        position: Any = np.array([self.epoch - 1, self.batch, self.seen], np.int32)
        old = state.position
        # On the devices of the old one, so that the next step needs no new program.
        if getattr(old, "committed", False):
            position = jax.device_put(position, old.sharding)
        return state._replace(position=jnp.asarray(position))


def attach(error: BaseException, result: FitResult) -> None:
    """Give an error the work so far, as its attribute `result`."""
    inner = getattr(error, "result", None)
    with contextlib.suppress(Exception):
        if isinstance(inner, FitResult):  # of a fit inside this one
            BaseException.__setattr__(error, "inner_result", inner)
        # Past a __setattr__ of its own: of a frozen dataclass, for one.
        BaseException.__setattr__(error, "result", result)
    with contextlib.suppress(Exception):
        steps = _longest(result.steps)
        note = f"(fnn.fit: `result` of this error is the FitResult of the {steps} steps so far.)"
        notes = [*getattr(error, "__notes__", ()), note]
        BaseException.__setattr__(error, "__notes__", notes)


def _longest(lists: dict[str, Any]) -> int:
    """How many entries the longest list has: of epochs in a history, of steps in `steps`."""
    return max(map(len, lists.values()), default=0)


def _is_lost(state: State) -> bool:
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))


def _can_be_read(state: State) -> bool:
    try:
        jax.block_until_ready(state)
    except Exception:
        return False
    return True


def _to_host(x: Any) -> Any:
    """A copy in the host's memory; of a key on its device. (It doesn't hold on to x's buffer.)"""
    copy = jnp.copy(x)
    return copy if jnp.issubdtype(copy.dtype, jax.dtypes.extended) else np.asarray(copy)


def _to_device(state: State) -> State:
    try:
        return jax.tree.map(jnp.asarray, state)
    except Exception:  # the device is gone: numpy's arrays are as good to save
        return state


def _shown(result: FitResult, most: int = 12) -> str:
    epochs = _longest(result.history)
    steps = _longest(result.steps)
    last = [f"{k} {_short(v[-1])}" for k, v in result.history.items() if len(v)]
    if len(last) > most:
        last = [*last[:most], f"and {len(last) - most} more"]
    lines = [
        f"FitResult: {epochs} epoch{'s' if epochs != 1 else ''}, {steps} steps"
        + (", interrupted" if result.interrupted else ""),
        f"  last epoch: {', '.join(last)}" if last else "  no epoch is over",
        f"  params: {size_of_tree(result.params)}",
        f"  fields: {', '.join(result._fields)}",
    ]
    return "\n".join(lines)


def _short(value: Any) -> str:
    """A number of a record; of an array its shape."""
    return f"{float(value):.4g}" if np.ndim(value) == 0 else f"of shape {np.shape(value)}"
