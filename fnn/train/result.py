"""What `fit` measures and has to show for its work, whenever and however it ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn.text import size_of_tree
from fnn.train.state import State
from fnn.train.step import TrainStep

# ------------------------------------------------------------------------------------------ metrics
# What was measured while training: kept on the device, read once an epoch.
#
# A long epoch's is read in parts, `MOST_ON_DEVICE` steps at a time, so that what is kept grows by
# the numbers themselves and not by an object of Python's, and a buffer on the device, for each.

MOST_ON_DEVICE = 1024


class Log:
    """The metrics of steps and of epochs.

    Attributes:
        history: for each quantity, its value in each epoch that is over.
        count: how many steps there were.
    """

    def __init__(self) -> None:
        self.history: dict[str, list] = {}
        self.count = 0
        self._on_device: list[dict[str, Any]] = []
        self._epoch: list[dict[str, np.ndarray]] = []  # read since the last epoch's end, stacked
        self._before: list[dict[str, np.ndarray]] = []  # read before, an entry an epoch
        self._sizes: list[int] = []

    def add(self, metrics: dict[str, Any], size: int) -> None:
        """The metrics of a step on a batch of `size` examples; they may not be computed yet."""
        self._on_device.append(metrics)
        self._sizes.append(size)
        self.count += 1
        if len(self._on_device) >= 2 * MOST_ON_DEVICE:  # the older half: done, or soon
            self._read(MOST_ON_DEVICE)

    def latest(self) -> dict[str, Any]:
        """The metrics of the last step that the device is done with; empty if there is none."""
        for metrics in reversed(self._on_device[-64:]):
            if metrics["loss"].is_ready():
                return metrics
        return {}

    def epoch_means(self) -> dict[str, Any]:
        """The means over the examples since the last epoch's end (waits for the device)."""
        self._read(len(self._on_device))
        records, sizes = _joined(self._epoch), np.array(self._sizes)
        self._before.append(records)
        self._epoch, self._sizes = [], []
        if "skipped" not in records:
            return weighted_mean(records, sizes)
        taken = records["skipped"] == 0
        # With no step taken, the means are over the bad ones: nan, and not hidden.
        kept = taken if taken.any() else ~taken
        means = weighted_mean({name: r[kept] for name, r in records.items()}, sizes[kept])
        return means | {"skipped": int(len(taken) - taken.sum())}

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Add an epoch's record to the history."""
        for name, value in record.items():
            self.history.setdefault(name, []).append(value)

    def has(self, metrics: dict[str, Any]) -> bool:
        """Whether these metrics were added last."""
        return bool(self._on_device) and self._on_device[-1] is metrics

    @property
    def epoch_has_begun(self) -> bool:
        """Whether there was a step since the last epoch's end."""
        return bool(self._sizes)

    def steps(self) -> dict[str, np.ndarray]:
        """For each metric, its value at each step."""
        self._read(len(self._on_device))
        return _joined(self._before + self._epoch)

    def rewind(self, epochs: int, steps: int) -> None:
        """Forget what came later, and what can no longer be read."""
        self._on_device, self.count = [], steps
        self.history = {name: values[:epochs] for name, values in self.history.items()}
        read = _joined(self._before + self._epoch)
        self._before = [{name: values[:steps] for name, values in read.items()}] if read else []
        self._epoch = []

    def _read(self, count: int) -> None:
        if count:
            self._epoch.append(stacked(jax.device_get(self._on_device[:count])))
            del self._on_device[:count]


def stacked(records: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Records of the same names as one, with the values of each name along a first axis.

    Raises:
        ValueError: the records differ in their names, or the values in their shapes.
    """
    _check_names(records)
    found = {}
    for name in records[0]:
        values = [np.asarray(r[name]) for r in records]
        if len({v.shape for v in values}) > 1:
            shapes = list(dict.fromkeys(v.shape for v in values))
            raise ValueError(f"the metric {name!r} changes its shape from batch to batch: {shapes}")
        found[name] = np.stack(values)
    return found


def weighted_mean(records: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, Any]:
    """The mean of each entry over its first axis, weighted: a float, or an array."""
    means = {}
    for name in sorted(records, key=_order):
        values = np.asarray(records[name], np.float64)
        mean = np.tensordot(weights / np.sum(weights), values, 1)
        means[name] = float(mean) if np.ndim(mean) == 0 else mean
    return means


def _check_names(records: Sequence[dict[str, Any]]) -> None:
    for record in records:
        if record.keys() != records[0].keys():
            raise ValueError(
                "the loss returns other metrics for some batches than for others: "
                f"{sorted(records[0])} and {sorted(record)}."
            )


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if not parts:
        return {}
    _check_names(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _order(name: str) -> tuple[int, str]:
    """The loss first, the norm of the gradient last. (A jitted function sorts its dicts.)"""
    return ({"loss": 0, "grad_norm": 2}.get(name, 1), name)


# ------------------------------------------------------------------------------------------ results


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
