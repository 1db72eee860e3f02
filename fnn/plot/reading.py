"""`two_layers`: how a two-layer network reads an image, after CS231n's lecture 4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fnn import arguments
from fnn.plot.canvas import blank, finite, names
from fnn.plot.images import draw_template, image_shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def two_layers(
    params: Any,
    image: Any,
    *,
    f: Callable[[Any], Any] = lambda x: np.maximum(x, 0),
    shape: tuple[int, ...] | None = None,
    most: int = 10,
    classes: Sequence[str] | None = None,
) -> Figure:
    """How W2 f(W1 x + b1) + b2 reads an image x: its hidden templates, and what each adds.

    The lecture's picture (CS231n, lecture 4): each row of W1 is a template, and h = f(W1 x + b1)
    says how well the image fits each. W2 weighs these for every class: template i adds
    W2[c, i] h[i] to the score of class c. From left to right: the image and the scores of all
    classes; then, a row each, the templates that add the most, with h[i], and what they add to
    each class; below them the sum of all other templates, the bias b2, and the total, the scores.

    Args:
        params: of a network `chain(hidden=Linear(n), f=..., output=Linear(classes))`: a dict of two
            dicts, each with `W` and perhaps `b` (in either order: JAX sorts the keys of dicts); or
            the arrays `(W1, b1, W2, b2)`, `W1 (hidden, pixels)`, `b1 (hidden,)`,
            `W2 (classes, hidden)`, `b2 (classes,)`.
        image: x, with as many pixels as W1 has columns, in any shape; as the network is given it.
        f: the function between the two layers, of an array `(hidden,)`; by default relu.
        shape: the shape to draw image and templates in, `(height, width)` or `(height, width, 3)`;
            by default the image's, or the square that fits.
        most: how many templates to show: those of the largest max_c |W2[c, i] h[i]|.
        classes: a name for each class; by default its number.

    Raises:
        ImportError: matplotlib isn't installed.
        TypeError, ValueError: these aren't such parameters, or the shapes don't fit.
    """
    where = "two_layers"
    arguments.function(where, "f", f, "a function of an array (hidden,)")
    most = arguments.integer(where, "most", most, least=1)
    x = finite(where, "image", image)
    W1, b1, W2, b2 = _weights(where, params, x.size)
    if x.size != W1.shape[1]:
        raise ValueError(
            f"{where}: image has {x.size} pixels, but W1, of shape {W1.shape}, is for "
            f"{W1.shape[1]}."
        )
    if shape is None and x.ndim in (2, 3):
        shape = x.shape[:2] if x.shape[2:] == (1,) else x.shape
    shape = image_shape(where, "shape", shape, x.size, "the image and the rows of W1")
    titles = names(where, "classes", classes, len(W2), "classes")
    h = finite(where, "f's result", f(W1 @ x.ravel() + b1))
    if h.shape != b1.shape:
        raise ValueError(f"{where}: f must return shape {b1.shape}, but returned {h.shape}.")
    added = (W2 * h).T  # (hidden, classes)
    order = np.argsort(-np.abs(added).max(axis=1), kind="stable")
    shown, rest = order[:most], order[most:]
    rows = [added[i] for i in shown]
    marks = [f"template {i}, h = {h[i]:.2f}" for i in shown]
    if len(rest):
        rows.append(added[rest].sum(axis=0))
        marks.append(f"{len(rest)} others")
    scores = added.sum(axis=0) + b2
    rows, marks = [*rows, b2, scores], [*marks, "bias b2", "score"]

    figure = blank(width=4.2 + 0.45 * len(W2), height=0.55 * len(rows) + 0.7)
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.9, 2.3 + 0.45 * len(W2)))
    left, right = halves
    picture, bars = left.subplots(2, 1)
    picture.set_axis_off()
    picture.set_title("the image x", fontsize="small")
    shown_image = x.reshape(shape)
    if shown_image.ndim == 3:  # stretched to the range of colours
        shown_image = (shown_image - x.min()) / ((x.max() - x.min()) or 1.0)
    picture.imshow(shown_image, cmap="gray")
    colours = ["C3" if c == scores.argmax() else "C0" for c in range(len(scores))]
    bars.barh(range(len(scores)), scores, color=colours)
    bars.set_yticks(range(len(scores)), titles)
    bars.invert_yaxis()
    bars.set_title("scores", fontsize="small")
    bars.tick_params(labelsize="small")

    table = right.subplots()
    matrix = np.stack(rows)
    largest = float(np.abs(matrix).max(initial=0.0)) or 1.0
    table.imshow(matrix, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    for (i, c), entry in np.ndenumerate(matrix):
        color = "white" if abs(entry) > 0.6 * largest else "black"
        text = f"{round(float(entry), 1) + 0.0:.1f}"  # + 0.0 makes -0.0 a 0.0
        table.text(c, i, text, ha="center", va="center", fontsize="small", color=color)
    table.plot([-0.5, len(W2) - 0.5], [len(rows) - 1.5] * 2, color="black")
    extreme = float(np.abs(W1[shown]).max(initial=0.0)) or 1.0
    for row, i in enumerate(shown):  # each at the left of its row
        cell = table.inset_axes((-2.0, row - 0.46, 1.3, 0.92), transform=table.transData)
        draw_template(cell, W1[i].reshape(shape), extreme)
    table.set_xlim(-2.1, len(W2) - 0.5)
    table.set_xticks(range(len(W2)), titles)
    table.set_yticks(range(len(rows)), marks)
    table.xaxis.tick_top()
    table.set_title("adds to the score of class", fontsize="small")
    table.tick_params(labelsize="small", length=0)
    table.spines[:].set_visible(False)
    return figure


def _weights(where: str, params: Any, pixels: int) -> tuple[np.ndarray, ...]:
    """W1, b1, W2, b2, checked; a bias that isn't there is 0."""
    arguments.no_result(where, "params", params)
    found: list[Any]
    if isinstance(params, Mapping):
        layers = list(params.values())
        good = len(layers) == 2 and all(
            isinstance(p, Mapping) and "W" in p and set(p) <= {"W", "b"} for p in layers
        )
        if not good:
            raise ValueError(
                f"{where}: params must be those of two Linear layers, a dict of two dicts with W "
                f"and b, but got {arguments.shapes(params)}."
            )
        first, second = (np.shape(p["W"]) for p in layers)
        if second[1:] == (pixels,) and first[1:] == second[:1]:
            # The other way round. (Where both ways fit, the order of the dict holds.)
            layers = layers if first[1:] == (pixels,) and second[1:] == first[:1] else layers[::-1]
        found = [part for p in layers for part in (p["W"], p.get("b"))]
    elif isinstance(params, (tuple, list)) and len(params) == 4:
        found = list(params)
    else:
        raise TypeError(
            f"{where}: params must be a dict of two dicts with W and b, or (W1, b1, W2, b2), but "
            f"got {arguments.show(params)}."
        )
    for i, name in enumerate(("W1", "b1", "W2", "b2")):
        if found[i] is None:
            found[i] = np.zeros(np.shape(found[i - 1])[:1])
        found[i] = finite(where, name, found[i])
    W1, b1, W2, b2 = found
    fits = W1.ndim == W2.ndim == 2 and W2.shape[1:] == b1.shape == W1.shape[:1]
    if not fits or b2.shape != W2.shape[:1]:
        raise ValueError(
            f"{where}: the weights must have the shapes W1 (hidden, pixels), b1 (hidden,), "
            "W2 (classes, hidden), b2 (classes,), but have "
            + ", ".join(str(a.shape) for a in found)
            + "."
        )
    return W1, b1, W2, b2
