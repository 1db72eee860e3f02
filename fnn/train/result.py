"""What `fit` measures and has to show for its work, whenever and however it ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from fnn.sharding.placement import put
from fnn.text import size_of_tree
from fnn.train.state import State
from fnn.train.together import in_all, is_of_all, is_shared

# ------------------------------------------------------------------------------------------ metrics
# What was measured while training, as the device's calls return it. So many parts are joined, so
# that what is kept grows by the numbers themselves and not by an object of Python's for each.

MOST_PARTS = 1024


class Log:
    """The metrics of steps and of epochs.

    Attributes:
        history: for each quantity, its value in each epoch that is over.
        count: how many steps there were.
    """

    def __init__(self) -> None:
        self.history: dict[str, list] = {}
        self.count = 0
        self._parts: list[dict[str, np.ndarray]] = []  # an entry a call
        self._sizes: list[np.ndarray] = []
        self._epoch = 0  # the first part since the last epoch's end

    def extend(self, records: dict[str, np.ndarray], sizes: np.ndarray) -> None:
        """The metrics of steps, stacked, and how many examples each of their batches had."""
        if len(sizes) == 0:
            return
        self._parts.append(records)
        self._sizes.append(sizes)
        self.count += len(sizes)
        if len(self._parts) - self._epoch >= MOST_PARTS:
            self._join_epoch()

    def latest(self) -> dict[str, Any]:
        """The metrics of the last step; empty if there is none."""
        return {name: values[-1] for name, values in self._parts[-1].items()} if self._parts else {}

    def epoch_means(self) -> dict[str, Any]:
        """The means over the examples since the last epoch's end."""
        records, sizes = self._join_epoch()
        self._epoch = len(self._parts)
        if "skipped" not in records:
            return weighted_mean(records, sizes)
        taken = records["skipped"] == 0
        # With no step taken, the means are over the bad ones: nan, and not hidden.
        kept = taken if taken.any() else ~taken
        means = weighted_mean({name: r[kept] for name, r in records.items()}, sizes[kept])
        return means | {"skipped": int(len(taken) - taken.sum())}

    def _join_epoch(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Make one part of those since the last epoch's end, and return it."""
        records = _joined(self._parts[self._epoch :])
        sizes = np.concatenate(self._sizes[self._epoch :])
        self._parts[self._epoch :], self._sizes[self._epoch :] = [records], [sizes]
        return records, sizes

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Add an epoch's record to the history."""
        for name, value in record.items():
            self.history.setdefault(name, []).append(value)

    @property
    def epoch_has_begun(self) -> bool:
        """Whether there was a step since the last epoch's end."""
        return len(self._parts) > self._epoch

    def steps(self) -> dict[str, np.ndarray]:
        """For each metric, its value at each step."""
        return _joined(self._parts)

    def sizes(self) -> np.ndarray:
        """How many examples the batch of each step had."""
        return np.concatenate(self._sizes) if self._sizes else np.zeros(0, np.int32)

    def go_on(self, history: dict, steps: dict, sizes: np.ndarray, batch: int) -> None:
        """Begin where an earlier log ended, with the last `batch` steps in the epoch under way."""
        self.history = history
        before = len(sizes) - min(batch, len(sizes))
        for part in (slice(0, before), slice(before, None)):
            if len(sizes[part]):
                self.extend({name: v[part] for name, v in steps.items()}, sizes[part])
        self._epoch = int(before > 0)

    def cut(self, steps: int, epochs: int | None = None) -> None:
        """Forget what came after so many steps, and so many epochs."""
        if epochs is not None:
            self.history = {name: values[:epochs] for name, values in self.history.items()}
        if steps < self.count:
            joined, sizes = _joined(self._parts), np.concatenate(self._sizes)[:steps]
            self._parts = [{name: values[:steps] for name, values in joined.items()}]
            self._sizes, self.count = [sizes], steps
            self._epoch = 0


def stacked(records: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Records of the same names as one, with the values of each name along a first axis.

    Raises:
        ValueError: the records differ in their names, or the values in their shapes.
    """
    _check_names(records)
    _check_shapes(records)
    return {name: np.stack([np.asarray(r[name]) for r in records]) for name in records[0]}


def weighted_mean(records: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, Any]:
    """The mean of each entry over its first axis, weighted: a float, or an array."""
    means, parts = {}, weights / np.sum(weights)
    for name in sorted(records, key=_order):
        values = np.asarray(records[name], np.float64)
        mean = np.dot(parts, values) if values.ndim == 1 else np.tensordot(parts, values, 1)
        means[name] = float(mean) if np.ndim(mean) == 0 else mean
    return means


def _check_names(records: Sequence[dict[str, Any]]) -> None:
    for record in records:
        if record.keys() != records[0].keys():
            raise ValueError(
                "the loss returns other metrics for some batches than for others: "
                f"{sorted(records[0])} and {sorted(record)}."
            )


def _check_shapes(records: Sequence[dict[str, Any]]) -> None:
    for name in records[0]:
        shapes = list(dict.fromkeys(np.shape(r[name]) for r in records))
        if len(shapes) > 1:
            raise ValueError(f"the metric {name!r} changes its shape from batch to batch: {shapes}")


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if len(parts) < 2:
        return dict(*parts)
    _check_names(parts)
    _check_shapes([{name: values[0] for name, values in part.items()} for part in parts])
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
            `seconds`; `learning_rate` if it is known; `skipped` and `rolled_back`, how often, where
            steps may be.
        steps: for each of `loss`, `grad_norm` and the metrics, its value at each step.
        state: the whole training state; give it to `fit` in the place of params to go on.
        interrupted: whether Ctrl-C ended it early (with checkpoints, SIGTERM too).
        best: with `early_stopping`, the state at the end of the best epoch.
    """

    params: Any
    history: dict[str, list]
    steps: dict[str, np.ndarray]
    state: State
    interrupted: bool
    best: State | None = None

    def __repr__(self) -> str:
        """The last epoch's record and what there is, in a few lines; the arrays stay out of it."""
        return _shown(self)


class Work:
    """The book that `fit` keeps: where it stands, and what of it can be saved.

    Attributes:
        log: the metrics.
        epoch: the number of the epoch under way, counted from 1.
        made: what the device's last call returned, the state first, noted before any signal can
            strike.
        best: see `FitResult`.
        best_by: what makes it the best, of JSON: see `BestKeeper`. None without early stopping.
    """

    def __init__(self, state: State, origin: Callable[[], State], steps: int | None):
        """Begin where the state stands; `origin` makes the first state anew."""
        self.log = Log()
        self.made: list = []
        self.best: State | None = None
        self.best_by: dict[str, Any] | None = None
        epochs, batch, self._seen_before = (int(n) for n in np.asarray(state.position))
        if steps is not None and batch >= steps:
            epochs, batch = epochs + 1, 0
        self.epoch = epochs + 1
        self._batches_before, self._count_before = batch, 0
        self._now = (state, 0)  # together, so that no signal can come between
        self._kept = (origin, 0, 0, (epochs, batch))
        self._keep_after = 0.0

    def go_on(self, state: State, history: dict, steps: dict, sizes: np.ndarray) -> None:
        """Begin where an earlier call of `fit` ended, as if it were this one.

        Args:
            state: its last, in arrays of its own; not yet at the next epoch if a batch is over.
            history, steps: as in its FitResult.
            sizes: how many examples the batch of each step had.
        """
        epochs, batch, seen = (int(n) for n in np.asarray(state.position))
        self.log.go_on(history, steps, sizes, batch)
        self._seen_before = seen - self.log.count
        self._now = state, self.log.count
        self._begin(epochs + 1, batch)
        copy = jax.tree.map(_to_host, state)
        over = longest(history)
        self._kept = (lambda: _to_device(copy), over, self.log.count, (epochs, batch))

    @property
    def latest(self) -> State:
        """The state after the last step, without its place in the data."""
        return self._now[0]

    @property
    def state(self) -> State:
        """The state after the last step, with its place in the data."""
        position: Any = np.array([self.epoch - 1, self.batch, self.seen], np.int32)
        old = self.latest.position
        # On the devices of the old one, so that the next step needs no new program.
        if getattr(old, "committed", False):
            return self.latest._replace(position=_put(position, old.sharding))
        return self.latest._replace(position=jnp.asarray(position))

    @property
    def batch(self) -> int:
        """How many batches of the epoch under way are over."""
        return self._batches_before + self._now[1] - self._count_before

    @property
    def seen(self) -> int:
        """How many batches are over in all."""
        return self._seen_before + self._now[1]

    def enter(self, state: State, records: dict[str, np.ndarray], sizes: np.ndarray) -> None:
        """Note what steps made: the state, and their metrics."""
        self.log.extend(records, sizes)
        self._now = state, self.log.count

    def epoch_over(self) -> None:
        """Go to the next epoch."""
        self._begin(self.epoch + 1, 0)

    def save(self) -> None:
        """Keep a copy of the state at an epoch's end, unless that would take too much time."""
        began = time.monotonic()
        is_due = began >= self._keep_after
        # Several processes keep the same one, to go back to: not each by its own clock.
        if is_of_all(self.latest):
            is_due = bool(in_all(np.int32(is_due)).all())
        elif is_shared(self.latest):
            is_due = True
        if not is_due:
            return
        with contextlib.suppress(Exception):  # no memory: the older
            copy = jax.tree.map(_to_host, self.latest)
            epochs = longest(self.log.history)
            self._kept = (lambda: _to_device(copy), epochs, self.log.count, (self.epoch - 1, 0))
        now = time.monotonic()
        self._keep_after = now + 100 * (now - began)

    def roll_back(self) -> None:
        """Go back to the last state that was kept, and stay where the data are."""
        self._now = self._kept[0](), self._now[1]

    def result(self, *, interrupted: bool = False, failed: bool = False) -> FitResult:
        """What there is, wherever an error struck.

        Args:
            interrupted: whether Ctrl-C ended it.
            failed: whether the device may have failed, so that the state can't be read.
        """
        self.log.cut(self._now[1])
        if _is_lost(self.latest) or (failed and not _can_be_read(self.latest)):
            make, epochs, count, (epoch, batch) = self._kept
            self.log.cut(count, epochs)
            self._now = make(), count
            self._begin(epoch + 1, batch)
        state = self.state
        return FitResult(
            state.params, self.log.history, self.log.steps(), state, interrupted, self.best
        )

    def _begin(self, epoch: int, batch: int) -> None:
        self.epoch = epoch
        self._batches_before, self._count_before = batch, self._now[1]


def attach(error: BaseException, result: FitResult) -> None:
    """Give an error the work so far, as its attribute `result`."""
    steps = longest(result.steps)
    carry(
        error,
        result,
        f"(fnn.fit: `result` of this error is the FitResult of the {steps} steps so far.)",
    )


def carry(error: BaseException, result: Any, note: str) -> None:
    """Give any error an attribute `result`, and a note."""
    inner = getattr(error, "result", None)
    with contextlib.suppress(Exception):
        if isinstance(inner, type(result)):  # of a fit inside this one
            BaseException.__setattr__(error, "inner_result", inner)
        # Past a __setattr__ of its own: of a frozen dataclass, for one.
        BaseException.__setattr__(error, "result", result)
    annotate(error, note)


def annotate(error: BaseException, note: str) -> None:
    """Give any error a note."""
    with contextlib.suppress(Exception):
        notes = [*getattr(error, "__notes__", ()), note]
        BaseException.__setattr__(error, "__notes__", notes)


def longest(lists: dict[str, Any]) -> int:
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


class _OnHost:
    """An array's numbers in the host's memory, and where they lay; of several processes, its own.

    Attributes:
        numbers: an array; or a list of pairs of a device of this process and its array.
        shape: of the whole.
        sharding: None where JAX puts new arrays.
    """

    def __init__(self, x: jax.Array):
        self.shape = x.shape
        self.sharding = x.sharding if getattr(x, "committed", False) else None
        self.numbers: Any
        if x.is_fully_addressable:
            self.numbers = _numbers(x)
        else:
            shards = jnp.copy(x).addressable_shards
            self.numbers = [(s.device, np.asarray(s.data)) for s in shards]

    def again(self) -> jax.Array:
        """The array, where it lay."""
        if self.sharding is None:
            return jnp.asarray(self.numbers)
        if isinstance(self.numbers, np.ndarray):
            return _put(self.numbers, self.sharding)
        own = [jax.device_put(x, device) for device, x in self.numbers]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, own)


def _numbers(x: jax.Array) -> np.ndarray:
    """The numbers of an array, copied without holding on to its buffer.

    No program of the device is needed to copy them, if it can be helped: it would stand in line
    behind the training that was put there ahead.
    """
    if next(iter(x.devices())).platform != "cpu":
        return np.asarray(x)
    buffer: Any = x
    try:
        return np.array(np.from_dlpack(buffer))
    except Exception:  # divided over devices, or of a dtype that numpy hasn't
        return np.asarray(jnp.copy(x))


def _put(x: Any, sharding: Any) -> jax.Array:
    """An array where another lies, in each process without word from the others."""
    is_named = isinstance(sharding, NamedSharding)
    return put(x, sharding) if is_named else jax.device_put(x, sharding)


def _to_host(x: Any) -> Any:
    """A copy in the host's memory; of a key on its device. (It doesn't hold on to x's buffer.)"""
    x = jnp.asarray(x)
    return jnp.copy(x) if jnp.issubdtype(x.dtype, jax.dtypes.extended) else _OnHost(x)


def _to_device(state: State) -> State:
    """The state of such copies."""
    is_kept = lambda x: isinstance(x, _OnHost)
    try:
        return jax.tree.map(lambda x: x.again() if is_kept(x) else jnp.asarray(x), state)
    except Exception:  # the device is gone: numpy's arrays are as good to save
        return jax.tree.map(lambda x: x.numbers if is_kept(x) else x, state)


def _shown(result: FitResult, most: int = 12) -> str:
    epochs = longest(result.history)
    steps = longest(result.steps)
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
