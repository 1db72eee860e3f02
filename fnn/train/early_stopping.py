"""Early stopping: end training where it no longer gets better, and keep the best."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments
from fnn.train.events import Listener
from fnn.train.result import Work


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """End training after `patience` epochs in a row that weren't better than the best before them.

        stop = fnn.EarlyStopping(patience=5)
        result = fnn.fit(loss, params, (X, y), optimizer, epochs=100, key=key,
                         validation=(X_val, y_val), early_stopping=stop)
        result.best.params

    An epoch is better if `monitor` is lower than in the best before it by more than `least`
    (higher by more, with `higher`). A value that is nan is never better. The state at the end of
    the best epoch is copied; `result.best` is the copy.

    Fields:
        patience: a number of epochs; None to end nothing and only keep the best.
        monitor: an entry of an epoch's record, a number: "loss", "validation_loss", or a metric.
        higher: whether higher is better, as of an accuracy.
        least: how much better is better, at least 0.

    Raises:
        TypeError, ValueError: a field isn't of its kind.

    Reference: Prechelt, "Early stopping, but when?" (1998), there "UP": stop when the validation
    error went up in so many successive strips.
    """

    patience: int | None
    monitor: str = "validation_loss"
    higher: bool = False
    least: float = 0.0

    def __post_init__(self) -> None:
        where = "EarlyStopping"
        if self.patience is not None:
            arguments.integer(where, "patience", self.patience, least=1)
        if not isinstance(self.monitor, str):
            raise TypeError(
                f"{where}: monitor must be the name of an entry of the record such as "
                f"'validation_loss', but got {arguments.show(self.monitor)}."
            )
        arguments.flag(where, "higher", self.higher)
        arguments.number(where, "least", self.least, least=0)

    def is_better(self, value: float, best: float) -> bool:
        """Whether a value is better than the best before it; nan as the best is none."""
        if math.isnan(value) or math.isnan(best):
            return not math.isnan(value)
        return value - best > self.least if self.higher else best - value > self.least


class BestKeeper(Listener):
    """Keeps the best state in `work.best`, and ends training by an `EarlyStopping`.

    What a checkpoint has of them goes on only where what is best means the same.
    """

    def __init__(self, stopping: EarlyStopping):
        self._stopping = stopping
        self._best = math.nan
        self._since = 0  # epochs without a better one

    def begin(self, work: Work) -> None:
        known = work.best_by or {}
        if all(known.get(name) == value for name, value in self._meaning.items()):
            self._best, self._since = known["value"], known["since"]
        else:
            work.best = None
        self._note(work)

    def epoch_over(self, work: Work, epoch: int, record: dict[str, Any]) -> bool:
        if self._is_best(self._value(record)):
            # On the device, in buffers of its own.
            work.best = jax.tree.map(jnp.copy, work.state)
        self._note(work)
        patience = self._stopping.patience
        return patience is not None and self._since >= patience

    def _is_best(self, value: float) -> bool:
        """Whether an epoch's value is the best so far; counted."""
        if self._stopping.is_better(value, self._best):
            self._best, self._since = value, 0
            return True
        self._since += 1
        return False

    @property
    def _meaning(self) -> dict[str, Any]:
        """What decides which of two epochs is better."""
        own = self._stopping
        return {"monitor": own.monitor, "higher": bool(own.higher), "least": float(own.least)}

    def _note(self, work: Work) -> None:
        work.best_by = {**self._meaning, "value": self._best, "since": self._since}

    def _value(self, record: dict[str, Any]) -> float:
        name = self._stopping.monitor
        if name not in record:
            raise ValueError(
                f"EarlyStopping: the record has no {name!r} to monitor. It has "
                f"{', '.join(map(repr, record))}."
            )
        if np.ndim(record[name]) > 0:
            raise ValueError(
                f"EarlyStopping: {name!r} is an array of shape {np.shape(record[name])}, but only "
                "a number can be monitored."
            )
        return float(record[name])


def check_early_stopping(value: Any, has_validation: bool) -> None:
    """Raise unless `fit` can be ended by it."""
    if not isinstance(value, EarlyStopping):
        hint = " Call it, with its patience." if value is EarlyStopping else ""
        raise TypeError(
            "fit: early_stopping must be an EarlyStopping such as fnn.EarlyStopping(patience=5), "
            f"but got {arguments.show(value)}.{hint}"
        )
    if value.monitor.startswith("validation_") and not has_validation:
        raise ValueError(
            f"fit: early_stopping monitors {value.monitor!r}, but there are no data for it: "
            "validation=... (or EarlyStopping(..., monitor='loss'))."
        )
