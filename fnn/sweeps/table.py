"""One quantity over the axes of a sweep: means over some of them, the best, and as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fnn import arguments, text
from fnn.sweeps.axes import Axis, show

MOST_ROWS = 16
MOST_COLUMNS = 10


class Table:
    """Numbers with named axes, such as a sweep's losses over seeds and learning rates.

    Attributes:
        metric: what the numbers are.
        axes: the name of each axis, and the values along it.
        values: the numbers, an array with an axis for each; nan where there is none.
    """

    def __init__(self, metric: str, axes: Sequence[Axis], values: np.ndarray):
        self.metric = metric
        self._axes = tuple(axes)
        self.values = values

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        return {n: v for a in self._axes for n, v in zip(a.names, a.values, strict=True)}

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype, copy=True if copy is None else copy)

    # ------------------------------------------------------------------------ fewer axes

    def mean(self, over: str | Sequence[str]) -> Table:
        """The mean over an axis, or several; nan where one of the numbers is.

        Raises:
            TypeError, ValueError: there is no such axis.
        """
        return self._reduced("mean", np.mean, over)

    def std(self, over: str | Sequence[str]) -> Table:
        """The standard deviation over them (of all there are: the divisor is their number).

        Raises:
            TypeError, ValueError: there is no such axis.
        """
        return self._reduced("std", np.std, over)

    def min(self, over: str | Sequence[str]) -> Table:
        """The smallest number along them; nan where one is.

        Raises:
            TypeError, ValueError: there is no such axis.
        """
        return self._reduced("min", np.min, over)

    def max(self, over: str | Sequence[str]) -> Table:
        """The largest number along them; nan where one is.

        Raises:
            TypeError, ValueError: there is no such axis.
        """
        return self._reduced("max", np.max, over)

    def median(self, over: str | Sequence[str]) -> Table:
        """The median along them; nan where one is.

        Raises:
            TypeError, ValueError: there is no such axis.
        """
        return self._reduced("median", np.median, over)

    def _reduced(self, name: str, reduce: Callable, over: Any) -> Table:
        places = places_of(name, self._axes, over)
        kept = [axis for i, axis in enumerate(self._axes) if i not in places]
        with np.errstate(invalid="ignore", over="ignore"):  # inf, of those that diverged
            values = np.asarray(reduce(self.values, axis=places))
        return Table(self.metric, kept, values)

    # -------------------------------------------------------------------------- its entries

    def rows(self) -> list[dict[str, Any]]:
        """A dict for each entry: its hyperparameters, and the number under the metric's name."""
        return [
            {**hyperparameters_at(self._axes, i), self.metric: float(self.values[i])}
            for i in np.ndindex(self.values.shape)
        ]

    def best(self, *, largest: bool = False) -> dict[str, Any]:
        """The row with the smallest number (or the largest); nan and inf are never best.

        Raises:
            ValueError: no number is finite.
        """
        arguments.flag("best", "largest", largest)
        place = best_of(self.values, largest)
        if place is None:
            raise ValueError(f"best: no entry of {self.metric} is finite.")
        i = np.unravel_index(place, self.values.shape)
        return {**hyperparameters_at(self._axes, i), self.metric: float(self.values[i])}

    def __repr__(self) -> str:
        return text.one_screen(str(self))

    def __str__(self) -> str:
        """The numbers as text: a grid where that fits, else the best rows."""
        heading = " × ".join(f"{axis.label} ({axis.size})" for axis in self._axes)
        title = f"{self.metric}: {heading}" if heading else self.metric
        if self.values.ndim == 0:
            return f"{title} {show(float(self.values))}"
        if self.values.ndim == 1 and self.values.size <= MOST_ROWS:
            return f"{title}\n{self._listed(range(self.values.size))}"
        rows, columns = self.values.shape if self.values.ndim == 2 else (math.inf, 0)
        if rows <= MOST_ROWS and columns <= MOST_COLUMNS:
            return f"{title}\n{self._grid()}"
        order = np.argsort(np.where(np.isfinite(self.values), self.values, np.inf), axis=None)
        some = f"the smallest {MOST_ROWS} of {self.values.size}"
        return f"{title}; {some}\n{self._listed(order[:MOST_ROWS])}"

    def _listed(self, places: Any) -> str:
        names = [name for axis in self._axes for name in axis.names]
        rows = []
        for place in places:
            i = np.unravel_index(int(place), self.values.shape)
            own = hyperparameters_at(self._axes, i)
            rows.append([*(show(own[n]) for n in names), show(float(self.values[i]))])
        return text.table([*names, self.metric], rows, right=range(len(names) + 1))

    def _grid(self) -> str:
        down, across = self._axes
        head = [f"{down.label} \\ {across.label}", *(_at(across, j) for j in range(across.size))]
        rows = [[_at(down, i), *(show(float(x)) for x in self.values[i])] for i in range(down.size)]
        return text.table(head, rows, right=range(1, across.size + 1))


def places_of(where: str, axes: Sequence[Axis], over: Any) -> tuple[int, ...]:
    """The places of the axes that some hyperparameters lie on.

    Raises:
        TypeError, ValueError: they aren't names, or there is no such axis.
    """
    names = (over,) if isinstance(over, str) else over
    if not isinstance(names, (tuple, list)) or not all(isinstance(n, str) for n in names):
        raise TypeError(
            f"{where}: over must be the name of an axis, or several, but got "
            f"{arguments.show(over)}."
        )
    places = []
    for name in names:
        place = next((i for i, a in enumerate(axes) if name in (*a.names, a.label)), None)
        if place is None:
            there = ", ".join(a.label for a in axes) or "none"
            raise ValueError(f"{where}: there is no axis {name!r} to go over; there are: {there}.")
        places.append(place)
    return tuple(sorted(set(places)))


def hyperparameters_at(axes: Sequence[Axis], place: Sequence[Any]) -> dict[str, Any]:
    """The hyperparameters at a place of the grid."""
    return {
        name: values[int(i)]
        for axis, i in zip(axes, place, strict=True)
        for name, values in zip(axis.names, axis.values, strict=True)
    }


def best_of(values: np.ndarray, largest: bool) -> int | None:
    """The place of the best finite number among all; None if there is none."""
    signed = -values if largest else values
    signed = np.where(np.isfinite(signed), signed, np.inf)
    place = int(np.argmin(signed))
    return place if np.isfinite(signed.flat[place]) else None


def _at(axis: Axis, i: int) -> str:
    return ", ".join(show(values[i]) for values in axis.values)
