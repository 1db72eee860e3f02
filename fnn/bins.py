"""The bins of a histogram, where rounding leaves no room for many, or the range overflows."""

from __future__ import annotations

import numpy as np

_LARGEST = np.finfo(float).max


def bins_of(values: np.ndarray, most: int) -> int | np.ndarray:
    """What to give `np.histogram` as `bins`: it raises where a bin would be no wider than rounding,
    or the range is above the largest float.

    Args:
        values: finite float64 numbers, at least one.
        most: how many bins, equally wide.

    Returns:
        `most`, or the two edges of a single bin.
    """
    low, high = float(values.min()), float(values.max())
    rounding = float(np.spacing(max(abs(low), abs(high))))
    room = high - low or 1.0  # around equal numbers, as numpy has it
    if 2 * most * rounding < room < np.inf:
        return most
    margin = max(0.5, rounding)
    return np.clip([low - margin, high + margin], -_LARGEST, _LARGEST)
