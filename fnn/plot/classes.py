"""`confusion`, `decision_boundary`: what a classifier gets right, and where it changes its mind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments
from fnn.plot.canvas import blank, finite, names, numbers, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# ------------------------------------------------------------------------------- confusion matrix


def confusion(
    labels: Any,
    predictions: Any,
    *,
    classes: Sequence[str] | None = None,
    normalize: bool = False,
) -> Figure:
    """The confusion matrix: entry (i, j) counts the examples of class i that are taken for class j.

    Args:
        labels: the true classes, integers from 0, `(examples,)`.
        predictions: the predicted classes, `(examples,)`; or scores `(examples, classes)`, of which
            the largest is the prediction (the first of several).
        classes: a name for each class; by default its number.
        normalize: draw the fractions of each row, of the examples of a class, and not counts. (A
            class without examples has zeros.)

    Raises:
        ImportError: matplotlib isn't installed.
        TypeError: labels or predictions aren't such numbers.
        ValueError: they differ in number, there are none, or a class is outside of `classes`.
    """
    arguments.flag("confusion", "normalize", normalize)
    labels = whole_numbers("confusion", "labels", labels)
    predictions = numbers("confusion", "predictions", predictions)
    if predictions.ndim == 2:
        if not predictions.shape[1]:
            raise ValueError(
                "confusion: predictions must be scores (examples, classes) of at least one class, "
                f"but have the shape {predictions.shape}."
            )
        if np.isnan(predictions).any():
            raise ValueError("confusion: predictions holds nan, and no score can be the largest.")
        count = predictions.shape[1]
        predictions = predictions.argmax(axis=1)
    else:
        predictions = whole_numbers("confusion", "predictions", predictions)
        count = 0
    if labels.ndim != 1 or predictions.shape != labels.shape or not labels.size:
        raise ValueError(
            "confusion: labels must have shape (examples,) and predictions as many classes, or "
            f"scores (examples, classes), but they have the shapes {labels.shape} and "
            f"{predictions.shape}."
        )
    largest = int(max(labels.max(), predictions.max()))
    count = max(count, largest + 1) if classes is None else None
    titles = names("confusion", "classes", classes, count, "classes")
    count = len(titles)
    if largest >= count:
        raise ValueError(f"confusion: class {largest} has no name: there are {count} classes.")
    matrix = np.zeros((count, count))
    np.add.at(matrix, (labels, predictions), 1)
    if normalize:
        matrix /= np.maximum(matrix.sum(axis=1, keepdims=True), 1)

    side = max(3.0, 0.45 * count + 1.5)
    figure = blank(width=side + 0.4, height=side)
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=matrix.max() or 1)
    axes.set_xticks(range(count), titles, rotation=0 if max(map(len, titles)) < 4 else 90)
    axes.set_yticks(range(count), titles)
    axes.set(xlabel="prediction", ylabel="label")
    if count <= 30:
        for (i, j), entry in np.ndenumerate(matrix):
            if entry:
                text = f"{entry:.2f}".lstrip("0") if normalize else f"{entry:.0f}"
                dark = entry > 0.6 * matrix.max()
                color = "white" if dark else "black"
                axes.text(j, i, text, ha="center", va="center", color=color, fontsize="small")
    else:
        figure.colorbar(image)
    accuracy = np.mean(labels == predictions)
    axes.set_title(f"{accuracy:.1%} of {len(labels)} right", fontsize="medium")
    return figure


# ------------------------------------------------------------------------------ decision boundary


def decision_boundary(
    f: Callable[[Any], Any],
    points: Any = None,
    labels: Any = None,
    *,
    region: tuple[tuple[float, float], tuple[float, float]] | None = None,
    resolution: int = 200,
    classes: Sequence[str] | None = None,
    axes: Axes | None = None,
) -> Figure:
    """The plane as a classifier divides it, with its probabilities and the points.

        fnn.plot.decision_boundary(functools.partial(net, params), X, y)

    The colour of a place mixes those of the classes, by their probabilities softmax(f(x)); the
    boundary is the line on which the two largest scores are equal.

    Args:
        f: a function of ONE point `(2,)` that JAX can map: the scores of the classes
            `(classes,)`; or one number, the logit of class 1 against class 0.
        points: `(examples, 2)`, to be drawn too.
        labels: their classes, integers from 0.
        region: what to draw, `((left, right), (low, high))`; by default the points' range and a
            tenth around it.
        resolution: at how many places along each axis f is computed.
        classes: a name for each class; by default its number.
        axes: matplotlib's Axes to draw into (they are cleared), for an animation or a part of a
            larger figure; by default those of a new figure.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib isn't installed.
        TypeError, ValueError: an argument isn't as above; f doesn't return scores, or inf or nan.
    """
    where = "decision_boundary"
    arguments.function(where, "f", f, "a function of one point (2,)")
    if axes is not None and not hasattr(axes, "imshow"):
        raise TypeError(f"{where}: axes must be matplotlib's Axes, but got {arguments.show(axes)}.")
    resolution = arguments.integer(where, "resolution", resolution, least=2)
    points, labels = _points(where, points, labels)
    (left, right), (low, high) = _region(where, region, points)
    xs, ys = np.linspace(left, right, resolution), np.linspace(low, high, resolution)
    grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    # Not jitted: the operations of another f of the same shapes are compiled already.
    scores = numbers(where, "f's result", jax.vmap(f)(jnp.asarray(grid, jnp.result_type(float))))
    if scores.ndim == 1 or scores.shape[1:] == (1,):
        logit = scores.reshape(-1)
        scores = np.stack([np.zeros_like(logit), logit], axis=1)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(
            f"{where}: f must return scores (classes,) or one number for a point, but returned "
            f"shape {scores.shape[1:]}."
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"{where}: f returned inf or nan for points of the region.")
    count = max(scores.shape[1], 0 if labels is None else int(labels.max(initial=0)) + 1)
    titles = names(where, "classes", classes, count, "classes")
    if axes is None:
        axes = blank(width=5, height=4.5).subplots()
    axes.clear()
    colours = _colours(count)
    probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    mixed = probabilities @ colours[: scores.shape[1]]
    paler = (0.45 + 0.55 * mixed).reshape(resolution, resolution, 3)

    axes.imshow(
        np.clip(paler, 0, 1),
        extent=(left, right, low, high),
        origin="lower",
        aspect="auto",
        interpolation="bilinear",
    )
    for c in range(scores.shape[1] if scores.shape[1] > 2 else 1):
        lead = scores[:, c] - np.delete(scores, c, axis=1).max(axis=1)
        if lead.min() < 0 < lead.max():  # else there is no such line in the region
            lead = lead.reshape(resolution, resolution)
            axes.contour(xs, ys, lead, levels=[0.0], colors="black", linewidths=1)
    if points is not None:
        look: dict[str, Any] = {"s": 14, "edgecolors": "white", "linewidths": 0.4}
        if labels is None:
            axes.scatter(points[:, 0], points[:, 1], color="black", **look)
        else:
            for c, title in enumerate(titles):
                x, y = points[labels == c].T
                axes.scatter(x, y, color=colours[c], label=title, **look)
            axes.legend(loc="upper right", fontsize="small")
    axes.set(xlim=(left, right), ylim=(low, high))
    figure: Any = axes.figure
    return figure


def _points(where: str, points: Any, labels: Any) -> tuple[Any, Any]:
    if points is None:
        if labels is not None:
            raise ValueError(f"{where}: labels are given, but no points.")
        return None, None
    points = finite(where, "points", points)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"{where}: points must have shape (examples, 2), but has {points.shape}.")
    if labels is not None:
        labels = whole_numbers(where, "labels", labels)
        if labels.shape != points.shape[:1]:
            raise ValueError(
                f"{where}: labels must have shape {points.shape[:1]}, one for each point, but has "
                f"{labels.shape}."
            )
    return points, labels


def _region(where: str, region: Any, points: Any) -> np.ndarray:
    if region is None:
        if points is None:
            raise ValueError(f"{where}: pass points, or region=((left, right), (low, high)).")
        low, high = points.min(axis=0), points.max(axis=0)
        margin = np.where(high > low, 0.1 * (high - low), 0.5)
        return np.stack([low - margin, high + margin], axis=1)
    found = finite(where, "region", region)
    if found.shape != (2, 2) or not (found[:, 0] < found[:, 1]).all():
        raise ValueError(
            f"{where}: region must be ((left, right), (low, high)) with left < right and low < "
            f"high, but got {arguments.show(region)}."
        )
    return found


def _colours(count: int) -> np.ndarray:
    """A colour for each class, as rows of red, green and blue."""
    from matplotlib import colormaps

    colours = np.asarray(colormaps["tab10"].colors)  # type: ignore[attr-defined]
    return colours[np.arange(count) % len(colours)]
