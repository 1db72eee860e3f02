"""`activations`: activations and their gradients, part by part, through training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fnn import arguments
from fnn.plot.canvas import blank, names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def activations(statistics: Any, *, parts: Sequence[str] | None = None, most: int = 8) -> Figure:
    """Histograms of activations and gradients: a column for each part, training from left to right.

    Above are the activations, below log₁₀|g| of the gradients with respect to them, for each look
    a strip of colour, darker where more of the values are. One look alone is drawn as steps. Dead
    relus and saturated sigmoids and tanhs of the last look are named in red.

    Args:
        statistics: what `fnn.activation_statistics(loss)(params, batch)` returned, or a list of
            such from one training, in order.
        parts: the names of those to draw; by default the first `most`.
        most: how many to draw.

    Raises:
        ImportError: matplotlib isn't installed.
        TypeError: it isn't such a list.
        ValueError: the list is empty, its entries are of different networks, or a part isn't there.
    """
    where = "activations"
    most = arguments.integer(where, "most", most, least=1)
    looks = [statistics] if hasattr(statistics, "parts") else statistics
    if not isinstance(looks, (list, tuple)) or not all(hasattr(s, "parts") for s in looks):
        raise TypeError(
            f"{where}: pass what fnn.activation_statistics(loss)(params, batch) returned, or a "
            f"list of such, but got {arguments.show(statistics)}."
        )
    if not looks:
        raise ValueError(f"{where}: the list is empty.")
    there = [part.name for part in looks[0].parts]
    if any([part.name for part in s.parts] != there for s in looks):
        raise ValueError(f"{where}: the entries of the list are of networks with other parts.")
    chosen = there[:most] if parts is None else names(where, "parts", parts, None, "parts")
    if not chosen:
        raise ValueError(f"{where}: parts is empty; there are {', '.join(there)}.")
    for name in chosen:
        if name not in there:
            raise ValueError(f"{where}: there is no part {name!r}; there are {', '.join(there)}.")

    figure = blank(width=max(3.0, 2.1 * len(chosen)), height=4.4)
    above, below = figure.subplots(2, len(chosen), squeeze=False)
    for column, name in enumerate(chosen):
        of_part = [s.parts[there.index(name)] for s in looks]
        last = of_part[-1]
        _draw(above[column], [p.values for p in of_part], "C0", "Blues")
        _draw(below[column], [p.gradients for p in of_part], "C1", "Oranges")
        title = f"{name}\n{last.operation}" if last.operation != name else name
        above[column].set_title(title, fontsize="small")
        if last.trouble:
            above[column].set_xlabel(last.trouble, fontsize="small", color="C3")
        below[column].set_xlabel("look" if len(looks) > 1 else "log₁₀ |gradient|", fontsize="small")
    one = len(looks) == 1
    above[0].set_ylabel("how many" if one else "activation", fontsize="small")
    below[0].set_ylabel("how many" if one else "log₁₀ |gradient|", fontsize="small")
    for axes in (*above, *below):
        axes.tick_params(labelsize="x-small")
    return figure


def _draw(axes: Axes, histograms: Sequence[Any], color: str, colours: str) -> None:
    if len(histograms) == 1:
        counts, edges = histograms[0]
        axes.stairs(counts, edges, fill=True, color=color)
        return
    low = min(edges[0] for _, edges in histograms)
    high = max(edges[-1] for _, edges in histograms)
    for number, (counts, edges) in enumerate(histograms, 1):
        # The root: a relu's zeros would leave all else white.
        shares = np.sqrt(counts / max(counts.sum(), 1))
        axes.pcolormesh(
            [number - 0.5, number + 0.5], edges, shares[:, None], cmap=colours, vmin=0, vmax=0.5
        )
    axes.set(xlim=(0.5, len(histograms) + 0.5), ylim=(low, high))
    axes.locator_params(axis="x", integer=True, nbins=5)
