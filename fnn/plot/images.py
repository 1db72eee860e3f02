"""`templates`: weights as images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fnn import arguments
from fnn.plot.canvas import blank, finite, names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
        TypeError: W, image, columns or titles aren't of their kind.
        ValueError: W holds inf or nan, the pixels don't make such an image, or the titles aren't as
            many as images.
    """
    W = finite("templates", "W", W)
    if columns is not None:
        columns = arguments.integer("templates", "columns", columns, least=1)
    if titles is not None:
        titles = names("templates", "titles", titles, None, "templates")
    if W.ndim < 2 or not W.size:
        raise ValueError(f"templates: W must have shape (out, pixels), but has {W.shape}.")
    pixels = W.shape[-1]
    image = image_shape("templates", "image", image, pixels, "the rows of W")
    pictures = W.reshape(-1, *image)
    count = len(pictures)
    if titles is not None and len(titles) != count:
        raise ValueError(
            f"templates: titles must have a title for each of W's {count} templates, but has "
            f"{len(titles)}."
        )
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    extreme = float(np.abs(pictures).max(initial=0.0)) or 1.0

    figure = blank(width=columns, height=rows * (1.2 if titles is not None else 1))
    grid = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axes in grid:
        axes.set_axis_off()
    for i, picture in enumerate(pictures):
        draw_template(grid[i], picture, extreme)
        if titles is not None:
            grid[i].set_title(titles[i], fontsize="small")
    return figure


def draw_template(axes: Axes, picture: np.ndarray, extreme: float) -> None:
    """Weights as an image: grey-scale from blue over white (0) to red, colours stretched."""
    axes.set_axis_off()
    if picture.ndim == 3:
        low, high = picture.min(), picture.max()
        axes.imshow((picture - low) / ((high - low) or 1.0))
    else:
        axes.imshow(picture, cmap="RdBu_r", vmin=-extreme, vmax=extreme)


def image_shape(where: str, name: str, shape: Any, pixels: int, what: str) -> tuple[int, ...]:
    """The shape of images of so many pixels: the one given, checked, or the square that fits."""
    if shape is None:
        shape = _square(pixels)
    wanted = "(height, width) or (height, width, 3)"
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"{where}: {name} must be {wanted}, but got {arguments.show(shape)}.")
    shape = tuple(arguments.integer(where, f"{name}[{i}]", n, least=1) for i, n in enumerate(shape))
    if math.prod(shape) != pixels or len(shape) not in (2, 3) or shape[2:] not in ((), (3,)):
        raise ValueError(
            f"{where}: {what} have {pixels} pixels, which don't make images of shape {shape}: pass "
            f"{name}={wanted}."
        )
    return shape


def _square(pixels: int) -> tuple[int, ...]:
    side = math.isqrt(pixels)
    if side**2 == pixels:
        return (side, side)
    side = math.isqrt(pixels // 3)
    return (side, side, 3) if side**2 * 3 == pixels else (pixels,)
