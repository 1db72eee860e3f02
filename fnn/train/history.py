"""What was measured while training: kept on the device, read once an epoch.

A long epoch's is read in parts, `MOST_ON_DEVICE` steps at a time, so that what is kept grows by
the numbers themselves and not by an object of Python's, and a buffer on the device, for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

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
