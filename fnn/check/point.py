"""The point at which a function is checked: its sizes, the directions it is moved in, its noise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.check.derivatives import BY_RESULT, MODES, SECOND, Programs
from fnn.check.differences import SHRINK, Precision
from fnn.check.directions import (
    Leaf,
    as_vector,
    entry_names,
    leaf_slices,
    power_of_two,
    random_moves,
    scales,
)
from fnn.check.report import short

DTYPES = ("float16", "bfloat16", "float32", "float64")


class NothingToCheck(Exception):
    """There is no derivative to check, for the reason given."""


class Point:
    """A point x at which a function f is checked, and what is known of the numbers there.

    Nothing is absolute: what two numbers may differ by is relative to them, or to what rounding
    does to them, which is found by looking.

    w, v, u: the upstream gradient, in which all results count; the direction in which all
        arguments move by their own size; and one more upstream gradient.
    own, arrays: for each entry of x, its size, and that of the largest of its array.
    usable, moves: which results are finite, and which entries of x.
    found, by_autodiff: the derivatives by mode, by the rule and by JAX from the definition.
    rounding: by mode, the part of the differences' error that is due to rounding, at the best
        step. A derivative can't be known better from f's values, and a rule may lose as much.
    noise: how much a derivative varies when its arguments do by a few units in the last place; and
        if it was looked for, how rough it is otherwise.
    rough: the latter, by mode; empty unless it was looked for.
    zero: a rule may return 0 where the true number is below the rounding of f's values (1 − y
        for a y next to 1), and the other way round.
    left_out: by mode, which entries aren't compared: infinite ones, and those at kinks.
    """

    def __init__(self, programs: Programs, name: str, arrays, seed: int):
        self.programs, self.name = programs, name
        self.random = np.random.default_rng(seed)
        self.x, self.fixed = as_vector(programs.ours, arrays)
        self.notes: list[str] = []
        self.rough: dict[str, np.ndarray] = {}

    def look(self) -> None:
        """Evaluate f at x and around it, and choose the directions.

        Raises:
            NothingToCheck: x or f(x) has nan, or nothing finite that can be differentiated.
        """
        programs, x = self.programs, self.x
        names = programs.ours.input_names()
        if np.isnan(x).any():
            which = some_are(names, np.isnan(x))
            raise NothingToCheck(f"{which} nan: no derivative to check there")
        self.moves = np.isfinite(x)
        if not self.moves.all():
            self.notes.append(
                f"{some_are(names, ~self.moves)} infinite and can't be moved: no differences there"
            )
        self.value = np.asarray(programs.value(x, self.fixed))
        if x.size and not self.value.size:
            raise NothingToCheck("the function returns no floating-point numbers")
        outputs, self.out_arrays = _output_names(programs, x, self.fixed)
        self.names = {m: outputs if m in BY_RESULT else names for m in MODES}
        is_nan = np.isnan(self.value)
        if is_nan.any():
            raise NothingToCheck(
                f"{some_are(outputs, is_nan)} nan at these arguments: there is no derivative to "
                "check where the function isn't defined"
            )
        self.precision = Precision(programs.coarsest(x, self.fixed))
        if self.precision.eps > np.finfo("float64").eps:
            self.notes.append(
                f"{self.name} computes in {_dtype_of(self.precision.eps)} on float64 arguments: "
                f"its tolerances are {self.precision.exact:.0e} against "
                f"autodiff and {self.precision.numerical:.0e} against differences"
            )
        self.usable = np.isfinite(self.value)
        if self.value.size and not self.usable.any():
            raise NothingToCheck("all results are infinite at these arguments")
        self.choose_directions()
        if not self.usable.all():
            self.notes.append(
                f"{some_are(outputs, ~self.usable)} infinite, and so is left out of the check"
            )

    def choose_directions(self) -> None:
        """w, in which all results count; v, in which all arguments move by their own size."""
        x, eps = self.x, self.precision.eps
        self.own, self.arrays = scales(self.programs.ours, x)
        self.v = random_moves(self.random, self.own) * self.moves
        r = self.random.normal(size=self.value.shape)
        self.u = r.astype(self.value.dtype)
        # The size of the function: of its values here and nearer to 0, and of its changes.
        size = np.abs(self.value.astype("float64"))
        for shrink in (0.5, 0.0):
            nearer = np.multiply(x, shrink, out=x.copy(), where=self.moves)
            nearby = np.abs(np.asarray(self.programs.value(nearer, self.fixed)))
            size = np.fmax(size, np.where(np.isfinite(nearby), nearby, 0.0))
        self.size = np.where(self.usable, size, 0.0)
        self.w = self.u  # a direction of the results, until their rates of change are known
        changes, _ = self.changes_along("value", self.v, 2.0**-4)
        with np.errstate(all="ignore"):
            rate = np.nanmax(np.abs(changes) / (2.0**-4 * SHRINK)[:, None, None], axis=(0, 1))
        rate = np.where(np.isfinite(rate), rate, 0.0)
        rate = np.maximum(rate, eps**0.6 * np.abs(np.where(self.usable, self.value, 0.0)))
        # In an array the results keep their proportions, and arrays count alike.
        self.rate = np.array(rate)
        arrays, typical = np.array(self.out_arrays, int), np.zeros_like(rate)
        for group in np.unique(arrays):
            known = rate[(arrays == group) & (rate > 0)]
            typical[arrays == group] = np.median(known) if known.size else 0.0
        known = typical[typical > 0]
        typical[typical == 0] = np.median(known) if known.size else 1.0
        # ... but for those whose changes are lost in their last places: a 1 among 1e-40s.
        typical = np.maximum(typical, eps**0.3 * np.where(self.usable, abs(self.value), 0.0))
        with np.errstate(all="ignore"):
            w = (r / power_of_two(typical)).astype(self.value.dtype)
        self.w = np.where(self.usable & np.isfinite(w), w, 0.0).astype(self.value.dtype)
        poles = ~self.usable & self.has_pole()
        if poles.any():
            outputs = self.names["forward"]
            raise NothingToCheck(
                f"{some_are(outputs, poles)} infinite at these arguments, and not so next to them: "
                "there is no derivative to check"
            )
        self.total = float(np.linalg.norm(self.w.astype("float64") * self.size))
        ratio = self.total * eps
        self.zero = {
            m: 64 * (eps * self.array_size(self.size) if m in BY_RESULT else ratio / self.own)
            for m in MODES
        }
        self.rounding = {m: self.zero[m] / 16 for m in MODES}
        nowhere = np.zeros(len(x), bool)
        self.left_out = {m: (~self.usable if m in BY_RESULT else nowhere) * True for m in MODES}

    def has_pole(self) -> np.ndarray:
        """Which infinite results are finite nearby?"""
        around = [
            np.asarray(self.programs.value(self.x + t * self.v, self.fixed))
            for t in (2.0**-30, -(2.0**-30))
        ]
        return np.asarray(np.isfinite(around).any(axis=0))

    def array_size(self, size) -> np.ndarray:
        """For each result, the largest number of the array it is in."""
        largest: dict[int, float] = {}
        for group, number in zip(self.out_arrays, size, strict=True):
            largest[group] = max(largest.get(group, 0.0), float(number))
        return np.array([largest[group] for group in self.out_arrays])

    def changes_along(self, of: str, v, top, x=None) -> tuple[np.ndarray, np.ndarray]:
        """What a block of steps along v changes, the largest of size `top`; and what is at x.

        of: "value" for f itself, or the mode of our derivative.
        """
        x = self.x if x is None else x
        changes, middle = self.programs.along(x, self.fixed, self.w, v, top * SHRINK, of=of)
        return np.asarray(changes), np.asarray(middle)

    def differentiate(self, modes: tuple[str, ...], plain_modes: tuple[str, ...]) -> None:
        """Our derivatives and autodiff's; how they vary with the last places of their arguments."""
        self.options = {"modes": modes, "plain_modes": plain_modes}
        at = self.x, self.fixed, self.w, self.v, self.u
        found, by_autodiff = self.found, self.by_autodiff = self.programs.derivatives(
            *at, **self.options
        )
        self.noise = {k: np.zeros(np.shape(found[k])) for k in found}
        for _ in range(2):
            x, w, v, u = (
                a * (1 + 4 * self.precision.eps * self.random.choice([-1.0, 1.0], a.shape))
                for a in (self.x, self.w, self.v, self.u)
            )
            w, u = w.astype(self.w.dtype), u.astype(self.u.dtype)
            others = self.programs.derivatives(x, self.fixed, w, v, u, **self.options)
            for here, there in zip((found, by_autodiff), others, strict=True):
                for k in here:
                    with np.errstate(all="ignore"):
                        change = np.abs(np.asarray(here[k], "float64") - np.asarray(there[k]))
                    change = np.where(np.isfinite(change), change, 0.0)
                    self.noise[k] = np.maximum(self.noise[k], change)
        gradient, tangent = (
            np.abs(np.nan_to_num(np.asarray(found.get(m, 0.0)), posinf=0, neginf=0))
            for m in ("reverse", "forward")
        )
        eps = self.precision.eps
        for m in SECOND:
            if m in BY_RESULT:
                size = np.maximum(np.broadcast_to(tangent, self.size.shape), self.size)
                self.zero[m] = 64 * eps * self.array_size(size)
            else:
                self.zero[m] = 64 * eps * np.broadcast_to(gradient, self.x.shape)
                for start, stop in leaf_slices(self.programs.ours):
                    part = self.zero[m][start:stop] if gradient.ndim else np.zeros(0)
                    if part.size:
                        self.zero[m] = np.array(self.zero[m])
                        # In an array of one size throughout, the zeros have that size too.
                        here = part * self.own[start:stop]
                        self.zero[m][start:stop] = np.max(here) / self.own[start:stop]
            self.rounding[m] = self.zero[m] / 16

    def look_for_roughness(self) -> None:
        """Add to the noise of the derivatives how rough they are along v.

        y (1 − y), with a y next to 1, takes steps: it has lost its last places, and stays as it is
        where the arguments vary in theirs. What is left of the differences of sixth order of nine
        values in a row is that (Moré, Wild, "Estimating computational noise", 2011), but never
        counts for more than rounding of f's values explains; and a second derivative is no rougher
        than the first, relative to its size.
        """
        at = self.fixed, self.w, self.v, self.u
        rough: dict[str, Any] = {}
        for step in (2.0**-10, 2.0**-6, 2.0**-4):
            places = (self.x + k * step * self.v for k in range(-4, 5))
            both = [self.programs.derivatives(x, *at, **self.options) for x in places]
            for m in self.options["modes"]:
                sizes = [np.asarray([row[i].get(m, 0.0) for row in both]) for i in (0, 1)]
                with np.errstate(all="ignore"):
                    found = [np.sqrt(np.mean(np.diff(s, 6, axis=0) ** 2, axis=0)) for s in sizes]
                # The root of 6!² / 12!, and a change is of two such values.
                found = 4 * 0.033 * np.nan_to_num(np.maximum(*found), posinf=0.0)
                rough[m] = np.maximum(rough.get(m, 0.0), found)
        relative: dict[str, Any] = {}
        for m in rough:
            size = np.abs(np.nan_to_num(np.asarray(self.found[m], "float64"), posinf=0, neginf=0))
            if m in SECOND:
                first = "forward" if m in BY_RESULT else "reverse"
                most = 16 * relative.get(first, 0.0) * size
            else:
                most = self.zero[m]
            self.rough[m] = np.minimum(rough[m], most)
            self.noise[m] = np.maximum(self.noise[m], self.rough[m])
            relative[m] = self.rough[m] / np.where(size > 0, size, np.inf)

    def leeway(self, mode: str, more: float = 1.0) -> dict[str, Any]:
        """What a rule may be off by, and where it isn't compared."""
        noise = self.noise.get(mode, 0.0)
        # Half of a number is excused only where noise is known to reach that far.
        size = np.abs(np.asarray(self.found.get(mode, 0.0), "float64"))
        noise = np.minimum(32 * noise, np.maximum(4 * noise, 0.5 * np.nan_to_num(size)))
        noise = noise + (self.cancelling() if mode == "reverse" else 0.0)
        return {
            "skip": self.left_out[mode],
            "absolute": more * (4 * self.rounding[mode] + noise),
            "zero": more * self.zero[mode],
        }

    def cancelling(self) -> np.ndarray:
        """What large results leave of the terms of a gradient that cancel."""
        scale = np.maximum(np.maximum(self.own, self.arrays), 1.0)
        eps = self.precision.eps
        # In numbers of few digits, 64 roundings would excuse half of everything.
        return min(64 * eps, eps**0.6) * self.total / scale


