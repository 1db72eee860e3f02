"""`loss_surface`: the loss along two directions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fnn import arguments
from fnn.plot.canvas import blank, finite, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_surface(surface: Any, *, log: bool | None = None) -> Figure:
    """The loss on a plane through the parameters, as a map with lines of equal loss.

    Losses that are inf or nan are left white.

    Args:
        surface: what `fnn.loss_surface` returned; or anything with its fields `a`, `b` and
            `losses`, where `losses[j, i]` is that at (a[i], b[j]).
        log: whether to draw log₁₀ of the loss; by default where all losses are positive and the
            largest is more than ten times the smallest.

    Raises:
        ImportError: matplotlib isn't installed.
        TypeError: it isn't such a result.
        ValueError: shapes don't fit, no loss is finite, or log with a loss that isn't positive.
    """
    where = "loss_surface"
    if not all(hasattr(surface, name) for name in ("a", "b", "losses")):
        raise TypeError(
            f"{where}: pass what fnn.loss_surface returned, but got {arguments.show(surface)}."
        )
    a, b = finite(where, "a", surface.a), finite(where, "b", surface.b)
    losses = numbers(where, "losses", surface.losses)
    if a.ndim != 1 or b.ndim != 1 or losses.shape != (len(b), len(a)):
        raise ValueError(
            f"{where}: losses must have shape (len(b), len(a)) = ({b.size}, {a.size}), but has "
            f"{losses.shape}."
        )
    good = losses[np.isfinite(losses)]
    if not good.size:
        raise ValueError(f"{where}: no loss is finite.")
    if log is None:
        log = bool(good.min() > 0 and good.max() > 10 * good.min())
    elif arguments.flag(where, "log", log) and good.min() <= 0:
        raise ValueError(f"{where}: log=True wants positive losses, but one is {good.min():g}.")
    shown = np.where(np.isfinite(losses), losses, np.nan)
    shown = np.ma.masked_invalid(np.log10(shown) if log else shown)

    figure = blank(width=5.2, height=4.2)
    axes = figure.subplots()
    mesh = axes.pcolormesh(a, b, shown, shading="nearest", cmap="viridis", rasterized=True)
    if shown.min() < shown.max() and min(shown.shape) > 1:
        axes.contour(a, b, shown, levels=12, colors="white", linewidths=0.6, linestyles="solid")
    axes.plot(0, 0, "x", color="C3", ms=7, mew=2)
    figure.colorbar(mesh, label="log₁₀ loss" if log else "loss")
    axes.set(xlabel="along direction 1", ylabel="along direction 2")
    return figure
