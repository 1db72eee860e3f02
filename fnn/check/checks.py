"""All checks of one function at one point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn.check.derivatives import BATCH, FIRST, MODES, SECOND, WHAT, Programs
from fnn.check.differences import (
    EDGE,
    FACTOR,
    KINK,
    SMOOTH,
    STEPS,
    UNCLEAR,
    UNDEFINED,
    Block,
    Differences,
    Precision,
    schedule,
    search,
)
from fnn.check.directions import (
    Leaf,
    as_vector,
    entry_names,
    leaf_slices,
    power_of_two,
    random_moves,
    scales,
)
from fnn.check.report import Check, Kink, Report, short

_BY_RESULT = ("forward", "forward over forward")
_SHRINK = FACTOR ** -np.arange(STEPS)


DTYPES = ("float16", "bfloat16", "float32", "float64")


class Options(NamedTuple):
    """What the caller of a check chose."""

    dtypes: tuple[str, ...]
    order: int
    seed: int
    max_entries: int


class NothingToCheck(Exception):
    """There is no derivative to check, for the reason given."""


class Inspection:
    """All checks of one function at one point; each method below `report` adds rows to it.

    Nothing here is absolute: what two numbers may differ by is relative to them, or to what
    rounding does to them, found by looking:

    rounding: the part of the differences' error that is due to rounding, at the best step. A
        derivative can't be known better from the function's values, and a rule may lose as much.
    noise: how much a derivative varies when its arguments do by a few units in the last place.
    zero: a rule may return 0 where the true number is below the rounding of the function's
        values (1 − y for a y next to 1), and the other way round.
    """

    def __init__(self, programs: Programs, name: str, arrays, options: Options):
        self.programs, self.name, self.wanted = programs, name, options
        self.max_entries = options.max_entries
        self.random = np.random.default_rng(options.seed)
        self.x, self.fixed = as_vector(programs.ours, arrays)
        self.rows: list[Check] = []
        self.kinks: list[Kink] = []
        self.notes: list[str] = []
        self.covering: Check | None = None
        self.compared = 0
        self.unresolved = ""
        self.close_kinks = False

    # ------------------------------------------------------------------------------ the whole of it

    def report(self) -> Report:
        try:
            self.look_at_the_point()
            self.all_checks(self.wanted.dtypes, self.wanted.order)
            if not self.compared:
                raise NothingToCheck(self.nothing_compared())
        except NothingToCheck as why:
            self.rows.append(Check("", "", "float64", 0, "", ok=False, why=str(why)))
        return Report(self.name, tuple(self.rows), tuple(self.kinks), tuple(self.notes))

    def all_checks(self, dtypes: Sequence[str], order: int) -> None:
        modes = [*FIRST, *(SECOND if order > 1 else ())]
        at = self.x, self.fixed, self.w, self.v
        ours, plain = self.programs.ours, self.programs.plain
        why_not = {m: self.programs.unavailable(ours, m, *at) for m in modes}
        able = tuple(m for m in modes if not why_not[m])
        plain_able: tuple[str, ...] = ()
        if plain is not None:
            why_no_plain = {m: self.programs.unavailable(plain, m, *at) for m in able}
            plain_able = tuple(m for m in able if not why_no_plain[m])
            for why in sorted({w for w in why_no_plain.values() if w}):
                without = ", ".join(m for m in able if why_no_plain[m] == why)
                self.notes.append(f"no comparison with autodiff ({without}): {why}")
        self.options = {"modes": able, "plain_modes": plain_able}
        found, by_autodiff = self.programs.derivatives(*at, self.u, **self.options)
        self.found, self.by_autodiff = found, by_autodiff
        self.look_at_noise(found, by_autodiff)
        self.leave_out_what_overflows()
        if plain is not None:
            for what in ("value", "value, differentiated"):
                if what in found:
                    self.against_definition(what, found[what])
        for mode in modes:
            if why_not[mode]:
                self.skip(mode, why_not[mode])
                continue
            entries, differences = self.differences(mode, able)
            if differences is not None:
                self.note_kinks(mode, entries, differences)
            if mode in by_autodiff:
                self.compare(mode, "autodiff", found[mode], by_autodiff[mode], **self.leeway(mode))
            if differences is not None:
                self.against_differences(mode, entries, differences)
            if mode == "reverse":
                self.linearity()
        first = tuple(m for m in able if m in FIRST)
        self.op_by_op(first)
        self.vmapped(first, plain_able)
        self.in_dtypes([d for d in dtypes if d != "float64"], first, plain_able)

    # -------------------------------------------------------------------------- the point itself

    def look_at_the_point(self) -> None:
        """What a derivative needs: a finite point, and a value there."""
        programs, x = self.programs, self.x
        names = programs.ours.input_names()
        if np.isnan(x).any():
            raise NothingToCheck(f"{_some(names, np.isnan(x))} nan: no derivative to check there")
        self.moves = np.isfinite(x)
        if not self.moves.all():
            self.notes.append(
                f"{_some(names, ~self.moves)} infinite and can't be moved: no differences by it"
            )
        self.value = np.asarray(programs.value(x, self.fixed))
        if x.size and not self.value.size:
            raise NothingToCheck("the function returns no floating-point numbers")
        outputs, self.out_arrays = _output_names(programs, x, self.fixed)
        self.names = {m: outputs if m in _BY_RESULT else names for m in MODES}
        is_nan = np.isnan(self.value)
        if is_nan.any():
            raise NothingToCheck(
                f"{_some(outputs, is_nan)} nan at these arguments: there is no derivative to "
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
                f"{_some(outputs, ~self.usable)} infinite, and so is left out of the check"
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
            nearby = np.abs(np.asarray(self.programs.value(x * shrink * self.moves, self.fixed)))
            size = np.fmax(size, np.where(np.isfinite(nearby), nearby, 0.0))
        self.size = np.where(self.usable, size, 0.0)
        self.blocks: dict = {}
        changes, _ = self.changes_along("value", self.v, 2.0**-4)
        with np.errstate(all="ignore"):
            rate = np.nanmax(np.abs(changes) / (2.0**-4 * _SHRINK)[:, None, None], axis=(0, 1))
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
                f"{_some(outputs, poles)} infinite at these arguments, and not so next to them: "
                "there is no derivative to check"
            )
        self.total = float(np.linalg.norm(self.w.astype("float64") * self.size))
        ratio = self.total * eps
        self.zero = {
            m: 64 * (eps * self.array_size(self.size) if m in _BY_RESULT else ratio / self.own)
            for m in MODES
        }
        self.rounding = {m: self.zero[m] / 16 for m in MODES}
        nowhere = np.zeros(len(x), bool)
        self.left_out = {m: (~self.usable if m in _BY_RESULT else nowhere) * True for m in MODES}

    def has_pole(self) -> np.ndarray:
        """Which infinite results are finite nearby?"""
        around = [
            np.asarray(self.programs.value(self.x + t * self.v, self.fixed))
            for t in (2.0**-30, -(2.0**-30))
        ]
        return np.isfinite(around).any(axis=0) if not self.usable.all() else ~self.usable

    def array_size(self, size) -> np.ndarray:
        """For each result, the largest number of the array it is in."""
        largest: dict[int, float] = {}
        for group, number in zip(self.out_arrays, size, strict=True):
            largest[group] = max(largest.get(group, 0.0), float(number))
        return np.array([largest[group] for group in self.out_arrays])

    def look_at_noise(self, found, by_autodiff) -> None:
        """How derivatives vary where their arguments do by a few units in the last place."""
        keys = [*found]
        self.noise = {k: np.zeros(np.shape(found[k])) for k in keys}
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
            if m in _BY_RESULT:
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

    def leave_out_what_overflows(self) -> None:
        """An infinite result has the upstream gradient 0, and 0 · ∞ is nan in most rules."""
        gradient = np.asarray(self.found.get("reverse", self.x))
        overflows = np.isnan(gradient) & (not self.usable.all())
        if not overflows.any():
            return
        why = "there the gradient is nan, which may be 0 · ∞, as a result is infinite"
        if "reverse" in self.by_autodiff:
            overflows &= np.isnan(np.asarray(self.by_autodiff["reverse"]))
            if overflows.any():
                text = f"{_some(self.names['reverse'], overflows)} left out: {why}; so it is by "
                self.notes.append(text + "autodiff")
        else:
            why = f"{_some(self.names['reverse'], overflows)} not checked: {why}"
            row = Check("gradient", "", "float64", 1, "reverse", ok=False, why=why)
            self.rows.append(row)
        self.left_out["reverse"] |= overflows

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

    def nothing_compared(self) -> str:
        if not self.x.size:
            return "no argument that can move has any entries"
        if not self.moves.any():
            return "all arguments that could move are infinite"
        if not self.value.size:
            return "the function returns no floating-point numbers"
        if all(row.skipped for row in self.rows):
            return "JAX can differentiate the function in no mode: " + self.rows[0].skipped
        why = f": {self.unresolved}" if self.unresolved else ""
        return "nowhere could a derivative be compared with anything" + why

    # ------------------------------------------------------------------------------ one comparison

    def compare(
        self,
        mode: str,
        against: str,
        rule,
        reference,
        *,
        what: str = "",
        dtype: str = "float64",
        order: int | None = None,
        names: Sequence[str] | None = None,
        skip: Any = False,
        absolute: Any = 0.0,
        zero: Any = 0.0,
        size: Any = 0.0,
        tolerance: float | None = None,
    ) -> None:
        """Compare all entries but those to `skip`.

        absolute: what an entry may be off by besides the tolerance's share of it.
        zero: the same, where one of the two numbers is 0.
        size: what an entry's error is relative to, if that is more than the entry.
        """
        rule, reference = np.array(rule, "float64"), np.array(reference, "float64")
        names = self.names[mode] if names is None else names
        tolerance = self.precision.exact if tolerance is None else tolerance
        skip = np.broadcast_to(skip, rule.shape)
        same = (rule == reference) | (np.isnan(rule) & np.isnan(reference))
        with np.errstate(all="ignore"):
            size = np.maximum(np.maximum(np.abs(rule), np.abs(reference)), size)
            allowed = absolute + np.where((rule == 0) | (reference == 0), zero, 0.0)
            # Relative to the largest double, if that is what the size overflows to.
            error = np.maximum(np.abs(rule / size - reference / size) - allowed / size, 0.0)
        error = np.where(same, 0.0, np.nan_to_num(error, nan=np.inf))
        wrong = ~(error <= tolerance) & ~skip
        error = np.where(skip | (wrong.any() & ~wrong), 0.0, error)
        worst = int(np.argmax(error)) if error.size else None
        if against in ("autodiff", "differences", "slopes at kinks") and dtype == "float64":
            # What noise may explain as a whole says nothing.
            says = same | (error > 0) | (allowed < size)
            self.compared += int(np.sum(~skip & ~np.isnan(reference) & says))
        self.rows.append(
            Check(
                what or WHAT[mode],
                against,
                dtype,
                1 + (mode in SECOND) if order is None else order,
                "" if order == 0 else mode,
                0.0 if worst is None else float(error[worst]),
                "" if worst is None or error[worst] == 0 else names[worst],
                float("nan") if worst is None else float(rule[worst]),
                float("nan") if worst is None else float(reference[worst]),
                tolerance,
                int(np.sum(skip)),
                ok=not wrong.any(),
            )
        )

    def skip(self, mode: str, why: str, dtype: str = "float64") -> None:
        order = 1 + (mode in SECOND)
        self.rows.append(Check(WHAT[mode], "", dtype, order, mode, skipped=why))

    def against_definition(self, what: str, value) -> None:
        self.compare(
            "forward",
            "definition",
            value,
            self.value,
            what=what,
            order=0,
            absolute=32 * self.noise["value"]
            + 64 * self.precision.eps * self.array_size(self.size),
        )

    # --------------------------------------------------------------------------------- differences

    def differences(self, mode, able) -> tuple[np.ndarray, Differences | None]:
        """Of f for a first derivative, of our own first derivative for a second."""
        rule = np.asarray(self.found[mode], "float64")
        if mode == "reverse":
            entries = self.sample(rule)
            at = self.by_entry(self.w, entries)
            others = [self.arrays[entries], np.ones(len(entries))]
            tops = schedule(self.own[entries], others, self.precision.eps, 2.0**-51)
            total = float(np.sum(np.abs(self.w) * self.far_rounding("value")))
            doubt = np.full(len(entries), total)
            found = search(at, tops, rule[entries], self.precision, doubt=doubt)
            self.close_kinks = bool((found.kink_step < 2.0**-20 * self.own[entries]).any())
            return entries, found
        of = {"forward": "value", "forward over forward": "forward"}.get(mode, "reverse")
        entries = np.arange(len(self.names[mode]))
        if of != "value" and of not in able:
            return entries, None
        at = self.along(of, self.v, self.noise.get(of, 0.0))
        # v moves arguments by their own sizes; these moves are of size 1.
        sizes = np.unique(self.own[self.moves])
        ones = [np.full(len(entries), 1 / size) for size in (*sizes[:1], *sizes[1:][-1:])]
        tops = schedule(np.ones(len(entries)), ones, self.precision.eps, 2.0**-36)
        doubt = self.far_rounding(of)
        found = search(at, tops, rule, self.precision, doubt=doubt)
        if self.close_kinks:
            # Steps along v are too large to see them, and what they see instead says nothing.
            with np.errstate(all="ignore"):
                off = np.abs(found.slope - rule) > 2 * found.error
            found.slope[off], found.error[off], found.state[off] = np.nan, np.inf, UNCLEAR
        return entries, found

    def by_entry(self, w, entries, x=None) -> Callable:
        """Blocks of differences of wᵀf by single entries."""
        point = self.x if x is None else x
        spacing = np.spacing(np.abs(point[entries]))
        largest = np.zeros(len(entries))  # of what any step changed

        def at(tops, todo):
            order = np.argsort(~todo, kind="stable")
            steps = tops[:, None] * _SHRINK
            count = int(todo.sum())
            arguments = point, self.fixed, w, entries[order], steps[order], count
            rows, sizes = (np.asarray(a) for a in self.programs.by_entry(*arguments))
            table, size = np.empty_like(rows), np.empty_like(sizes)
            table[order], size[order] = rows, sizes
            # A step that is lost in the argument's last place says nothing.
            table[steps < 2 * spacing[:, None]] = np.nan
            np.maximum(largest, np.where(todo, size, 0.0), out=largest)
            return Block(steps, *np.moveaxis(table, 2, 0), 2 * self.precision.eps * largest)

        return at

    def changes_along(self, of, v, top, x=None):
        w = getattr(self, "w", self.u)
        point = self.x if x is None else x
        changes, middle = self.programs.along(point, self.fixed, w, v, top * _SHRINK, of=of)
        return np.asarray(changes), np.asarray(middle)

    def far_rounding(self, of) -> np.ndarray:
        """The rounding of f, or of our derivative, where arguments are moved by 1; by result."""
        sizes: Any = 0.0
        for sign in (-1.0, 1.0):
            x = self.x + sign * self.moves
            middle = np.abs(self.changes_along(of, self.v, 2.0**-4, x)[1]).astype("float64")
            sizes = np.fmax(sizes, np.where(np.isfinite(middle), middle, 0.0))
        return 2 * self.precision.eps * sizes

    def along(self, of, v, noise) -> Callable:
        """Blocks of differences of f, or of our derivative, in direction v; by result."""
        ever_moved = np.array(False)

        def at(tops, todo):
            nonlocal ever_moved
            top = float(tops[todo][0])
            if (of, top) not in self.blocks:
                self.blocks[of, top] = self.changes_along(of, v, top)
            changes, middle = self.blocks[of, top]
            plus, minus = changes[:, 0].T, changes[:, 1].T
            steps = np.broadcast_to(top * _SHRINK, plus.shape)
            # Smaller moves are lost in the last places of the arguments.
            plus, minus = (np.where(steps < 2.0**-36, np.nan, c) for c in (plus, minus))
            with np.errstate(all="ignore"):
                sides = plus / steps, -minus / steps
                size = np.abs(np.where(np.isfinite(middle), middle, 0.0)).astype("float64")
            ever_moved = ever_moved | (changes != 0).any(axis=(0, 1))
            off = 2 * self.precision.eps * size + (noise if of != "value" else 0.0)
            if of == "value":
                off = off + 2 * self.precision.eps * self.rate
            return Block(
                steps, plus, minus, np.minimum(*sides), np.maximum(*sides), off * ever_moved
            )

        return at

    def sample(self, rule) -> np.ndarray:
        """The entries whose differences to take: all, or some and the most suspicious."""
        able = np.flatnonzero(self.moves)
        if able.size <= self.max_entries:
            return able
        suspicious = [np.array(self.cover(rule), int), np.flatnonzero(~np.isfinite(rule))]
        if "reverse" in self.by_autodiff:
            plain = np.asarray(self.by_autodiff["reverse"])
            with np.errstate(all="ignore"):
                off = np.abs(rule - plain) / np.maximum(np.abs(rule), np.abs(plain))
            off = np.nan_to_num(off, nan=0.0)
            worst = np.argsort(off)[::-1][: max(1, self.max_entries // 4)]
            suspicious.append(worst[off[worst] > 0])
        first = np.concatenate(suspicious)
        first = first[self.moves[first]]
        _, order = np.unique(first, return_index=True)
        first = first[np.sort(order)]
        others = self.random.permutation(able)
        chosen = np.concatenate([first, others[~np.isin(others, first)]])[: self.max_entries]
        by_autodiff = ", and by autodiff" if self.by_autodiff else ""
        self.notes.append(
            f"differences by single entries: at {self.max_entries} of {able.size} entries, chosen "
            f"at random; along random directions{by_autodiff}: at all"
        )
        return np.sort(chosen)

    # ------------------------------------------------------- all entries at once, in large arrays

    def cover(self, gradient) -> list[int]:
        """Differences along random directions, which move every entry of every array.

        The difference of wᵀf along v must be the gradient times v. In a second direction those
        entries move less that would drown the others. Where the two numbers disagree, halving
        the direction again and again finds an entry that is wrong.
        """
        point, suspects = (self.x, np.asarray(gradient)), []
        worst: tuple | None = None
        rough: list[str] = []
        leaves = zip(self.programs.ours.moving, leaf_slices(self.programs.ours), strict=True)
        for leaf, (start, stop) in leaves:
            for equal in (False, True):
                v = np.zeros_like(self.x)
                v[start:stop] = self.v[start:stop]
                share = self.share(point, v)
                known = np.abs(share[share != 0])
                if equal:
                    if not known.size:
                        continue
                    low = np.quantile(known, 0.1)
                    with np.errstate(all="ignore"):
                        less = np.where(share != 0, np.minimum(1.0, low / np.abs(share)), 1.0)
                    v *= power_of_two(np.where(less > 0, less, 1.0))
                here, seen = point, self.along_all(point, v)
                if seen is None:
                    here = self.nearby()
                    seen = None if here is None else self.along_all(here, v)
                if seen is None:
                    rough.append(leaf.path)
                    continue
                off, allowed, rule, slope, largest = seen
                error = max(off - allowed, 0.0) / largest if largest else float(off > allowed)
                name = leaf.path
                if off > allowed:
                    entry = self.halve(here, v, start, stop)
                    suspects.append(entry)
                    name = self.names["reverse"][entry]
                if worst is None or error > worst[0]:
                    worst = error, name, rule, slope, off <= allowed
        if rough:
            self.notes.append(
                "along random directions, differences are too rough to show a single wrong entry "
                f"of {', '.join(short(p) for p in rough[:3])}"
                + (f" and {len(rough) - 3} more arrays" if len(rough) > 3 else "")
            )
        if worst is not None:
            error, name, rule, slope, ok = worst
            self.compared += 1
            numbers = error, name if error else "", rule, slope
            what = "gradient times v"
            self.covering = Check(what, "differences", "float64", 1, "reverse", *numbers, ok=ok)
        return suspects

    def share(self, point, v) -> np.ndarray:
        """Each entry's part of the gradient times v."""
        with np.errstate(all="ignore"):
            share = point[1] * v
        return np.where(np.isfinite(share), share, 0.0)

    def along_all(self, point, v, quick: bool = False):
        """How far the gradient times v is off the difference along v, or None if that is rough.

        Returns the distance, what it may be, the two numbers, and the largest entry's part.
        """
        x, gradient = point
        v = np.where(np.isfinite(gradient), v, 0.0)
        share = self.share(point, v)
        known = np.abs(share[share != 0])
        typical = float(np.median(known)) if known.size else 0.0
        rule = math.fsum(share)
        eps, w = self.precision.eps, self.w.astype("float64")

        def at(tops, todo):
            changes, middle = self.changes_along("value", v, float(tops[0]), x)
            with np.errstate(all="ignore"):
                plus, minus = (changes @ w).T[:, None]
                steps = np.broadcast_to(tops[0] * _SHRINK, plus.shape)
                size = np.where(np.isfinite(middle), middle, 0.0).astype("float64")
            moved = (changes != 0).any(axis=(0, 1))
            off = 2 * eps * np.linalg.norm(w * size * moved) + 4 * eps * np.linalg.norm(share)
            return Block(steps, plus, minus, plus / steps, plus / steps, np.array([off]))

        limit = np.array([1e-4 * typical + 16 * eps * np.linalg.norm(share)])
        tops = schedule(np.ones(1), [], eps, 2.0**-36)
        if quick:
            tops = tops[0][:2] + tops[1][:2], []
        d = search(at, tops, np.array([rule]), self.precision, limit, believe=quick)
        error = float(d.error[0])
        largest = float(known.max(initial=0.0))
        if d.state[0] not in (SMOOTH, UNCLEAR) or not np.isfinite(error):
            return None
        allowed = 4 * error + self.precision.numerical * typical
        if not known.size:
            allowed += self.zero_along(v)
        off = abs(rule - float(d.slope[0]))
        if typical and off <= allowed and error > 0.2 * typical:
            return None
        return off, allowed, rule, float(d.slope[0]), largest

    def zero_along(self, v) -> float:
        return float(np.linalg.norm(self.zero["reverse"] * v))

    def nearby(self):
        """A point next to x, off the kinks that x may lie on, and the gradient there."""
        if not hasattr(self, "_nearby"):
            self._nearby = None
            x = self.x + 2.0**-7 * random_moves(self.random, self.own) * self.moves
            found, _ = self.programs.derivatives(
                x, self.fixed, self.w, self.v, self.u, **self.options
            )
            if np.isfinite(np.asarray(found["value"])[self.usable]).all():
                self._nearby = x, np.asarray(found["reverse"])
        return self._nearby

    def halve(self, point, v, start, stop) -> int:
        """An entry at which the gradient is wrong, given that one of start:stop is."""
        while stop - start > 1:
            middle = (start + stop) // 2
            part = np.zeros_like(v)
            part[start:middle] = v[start:middle]
            seen = self.along_all(point, part, quick=True)
            if seen is not None and seen[0] > seen[1]:
                stop = middle
            else:
                start = middle
        return start

    # ------------------------------------------------------------- what differences say of the rule

    def note_kinks(self, mode, entries, d: Differences) -> None:
        self.left_out[mode][entries] |= np.isin(d.state, (KINK, EDGE, UNDEFINED))
        known = np.isfinite(d.rounding) & ~self.left_out[mode][entries]
        self.rounding[mode] = np.array(self.rounding[mode])
        self.rounding[mode][entries] = np.where(known, d.rounding, self.rounding[mode][entries])

    def against_differences(self, mode, entries, d: Differences) -> None:
        rule = np.asarray(self.found[mode], "float64")[entries]
        names = [self.names[mode][i] for i in entries]
        # Where there is no clear slope, only what is far off is known to be wrong.
        # Rounding is known better than what the steps leave out.
        is_rough = (d.state == UNCLEAR) & (d.rounding < 0.5 * d.error)
        unsure = np.where(is_rough, 10.0, 2.0) * d.error
        if mode == "reverse":
            unsure = unsure + self.cancelling()[entries]
        unknown = ~np.isfinite(d.slope + d.error)
        unclear = unknown & ~self.left_out[mode][entries]
        if unclear.any():
            why = f"{_some(names, unclear)} not resolved by differences there"
            self.unresolved = self.unresolved or why
            self.notes.append(f"the {WHAT[mode]}: {why}")
        self.compare(
            mode,
            "differences",
            rule,
            np.where(unknown, rule, d.slope),
            names=names,
            skip=self.left_out[mode][entries] | unknown,
            absolute=np.where(unknown, 0.0, unsure),
            zero=self.zero[mode][entries],
            tolerance=self.precision.numerical,
        )
        if mode == "reverse":
            self.at_kinks(entries, rule, d)
            if self.covering is not None:
                self.rows.append(self.covering)

    def at_kinks(self, entries, rule, d: Differences) -> None:
        """Between the slopes on its two sides any number is right at a kink.

        At the edge of the domain it must be the slope on the one side; where a slope grows
        without bound, inf is right and so is any finite number that a rule puts in its place.
        """
        kinks = np.flatnonzero(np.isin(d.state, (KINK, EDGE)))
        if not kinks.size:
            return
        plain = self.by_autodiff.get("reverse")
        around = self.slopes_around(entries, kinks)
        nearest, between = [], []
        for i, others in zip(kinks, around, strict=True):
            sides = [s for s in (d.left[i], d.right[i]) if not np.isnan(s)]
            if d.state[i] == KINK:
                sides += [d.low[i], d.high[i], *others[np.isfinite(others)]]
            low, high = min(sides), max(sides)
            if np.isinf(low) or np.isinf(high):  # a finite number may stand for either
                low, high = min(low, -np.finfo(float).max), max(high, np.finfo(float).max)
                low, high = (
                    s if np.isinf(s) and s in sides else b for s, b in ((low, low), (high, high))
                )
            same = plain is not None and rule[i] == np.asarray(plain)[entries[i]]
            inside = same if not np.isnan(rule[i]) else False
            nearest.append(rule[i] if inside else np.clip(rule[i], low, high))
            between.append((min(sides), max(sides)))
        nearest = np.array(nearest)
        # What a nan should have been is shown as a number.
        shown = np.where(np.isnan(nearest), [b[0] for b in between], nearest)
        width = np.array([b[1] - b[0] if np.isfinite(b).all() else 0.0 for b in between])
        self.compare(
            "reverse",
            "slopes at kinks",
            rule[kinks],
            shown,
            names=[self.names["reverse"][i] for i in entries[kinks]],
            absolute=1e-3 * width + 2 * np.nan_to_num(d.slack[kinks], posinf=0.0),
            zero=self.zero["reverse"][entries[kinks]],
            tolerance=max(1e-3, self.precision.numerical),
        )
        row = self.rows[-1]
        if not row.ok:
            place = [self.names["reverse"][i] for i in entries[kinks]].index(row.worst)
            self.rows[-1] = row.replace(between=between[place])
        self.name_kinks(entries, d, kinks)

    def slopes_around(self, entries, kinks) -> np.ndarray:
        """The slopes at points next to x, (kinks, points): where ties are broken, say.

        They are what a kink's one slope is chosen from, too, where several pieces meet in it.
        """
        found = []
        todo = np.zeros(len(entries), bool)
        todo[kinks] = True
        for _ in range(6):
            x = self.x + 2.0**-18 * random_moves(self.random, self.own) * self.moves
            block = self.by_entry(self.w, entries, x)(self.own[entries] * 2.0**-22, todo)
            with np.errstate(all="ignore"):
                found.append(((block.plus - block.minus) / (2 * block.steps))[kinks, 2])
        return np.transpose(found)

    def name_kinks(self, entries, d: Differences, kinks) -> None:
        """For the reader, in terms of the sum of the results instead of a random projection."""
        ones = np.where(self.usable, 1.0, 0.0).astype(self.w.dtype)
        only = np.zeros(len(entries), bool)
        only[kinks] = True
        others = [self.arrays[entries], np.ones(len(entries))]
        tops = schedule(self.own[entries], others, self.precision.eps, 2.0**-51)
        at = self.by_entry(ones, entries)
        point = self.x, self.fixed, ones, self.v, self.u
        rule = np.asarray(self.programs.derivatives(*point, **self.options)[0]["reverse"])
        summed = search(at, tops, rule[entries], self.precision, only=only)
        for k in kinks:
            seen = summed if summed.state[k] in (KINK, EDGE) else None
            left, right = (seen.left[k], seen.right[k]) if seen else (summed.slope[k],) * 2
            name = self.names["reverse"][entries[k]]
            self.kinks.append(Kink(name, float(left), float(right), float(rule[entries[k]])))

    # ------------------------------------------------------------- what must hold of a rule besides

    def linearity(self) -> None:
        """Of the backward b in the upstream gradient."""
        found, skip = self.found, self.left_out["reverse"]
        what, against = "b(w + 30z)", "b(w) + 30 b(z)"
        noise = _finite(np.asarray(found[against]))
        for start, stop in leaf_slices(self.programs.ours):
            noise[start:stop] = noise[start:stop].max(initial=0.0)
        self.compare(
            "reverse",
            against,
            found[what],
            found[against],
            what=what,
            skip=skip,
            absolute=32 * np.maximum(self.noise[what], self.noise[against])
            + 64 * self.precision.eps * noise,
        )
        self.compare("reverse", "zero", found["b(0)"], 0 * self.x, what="b(0)", skip=skip)

    def op_by_op(self, modes) -> None:
        """Without jit around."""
        at = jnp.asarray(self.x), self.fixed, self.w, self.v
        for mode in modes:
            rule = MODES[mode](self.programs.ours, *at)
            what = f"{WHAT[mode]}, op by op"
            self.compare(mode, "jitted", rule, self.found[mode], what=what, **self.leeway(mode))

    def vmapped(self, modes, plain_modes) -> None:
        """A batch of points nearby, each with its own w and v."""
        X = self.x * (1 - 1e-3 * np.arange(BATCH)[:, None])
        W = (self.w * self.random.normal(size=(BATCH, 1))).astype(self.w.dtype)
        V = random_moves(self.random, np.broadcast_to(self.own, X.shape)) * self.moves

        def each(names):
            return [f"{name} of example {i}" for i in range(BATCH) for name in names]

        options = {"modes": modes, "plain_modes": tuple(m for m in plain_modes if m in modes)}
        mapped, shared = self.programs.vmapped(X, self.fixed, W, V, **options)
        for mode, (rule, alone) in mapped.items():
            leeway = {k: np.tile(n, BATCH) for k, n in self.leeway(mode, 8).items()}
            self.compare(
                mode,
                "one by one",
                np.ravel(rule),
                np.ravel(alone),
                what=f"{WHAT[mode]}, vmapped",
                names=each(self.names[mode]),
                **leeway,
            )
        ours = self.programs.ours
        ends = np.cumsum(ours.sizes)
        whole = self.leeway("reverse", 8 * BATCH) if shared else {}
        for argument, (rule, alone) in shared.items():
            names: list[str] = []
            leeway: dict[str, list] = {k: [] for k in whole}
            for part, end, size in zip(ours.arguments, ends, ours.sizes, strict=True):
                here = self.names["reverse"][end - size : end]
                names += here if part == argument else each(here)
                for k, numbers in whole.items():
                    piece = numbers[end - size : end]
                    leeway[k].append(piece if part == argument else np.tile(piece, BATCH))
            self.compare(
                "reverse",
                "one by one",
                rule,
                alone,
                what=f"gradient, vmapped, {short(argument)} shared",
                names=names,
                **{k: np.concatenate(n) for k, n in leeway.items()},
            )

    # ----------------------------------------------------------------------------- narrower dtypes

    def in_dtypes(self, dtypes, modes, plain_modes) -> None:
        """First derivatives in narrower dtypes, against float64 at the same (rounded) point."""
        if any(leaf.is_complex for leaf in self.programs.ours.leaves):
            for dtype in dtypes:
                for mode in modes:
                    if dtype != "float32":
                        self.skip(mode, f"JAX has no complex {dtype}", dtype)
            dtypes = [dtype for dtype in dtypes if dtype == "float32"]
        points = {}
        for dtype in dtypes:
            numbers = jnp.finfo(dtype)
            low, high = float(numbers.tiny) ** 0.5, float(numbers.max) ** 0.5
            size = np.clip(np.abs(self.v), low, high) * np.sign(self.v)
            with np.errstate(over="ignore"):
                at = [np.asarray(a).astype(jnp.dtype(dtype)) for a in (self.x, self.u, size)]
            if not np.isfinite(at[0][self.moves].astype("float64")).all():
                for mode in modes:
                    self.skip(mode, f"the arguments are too large for {dtype}", dtype)
                continue
            try:
                jax.jit(self.programs.reference).lower(at[0], self.fixed)
            except Exception as error:  # whatever the definition raises
                why_not = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                for mode in modes:
                    self.skip(mode, why_not, dtype)
                continue
            points[dtype] = at
        options = {"modes": modes, "plain_modes": tuple(m for m in plain_modes if m in modes)}
        found = self.programs.narrow(list(points.values()), self.fixed, **options)
        for dtype, (ours, plain, exact) in zip(points, found, strict=True):
            off = self.value_off(dtype, ours["value"], exact["value"])
            for mode in modes:
                self.in_dtype(dtype, mode, *(n.get(mode) for n in (ours, plain, exact)), off)

    def value_off(self, dtype, value, exact) -> float:
        """How far the value itself is off in this dtype, relative to the largest of its array."""
        value, exact = np.asarray(value, "float64"), np.asarray(exact, "float64")
        usable = np.isfinite(value) & np.isfinite(exact)
        size = self.array_size(np.where(usable, np.abs(exact), 0.0))
        size = np.maximum(size, float(jnp.finfo(dtype).tiny))
        off = np.abs(np.where(usable, value, 0.0) - np.where(usable, exact, 0.0))
        return float((off / size).max(initial=0.0))

    def in_dtype(self, dtype, mode, rule, plain, exact, value_off) -> None:
        rule, exact = np.array(rule, "float64"), np.array(exact, "float64")
        numbers = jnp.finfo(dtype)
        # Terms of the size of the function cancel in a smaller derivative.
        if mode in _BY_RESULT:
            size = np.maximum(self.array_size(self.size), self.array_size(_finite(exact)))
        else:
            u = np.abs(self.u.astype("float64"))
            size = np.linalg.norm(u * self.size) / self.arrays
            for start, stop in leaf_slices(self.programs.ours):
                largest = _finite(exact[start:stop]).max(initial=0.0)
                size[start:stop] = np.maximum(size[start:stop], largest)
        # Not where the true number is too large for the dtype.
        skip = self.left_out[mode] | ~(np.abs(exact) < float(numbers.max))
        # No more can be asked of a derivative than of the value.
        tolerance = max(64 * float(numbers.eps), self.precision.exact, 8 * value_off)
        if plain is not None:
            # ... nor more than of autodiff.
            plain = np.array(plain, "float64")
            skip |= ~np.isfinite(plain)
            with np.errstate(all="ignore"):
                off = (np.abs(plain - exact) / size)[~skip & (size > 0)].max(initial=0.0)
            tolerance = max(tolerance, 8 * float(off))
        self.compare(
            mode,
            "float64",
            rule,
            exact,
            dtype=dtype,
            skip=skip,
            tolerance=tolerance,
            size=size,
            absolute=16 * float(numbers.tiny),
        )


def _finite(numbers) -> np.ndarray:
    return np.where(np.isfinite(numbers), np.abs(numbers), 0.0)


def _dtype_of(eps: float) -> str:
    spacings = {float(jnp.finfo(dtype).eps): dtype for dtype in DTYPES}
    return spacings.get(eps, f"numbers of relative spacing {eps:.0e}")


def _some(names, mask) -> str:
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
