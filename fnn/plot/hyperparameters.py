"""`against` and `bands`: what a sweep found, by hyperparameter and by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fnn import arguments
from fnn.plot.canvas import blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES, MOST_HUES = 8, 5


def against(
    found: Any,
    name: str,
    *,
    over: str | Sequence[str] = "seed",
    metric: str | None = None,
    log: bool | None = None,
) -> Figure:
    """A quantity against a hyperparameter: the loss against the learning rate, say.

    A line for each setting of the other hyperparameters, of medians over `over`, with a band from
    the lowest to the highest. A network that diverged counts as the highest of all, inf: where
    the median diverged there is no line, and where one did, the band is open to the top.

    Args:
        found: what `fnn.sweep` returned.
        name: the hyperparameter; a logarithmic axis if its values are at least three positive
            numbers, about evenly spaced in their logarithms, the largest more than 5 times the
            smallest; else their names side by side, in their order.
        over: the axis, or several, over which the band goes; left out where there is none.
        metric: the quantity; `found.metric` by default.
        log: whether the quantity gets a logarithmic axis; by default where its name ends in
            "loss" and all of it is positive.

    Raises:
        ImportError: matplotlib isn't installed.
        TypeError: `found` isn't what a sweep returned, or another argument isn't of its kind.
        ValueError: there is no such hyperparameter or quantity, or log with a number of it that
            isn't positive.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"against: name must be that of a hyperparameter, but got {arguments.show(name)}."
        )
    values, lines, metric = _by_setting("against", found, name, over, metric)
    figure = blank(width=7 if len(lines) > 3 else 5.5, height=3.6)
    axes = figure.subplots()
    x, is_log = _positions(values)
    if is_log:
        axes.set_xscale("log")
    above = _above(lines)
    for i, (label, entries) in enumerate(lines):
        entries = np.where(np.isfinite(entries), entries, np.inf)
        middle = _statistics(entries)[0]
        shown = np.isfinite(middle)
        colour = f"C{i % 10}"
        axes.plot(x[shown], middle[shown], "o-", ms=3.5, color=colour, label=label)
        _draw_band(axes, x, entries, above, colour)
    if not is_log:
        axes.set_xticks(x, [_word(value) for value in values])
    _finish("against", figure, axes, metric, lines, log)
    axes.set_xlabel(name.replace("_", " "))
    return figure


def bands(
    found: Any,
    *,
    over: str | Sequence[str] = "seed",
    metric: str | None = None,
    log: bool | None = None,
) -> Figure:
    """A quantity over the epochs: a line for each setting, the median over seeds, with a band.

    Args:
        found: what `fnn.sweep` returned.
        over: the axis, or several, over which the band goes, from the lowest to the highest;
            left out where there is none.
        metric: the quantity; `found.metric` by default.
        log: whether it gets a logarithmic axis; by default where its name ends in "loss" and all
            of it is positive.

    A network that diverged counts as the highest of all, inf: where the median diverged there is
    no line, and where one did, the band is open to the top. With `halving`, the median and the
    band are of those that are still trained. Of more than 8 settings those are drawn that were
    trained longest, and of these the ones with the lowest last values. More than 5 stand in the
    legend as their lines end, the highest on top.

    Raises:
        ImportError: matplotlib isn't installed.
        TypeError: `found` isn't what a sweep returned, or another argument isn't of its kind.
        ValueError: there is no such axis or quantity, or log with a number of it that isn't
            positive.
    """
    _, lines, metric = _by_setting("bands", found, None, over, metric)
    ranks = [_rank(entries) for _, entries in lines]
    chosen = sorted(sorted(range(len(lines)), key=ranks.__getitem__)[:MOST_LINES])
    if len(chosen) > MOST_HUES:
        chosen.sort(key=lambda i: -ranks[i][1])
    figure = blank(width=7 if len(chosen) > 3 else 5.5, height=3.6)
    axes = figure.subplots()
    from matplotlib.ticker import MaxNLocator

    palette, above = _palette(len(chosen)), _above([lines[i] for i in chosen])
    for colour, i in zip(palette, chosen, strict=True):
        label, entries = lines[i]
        middle = _statistics(entries)[0]
        epochs = np.arange(1, entries.shape[1] + 1)
        axes.plot(epochs, np.where(np.isfinite(middle), middle, np.nan), color=colour, label=label)
        _draw_band(axes, epochs, entries, above, colour)
    _finish("bands", figure, axes, metric, [lines[i] for i in chosen], log)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _by_setting(
    where: str, found: Any, along: str | None, over: Any, metric: str | None
) -> tuple[Sequence[Any], list[tuple[str, np.ndarray]], str]:
    """The values along an axis, and for each setting of the others its label and its numbers.

    The numbers have shape (those over which the band goes, values along the axis); without an
    axis (..., epochs). They are nan where a network wasn't trained, inf where it diverged.
    """
    if not all(hasattr(found, name) for name in ("axes", "history", "grid", "epochs", "metric")):
        raise TypeError(f"{where}: pass what fnn.sweep returned, but got {arguments.show(found)}.")
    metric = found.metric if metric is None else metric
    if not isinstance(metric, str):
        raise TypeError(
            f"{where}: metric must be a quantity's name, but got {arguments.show(metric)}."
        )
    wanted = (over,) if isinstance(over, str) else over
    if not isinstance(wanted, (tuple, list)) or not all(isinstance(n, str) for n in wanted):
        raise TypeError(
            f"{where}: over must be the name of an axis, or several, but got "
            f"{arguments.show(over)}."
        )
    names = [names for names, _ in found.grid]
    place = None
    if along is not None:
        place = _place(where, names, along)
    last = found[metric].values  # an error where there is none, or each value is an array
    table = found.history[metric] if along is None else None
    numbers = last if table is None else table
    trained = np.asarray(found.epochs)
    if table is not None:
        trained = trained[..., None] > np.arange(numbers.shape[-1])
    numbers = np.where(np.isfinite(numbers), numbers, np.where(trained > 0, np.inf, np.nan))
    given = [n for n in wanted if n != "seed" or any(n in own for own in names)]
    folded = sorted({_place(where, names, n) for n in given} - {place})
    rest = [i for i in range(len(names)) if i not in folded and i != place]
    end = [place] if place is not None else [numbers.ndim - 1]
    moved = np.transpose(numbers, [*rest, *folded, *end])
    shape = [found.grid[i][1] for i in rest]
    moved = moved.reshape(int(np.prod(shape)), -1, moved.shape[-1])
    lines = []
    for i, entries in enumerate(moved):
        at = np.unravel_index(i, shape) if shape else ()
        own = [
            f"{name.replace('_', ' ')} {_word(found.axes[name][int(j)])}"
            for k, j in zip(rest, at, strict=True)
            for name in names[k]
        ]
        lines.append((", ".join(own), entries))
    return (found.axes[along] if along is not None else ()), lines, metric


