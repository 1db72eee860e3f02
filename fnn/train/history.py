"""What was measured while training: kept on the device, read once an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


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
        self._read: list[dict[str, np.ndarray]] = []
        self._sizes: list[int] = []

    def add(self, metrics: dict[str, Any], size: int) -> None:
        """The metrics of a step on a batch of `size` examples; they may not be computed yet."""
        self._on_device.append(metrics)
        self._sizes.append(size)
        self.count += 1

    def latest(self) -> dict[str, Any]:
        """The metrics of the last step that the device is done with; empty if there is none."""
        for metrics in reversed(self._on_device[-64:]):
            if metrics["loss"].is_ready():
                return metrics
        return {}

    def epoch_means(self) -> dict[str, Any]:
        """The means over the examples since the last epoch's end (waits for the device)."""
        records, sizes = jax.device_get(self._on_device), self._sizes
        self._on_device, self._sizes = [], []
        self._read += records
        if "skipped" not in records[0]:
            return weighted_mean(records, sizes)
        taken = [i for i, r in enumerate(records) if not r["skipped"]]
        # With no step taken, the means are over the bad ones: nan, and not hidden.
        kept = taken or range(len(records))
        means = weighted_mean([records[i] for i in kept], [sizes[i] for i in kept])
        return means | {"skipped": len(records) - len(taken)}

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Add an epoch's record to the history."""
        for name, value in record.items():
            self.history.setdefault(name, []).append(value)

    def steps(self) -> dict[str, np.ndarray]:
        """For each metric, its value at each step."""
        self._read += jax.device_get(self._on_device)
        self._on_device = []
        names = self._read[0] if self._read else {}
        return {name: np.stack([r[name] for r in self._read]) for name in names}


def weighted_mean(records: Sequence[dict[str, Any]], weights: Sequence[int]) -> dict[str, Any]:
    """The mean of each entry of dicts of scalars (or arrays), weighted."""
    total = sum(weights)
    means = {}
    for name in sorted(records[0], key=_order):
        values = [np.asarray(r[name], np.float64) for r in records]
        mean = sum(v * (w / total) for v, w in zip(values, weights, strict=True))
        means[name] = float(mean) if np.ndim(mean) == 0 else mean
    return means


def _order(name: str) -> tuple[int, str]:
    """The loss first, the norm of the gradient last. (A jitted function sorts its dicts.)"""
    return ({"loss": 0, "grad_norm": 2}.get(name, 1), name)
