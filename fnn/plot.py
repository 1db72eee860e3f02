"""Pictures of training: curves of a history, and weights as images.

Each function returns a matplotlib `Figure`: show it in a notebook, or `figure.savefig(path)`.
matplotlib is an extra, `pip install "matplotlib>=3.9"`, and imported when a picture is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fnn import arguments

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(history: Mapping[str, Sequence[float]], *, log: bool = True) -> Figure:
    """The history of `fnn.fit` as curves over the epochs.

    A panel for each quantity, with its validation values (`validation_loss` beside `loss`)
    in the same panel: the gap between the two is the overfitting that CS231n's notes (neural
    networks 3) tell to look at.

    Args:
        history: `result.history`, or any dict of sequences of numbers of one length.
        log: whether losses (all of them positive) get a logarithmic axis.

    Raises:
        ImportError: matplotlib isn't installed.
        TypeError: the history is no dict, or an entry isn't numbers.
        ValueError: the history is empty.
    """
    if not isinstance(history, Mapping):
        hint = " Of a FitResult that is its `.history`." if hasattr(history, "history") else ""
        raise TypeError(f"curves: history must be a dict, but got {_kind(history)}.{hint}")
    arguments.flag("curves", "log", log)
    for name, entries in history.items():
        _numbers("curves", f"history[{name!r}]", entries)
    scalars = {
        name: np.asarray(values, float)
        for name, values in history.items()
        if name != "seconds" and np.ndim(values) == 1 and len(values)
    }
    if not scalars:
        raise ValueError("the history holds no epochs to draw.")
    panels: dict[str, dict[str, np.ndarray]] = {}
    for name, values in scalars.items():
        base = name.removeprefix("validation_")
        label = "validation" if base != name else "training"
        panels.setdefault(base, {})[label] = values

    figure = _figure(width=4 * len(panels), height=3)
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


def templates(
    W: Any,
    image: tuple[int, ...] | None = None,
    *,
    columns: int | None = None,
    titles: Sequence[str] | None = None,
) -> Figure:
    """The rows of a first layer's weight as a grid of images, "templates" in CS231n's words.

    Row i of W is the image that output i scores highest. Grey-scale weights are drawn from
    blue (the largest negative) over white (0) to red, on one scale for all; colour weights
    are stretched, each template by itself, to the range of colours.

    Args:
        W: `(out, pixels)`; axes before the last two, as those of a Maxout, count as more rows.
        image: the shape of an image, `(height, width)` or `(height, width, 3)`; by default
            the square that fits.
        columns: how many images in a row of the grid; by default about a square grid.
        titles: a title for each image.

    Raises:
        ImportError: matplotlib isn't installed.
        ValueError: the pixels don't make such an image, or the titles aren't as many as images.
    """
    W = _numbers("templates", "W", W)
    if not np.isfinite(W).all():
        raise ValueError("templates: W holds inf or nan, which no colour stands for.")
    if columns is not None:
        columns = arguments.integer("templates", "columns", columns, least=1)
    if image is not None:
        wanted = "(height, width) or (height, width, 3)"
        if not isinstance(image, (tuple, list)):
            raise TypeError(f"templates: image must be {wanted}, but got {arguments.show(image)}.")
        image = tuple(arguments.integer("templates", "image", n, least=1) for n in image)
    if isinstance(titles, str):
        raise TypeError(f"templates: titles must be a list of strings, but got {titles!r}.")
    titles = None if titles is None else [str(title) for title in titles]
    if W.ndim < 2:
        raise ValueError(f"W must have shape (out, pixels), but has {W.shape}.")
    pixels = W.shape[-1]
    image = image if image is not None else _square(pixels)
    if math.prod(image) != pixels or len(image) not in (2, 3) or image[2:] not in ((), (3,)):
        raise ValueError(
            f"the rows of W have {pixels} pixels, which don't make images of shape {image}: pass "
            "image=(height, width) or (height, width, 3)."
        )
    pictures = W.reshape(-1, *image)
    count = len(pictures)
    if titles is not None and len(titles) != count:
        raise ValueError(f"W has {count} templates, but there are {len(titles)} titles.")
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    extreme = float(np.abs(pictures).max(initial=0.0)) or 1.0

    figure = _figure(width=columns, height=rows * (1.2 if titles is not None else 1))
    grid = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axes in grid:
        axes.set_axis_off()
    for i, picture in enumerate(pictures):
        if len(image) == 3:
            low, high = picture.min(), picture.max()
            grid[i].imshow((picture - low) / ((high - low) or 1.0))
        else:
            grid[i].imshow(picture, cmap="RdBu_r", vmin=-extreme, vmax=extreme)
        if titles is not None:
            grid[i].set_title(titles[i], fontsize="small")
    return figure


def _numbers(where: str, name: str, values: Any) -> np.ndarray:
    """As an array of floats."""
    try:
        return np.asarray(values).astype(float, casting="same_kind")
    except (TypeError, ValueError):
        raise TypeError(f"{where}: {name} must be real numbers, but got {_kind(values)}.") from None


def _kind(value: Any) -> str:
    return arguments.show(value) if isinstance(value, (str, int, float)) else type(value).__name__


def _square(pixels: int) -> tuple[int, ...]:
    side = math.isqrt(pixels)
    if side**2 == pixels:
        return (side, side)
    side = math.isqrt(pixels // 3)
    return (side, side, 3) if side**2 * 3 == pixels else (pixels,)


def _figure(*, width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise arguments.missing("fnn.plot", "matplotlib>=3.9") from error
    # Without pyplot: no global list of figures, no choice of a window system.
    return Figure(figsize=(width, height), layout="constrained")