def _place(where: str, names: Sequence[tuple[str, ...]], wanted: str) -> int:
    place = next((i for i, own in enumerate(names) if wanted in own), None)
    if place is None:
        there = ", ".join(name for own in names for name in own)
        raise ValueError(f"{where}: there is no axis {wanted!r}; there are {there}.")
    return place


def _positions(values: Sequence[Any]) -> tuple[np.ndarray, bool]:
    """Where values lie, and whether on a logarithmic axis."""
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if not numeric or len(values) < 3:
        return np.arange(len(values)), False
    x = np.asarray(values, float)
    if (x <= 0).any() or not np.isfinite(x).all():
        return np.arange(len(values)), False
    steps = np.diff(np.log(x))
    if steps.std() < 0.3 * abs(steps.mean()) and x.max() > 5 * x.min():
        return x, True
    return np.arange(len(values)), False


def _statistics(entries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The median, the lowest and the highest of each column, of what isn't nan; else nan."""
    there = ~np.isnan(entries).all(axis=0)
    some = entries[:, there]
    found = np.full((3, entries.shape[1]), np.nan)
    numbers = np.nanmedian(some, axis=0), np.nanmin(some, axis=0), np.nanmax(some, axis=0)
    found[:, there] = numbers
    return found[0], found[1], found[2]


def _draw_band(axes: Any, x: Any, entries: np.ndarray, above: float, colour: Any) -> None:
    """From the lowest to the highest, where there are several; open to the top where one is inf."""
    if entries.shape[0] == 1:
        return
    _, low, high = _statistics(entries)
    low = np.where(np.isinf(low), np.nan, low)
    high = np.where(np.isinf(high), above, high)
    axes.fill_between(x, low, high, alpha=0.2, lw=0, color=colour)


def _rank(entries: np.ndarray) -> tuple[int, float]:
    """Less for a setting that is better over the epochs: trained for longer, then lower."""
    middle = _statistics(entries)[0]
    over = np.flatnonzero(~np.isnan(middle))
    return (-int(over[-1]), float(middle[over[-1]])) if over.size else (1, np.inf)


def _above(lines: Sequence[tuple[str, np.ndarray]]) -> float:
    """A number above the picture, whether its axis is logarithmic or not."""
    finite = np.concatenate([e[np.isfinite(e)] for _, e in lines])
    if not finite.size:
        return 1.0
    low, high = float(finite.min()), float(finite.max())
    found = (high + max(high - low, abs(high))) or 1.0
    if low > 0:
        found = max(found, high * (high / low))
    return min(found, float(np.finfo(float).max))


def _palette(count: int) -> list[Any]:
    """Colours that tell lines apart: a few by hue, many in their order."""
    if count <= MOST_HUES:
        return [f"C{i}" for i in range(count)]
    from matplotlib import colormaps

    return [colormaps["viridis"](0.95 * i / (count - 1)) for i in range(count)]


def _finish(
    where: str,
    figure: Figure,
    axes: Any,
    metric: str,
    lines: Sequence[tuple[str, np.ndarray]],
    log: Any,
) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    finite = np.concatenate([e[np.isfinite(e)] for _, e in lines])
    if log is None:
        log = metric.endswith("loss") and bool((finite > 0).all()) and finite.size > 0
    elif arguments.flag(where, "log", log) and (finite <= 0).any():
        raise ValueError(f"{where}: log=True wants positive numbers, but one is {finite.min():g}.")
    if log and finite.size:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if high > low and log:
        axes.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
    elif high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_ylabel(metric.replace("_", " "))
    if 1 < len(lines) <= 3:
        axes.legend(fontsize="small")
    elif len(lines) > 3:
        figure.legend(loc="outside right center", fontsize="small")


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    name = getattr(value, "name", None) or getattr(value, "__name__", None)
    return name if isinstance(name, str) else str(value)
