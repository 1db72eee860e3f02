"""Derivatives by finite differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Precision:
    """What to ask of a function that computes in float64, or in less.

    exact, numerical: the tolerance against autodiff, and against differences (on top of their
        own estimated error).
    steps: of the differences, tried in this order until the function is smooth within one.
    kink, error: how far differences may disagree, next to the slope, where a function is smooth.
    """

    exact: float
    numerical: float
    steps: tuple[float, ...]
    kink: float
    error: float


STEPS = (1e-4, 1e-6, 1e-8)
FINE = Precision(1e-7, 1e-5, STEPS, 1e-5, 1e-4)
COARSE = Precision(1e-3, 2e-3, (1e-1, 2e-2), 1e-1, 3e-2)


def unit(x):
    """The unit of the steps: 1, but more where x is so large that 1e-4 would drown in it."""
    return 1.0 + 1e-4 * abs(x)


# The points of the differences, in steps; STEPS[0] itself is added to these.
POINTS = np.array([1, -1, 1 / 2, -1 / 2, 1 / 4, -1 / 4])


def changes_around(f, step, w=None):
    """f(t) − f(0) at the points t, or wᵀ of it; and the size of the numbers it is a difference of.

    Entries that aren't finite at 0 are left out, and so are those that never change.
    """
    middle = f(0.0)
    around = lax.map(f, jnp.concatenate([step * POINTS, jnp.array([STEPS[0]])]))
    usable = jnp.isfinite(middle)
    changes = jnp.where(usable, around - middle, 0.0)
    size = jnp.where(usable & jnp.any(changes != 0, axis=0), jnp.abs(middle), 0.0)
    if w is None:
        return changes, size
    return changes @ w, size @ jnp.abs(w)


def slopes(changes, size, step, eps):
    """The slopes at 0, and what tells how far to trust them.

    Central differences at h, h/2 and h/4. Their extrapolation is the slope, their disagreement
    its error. Where f is smooth, the slope on the right less that on the left shrinks in
    proportion to h; at a kink it doesn't.

    Returns slope, error, error by rounding, kink (by how much it doesn't shrink), left slope,
    right slope.
    """
    slopes = changes[:6] / (step * POINTS.reshape(6, *[1] * (changes.ndim - 1)))
    right, left = slopes[0::2], slopes[1::2]
    central, bend = (right + left) / 2, right - left
    error = abs(central[1] - central[0]) + abs(central[2] - central[1])
    kink = np.maximum(abs(bend[0] - 2 * bend[1]), abs(bend[1] - 2 * bend[2]))
    rounding = 16 * eps * size / step
    return (4 * central[2] - central[1]) / 3, error, rounding, kink, left[2], right[2]


@dataclasses.dataclass
class Differences:
    """Numerical slopes at some entries; `smooth` says where there is one."""

    entries: np.ndarray
    slope: np.ndarray
    error: np.ndarray
    left: np.ndarray
    right: np.ndarray
    smooth: np.ndarray


def differences(
    at_step: Callable, entries, precision: Precision, eps: float, inside: float, unit: Any = 1.0
) -> Differences:
    """With smaller and smaller steps, until the function is smooth within one.

    at_step: gives the changes and their size at a step.
    inside: the size of the numbers that the function computes with, whatever its result's is.
    unit: what the steps are multiplied with.
    """
    if not entries.size:
        nothing = np.zeros(0)
        return Differences(entries, nothing, nothing, nothing, nothing, nothing.astype(bool))
    best: list[np.ndarray] = []
    for step in precision.steps:
        changes, size = (np.asarray(n, "float64") for n in at_step(step))
        with np.errstate(invalid="ignore", over="ignore"):
            numbers = [n / unit for n in slopes(changes, size + inside, step, eps)]
        slope, error, rounding, kink, left, right = numbers
        known = np.abs(slope[np.isfinite(slope)])
        size = np.maximum(np.abs(slope), 1e-3 * known.max(initial=0.0) + 1e-6)
        with np.errstate(invalid="ignore"):
            smooth = np.isfinite(slope) & (kink <= precision.kink * size + 4 * rounding)
            smooth &= error <= precision.error * size + 4 * rounding
            # A smaller step helps only where it isn't lost in rounding.
            smooth &= (step == precision.steps[0]) | (rounding <= 1e-2 * size)
        found = [slope, error + rounding, left, right, smooth]
        done = best[-1] if best else np.zeros_like(smooth)
        best = [np.where(done, old, new) for old, new in zip(best or found, found, strict=True)]
        if best[-1].all():
            break
    return Differences(entries, *best)
