"""What all pictures are made with: an empty figure, and the numbers to be drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from fnn import arguments

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def blank(*, width: float, height: float) -> Figure:
    """An empty figure, sizes in inches.

    Raises:
        ImportError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise arguments.missing("fnn.plot", "matplotlib>=3.9") from error
    # Without pyplot: no global list of figures, no choice of a window system.
    return Figure(figsize=(width, height), layout="constrained")


def numbers(where: str, name: str, values: Any) -> np.ndarray:
    """As an array of floats."""
    try:
        if isinstance(values, (list, tuple)):  # numpy takes no list of JAX's 16-bit numbers
            values = jax.tree.map(np.asarray, values)
        return np.asarray(values).astype(float, casting="same_kind")
    except (TypeError, ValueError):
        raise TypeError(f"{where}: {name} must be real numbers, but got {kind(values)}.") from None


def finite(where: str, name: str, values: Any) -> np.ndarray:
    """As an array of floats, none of them inf or nan."""
    found = numbers(where, name, values)
    if not np.isfinite(found).all():
        raise ValueError(f"{where}: {name} holds inf or nan, and must be finite.")
    return found


def whole_numbers(where: str, name: str, values: Any) -> np.ndarray:
    """As an array of integers of at least 0: labels."""
    found = numbers(where, name, values)
    if found.size and not (np.isfinite(found).all() and (found == np.floor(found)).all()):
        wrong = found[~(np.isfinite(found) & (found == np.floor(found)))][0]
        raise TypeError(
            f"{where}: {name} must be whole numbers, the classes from 0, but holds {wrong:g}."
        )
    if found.size and found.min() < 0:
        raise ValueError(
            f"{where}: {name} must be classes, counted from 0, but holds {found.min():g}."
        )
    return found.astype(int)


def names(where: str, name: str, values: Any, count: int | None, what: str) -> list[str]:
    """A name for each of `count` things; their numbers if none are given."""
    if values is None:
        return [str(i) for i in range(count or 0)]
    if isinstance(values, str) or not isinstance(values, Iterable):
        got = arguments.show(values)
        raise TypeError(f"{where}: {name} must be a list of strings, but got {got}.")
    found = [str(value) for value in values]
    if count is not None and len(found) != count:
        raise ValueError(
            f"{where}: {name} must have a name for each of the {count} {what}, but has "
            f"{len(found)}."
        )
    return found


def kind(value: Any) -> str:
    """What was given in the place of numbers, in a few words."""
    is_short = value is None or isinstance(value, (str, int, float)) or hasattr(value, "shape")
    return arguments.show(value) if is_short else f"a {type(value).__name__}"
