"""`curves`: a history as curves over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fnn import arguments
from fnn.plot.canvas import blank, kind, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(history: Mapping[str, Sequence[float]], *, log: bool = True) -> Figure:
    """The history of `fnn.fit` as curves over the epochs.

    A panel for each quantity, with its validation values (`validation_loss` beside `loss`)
    in the same panel: the gap between the two is the overfitting that CS231n's notes (neural
    networks 3) tell to look at.

    Args:
        history: `result.history`, or any dict of sequences of numbers, an entry an epoch. What
            isn't drawn: "seconds", and metrics that are arrays.
        log: whether losses (all of them positive) get a logarithmic axis.

    Raises:
        ImportError: matplotlib isn't installed.
        TypeError: the history is no dict, or an entry isn't numbers.
        ValueError: there is nothing in the history to draw.
    """
    if not isinstance(history, Mapping):
        hint = " Of a FitResult that is its `.history`." if hasattr(history, "history") else ""
        raise TypeError(f"curves: history must be a dict, but got {kind(history)}.{hint}")
    arguments.flag("curves", "log", log)
    arrays = {}
    for name, entries in history.items():
        if not isinstance(name, str):
            got = arguments.show(name)
            raise TypeError(f"curves: history's keys must be names, but one is {got}.")
        arrays[name] = numbers("curves", f"history[{name!r}]", entries)
    scalars = {
        name: values
        for name, values in arrays.items()
        if name != "seconds" and values.ndim == 1 and values.size
    }
    if not scalars:
        raise ValueError(
            "curves: history must hold a sequence of numbers for at least one epoch, but got "
            f"{arguments.shapes(dict(history))}."
        )
    panels: dict[str, dict[str, np.ndarray]] = {}
    for name, values in scalars.items():
        base = name.removeprefix("validation_")
        label = "validation" if base != name else "training"
        panels.setdefault(base, {})[label] = values

    figure = blank(width=4 * len(panels), height=3)
    for axes, (name, lines) in zip(
        np.ravel(figure.subplots(1, len(panels), squeeze=False)), panels.items(), strict=True
    ):
        for label, values in lines.items():
            marker = "o" if len(values) == 1 else None
            axes.plot(np.arange(1, len(values) + 1), values, label=label, marker=marker)
        if log and "loss" in name and all((v > 0).all() for v in lines.values()):
            axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.set_title(name.replace("_", " "))
        if len(lines) > 1:
            axes.legend()
    return figure