def _dtype_of(eps: float) -> str:
    spacings = {float(jnp.finfo(dtype).eps): dtype for dtype in DTYPES}
    return spacings.get(eps, f"numbers of relative spacing {eps:.0e}")


def some_are(names, mask) -> str:
    """ "x[0] is", "x[0], x[3] and 5 more are" """
    places = np.flatnonzero(mask)
    text = ", ".join(short(names[i]) for i in places[:3])
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return f"{text}{more} {'is' if len(places) == 1 else 'are'}"


def _output_names(programs, x, fixed) -> tuple[list[str], list[int]]:
    """Of each number of the result its name, and which array it is in."""
    parts = programs.ours.split(jnp.asarray(x))
    result = jax.eval_shape(programs.reference.value, parts, fixed)
    names, arrays = [], []
    for n, (path, y) in enumerate(jax.tree_util.tree_flatten_with_path(result)[0]):
        if jax.dtypes.issubdtype(y.dtype, jnp.inexact):
            is_complex = bool(jnp.issubdtype(y.dtype, jnp.complexfloating))
            label = "result" + jax.tree_util.keystr(path)
            leaf = Leaf(label, label, tuple(y.shape), True, is_complex, None)
            names += entry_names(label, leaf)
            arrays += [n] * leaf.size
    return names, arrays
