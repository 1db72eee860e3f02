"""`learning_rates`: the loss against a learning rate that grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fnn import arguments
from fnn.plot.canvas import blank, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def learning_rates(found: Any) -> Figure:
    """The loss against the learning rate, with its smoothed line and the rate to begin with.

    Args:
        found: what `fnn.find_learning_rate` returned; or anything with its fields `rates`,
            `losses`, `smoothed`, `suggestion` and `diverged`.

    Raises:
        ImportError: matplotlib isn't installed.
        TypeError: it isn't such a result.
        ValueError: the losses aren't as many as the rates.
    """
    fields = ("rates", "losses", "smoothed", "suggestion", "diverged")
    if not all(hasattr(found, name) for name in fields):
        raise TypeError(
            "learning_rates: pass what fnn.find_learning_rate returned, but got "
            f"{arguments.show(found)}."
        )
    rates = numbers("learning_rates", "rates", found.rates)
    losses = numbers("learning_rates", "losses", found.losses)
    smoothed = numbers("learning_rates", "smoothed", found.smoothed)
    if rates.ndim != 1 or losses.shape != rates.shape or len(smoothed) > len(rates):
        raise ValueError(
            "learning_rates: rates, losses and smoothed must have shape (steps,), the last at most "
            f"that long, but have {rates.shape}, {losses.shape} and {smoothed.shape}."
        )
    figure = blank(width=5.5, height=3.6)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.plot(rates, np.where(np.isfinite(losses), losses, np.nan), ".", ms=3, color="0.6")
    axes.plot(rates[: len(smoothed)], smoothed, color="C0", label="smoothed")
    if found.suggestion is not None:
        label = f"falls fastest: {found.suggestion:.2g}"
        axes.axvline(found.suggestion, color="C2", ls="--", label=label)
    if found.diverged is not None:
        label = f"diverges: {found.diverged:.2g}"
        axes.axvline(found.diverged, color="C3", ls=":", label=label)
    shown = losses[: len(smoothed)]
    shown = shown[np.isfinite(shown)]
    if shown.size:  # what diverges is beyond the picture
        low, high = shown.min(), shown.max()
        margin = 0.08 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
    axes.set(xlabel="learning rate", ylabel="loss of the next batch", xlim=(rates[0], rates[-1]))
    axes.legend(fontsize="small")
    return figure
