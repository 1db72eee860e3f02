"""All checks of one function at one point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn.check.derivatives import BATCH, BY_RESULT, FIRST, MODES, SECOND, WHAT, Programs
from fnn.check.differences import EDGE, KINK, UNCLEAR, UNDEFINED, Differences, schedule, search
from fnn.check.directions import leaf_slices, random_moves
from fnn.check.point import NothingToCheck, Point, some_are
from fnn.check.report import Check, Kink, Report, short
from fnn.check.slopes import Slopes


class Options(NamedTuple):
    """What the caller of a check chose."""

    dtypes: tuple[str, ...]
    order: int
    seed: int
    max_entries: int


class Inspection:
    """All checks of one function at one point; each method below `report` adds rows to it."""

    def __init__(self, programs: Programs, name: str, arrays, options: Options):
        self.options = options
        self.point = Point(programs, name, arrays, options.seed)
        self.slopes = Slopes(self.point, options.max_entries)
        self.rows: list[Check] = []
        self.kinks: list[Kink] = []
        self.compared = 0
        self.unresolved = ""

    # ----------------------------------------------------------------------------- the whole of it

    def report(self) -> Report:
        point = self.point
        try:
            point.look()
            self.all_checks()
            if not self.compared:
                raise NothingToCheck(self.nothing_compared())
        except NothingToCheck as why:
            self.rows.append(Check("", "", "float64", 0, "", ok=False, why=str(why)))
        return Report(point.name, tuple(self.rows), tuple(self.kinks), tuple(point.notes))

    def all_checks(self) -> None:
        point, programs = self.point, self.point.programs
        modes = [*FIRST, *(SECOND if self.options.order > 1 else ())]
        at = point.x, point.fixed, point.w, point.v
        why_not = {m: programs.unavailable(programs.ours, m, *at) for m in modes}
        able = tuple(m for m in modes if not why_not[m])
        plain_able: tuple[str, ...] = ()
        if programs.plain is not None:
            why_no_plain = {m: programs.unavailable(programs.plain, m, *at) for m in able}
            plain_able = tuple(m for m in able if not why_no_plain[m])
            for why in sorted({w for w in why_no_plain.values() if w}):
                without = ", ".join(m for m in able if why_no_plain[m] == why)
                point.notes.append(f"no comparison with autodiff ({without}): {why}")
        point.differentiate(able, plain_able)
        found = point.found
        self.leave_out_what_overflows()
        if programs.plain is not None:
            for what in ("value", "value, differentiated"):
                if what in found:
                    self.against_definition(what, found[what])
        for mode in modes:
            if why_not[mode]:
                self.skip(mode, why_not[mode])
                continue
            self.one_mode(mode, able)
            if mode == "reverse":
                self.linearity()
        first = tuple(m for m in able if m in FIRST)
        self.op_by_op(first)
        self.vmapped(first, plain_able)
        self.in_dtypes([d for d in self.options.dtypes if d != "float64"], first, plain_able)

    def one_mode(self, mode: str, able: tuple[str, ...]) -> None:
        """A derivative against autodiff and differences."""
        point = self.point
        before = len(self.rows), len(point.notes), self.compared
        kept = point.left_out[mode].copy(), point.rounding[mode]
        self.compare_mode(mode, able)
        if mode in SECOND and not all(row.ok for row in self.rows[before[0] :]):
            # Is it wrong, or is what it is held against only rough?
            if not point.rough:
                point.look_for_roughness()
            del self.rows[before[0] :], point.notes[before[1] :]
            self.compared = before[2]
            point.left_out[mode], point.rounding[mode] = kept
            self.compare_mode(mode, able)

    def compare_mode(self, mode: str, able: tuple[str, ...]) -> None:
        point = self.point
        found, by_autodiff = point.found, point.by_autodiff
        entries, differences = self.slopes.differences(mode, able)
        if differences is not None:
            self.note_kinks(mode, entries, differences)
        if mode in by_autodiff:
            self.compare(mode, "autodiff", found[mode], by_autodiff[mode], **point.leeway(mode))
        if differences is not None:
            self.against_differences(mode, entries, differences)

    def leave_out_what_overflows(self) -> None:
        """An infinite result has the upstream gradient 0, and 0 · ∞ is nan in most rules."""
        point = self.point
        gradient = np.asarray(point.found.get("reverse", point.x))
        overflows = np.isnan(gradient) & (not point.usable.all())
        if not overflows.any():
            return
        why = "there the gradient is nan, which may be 0 · ∞, as a result is infinite"
        names = point.names["reverse"]
        if "reverse" in point.by_autodiff:
            overflows &= np.isnan(np.asarray(point.by_autodiff["reverse"]))
            if overflows.any():
                left_out = f"{some_are(names, overflows)} left out"
                point.notes.append(f"{left_out}: {why}; so it is by autodiff")
        else:
            why = f"{some_are(names, overflows)} not checked: {why}"
            self.rows.append(Check("gradient", "", "float64", 1, "reverse", ok=False, why=why))
        point.left_out["reverse"] |= overflows

    def nothing_compared(self) -> str:
        point = self.point
        if not point.x.size:
            return "no argument that can move has any entries"
        if not point.moves.any():
            return "all arguments that could move are infinite"
        if not point.value.size:
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
        names = self.point.names[mode] if names is None else names
        tolerance = self.point.precision.exact if tolerance is None else tolerance
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
        point = self.point
        self.compare(
            "forward",
            "definition",
            value,
            point.value,
            what=what,
            order=0,
            absolute=32 * point.noise["value"]
            + 64 * point.precision.eps * point.array_size(point.size),
        )

    # ------------------------------------------------------------ what differences say of the rule

    def note_kinks(self, mode, entries, d: Differences) -> None:
        point = self.point
        point.left_out[mode][entries] |= np.isin(d.state, (KINK, EDGE, UNDEFINED))
        known = np.isfinite(d.rounding) & ~point.left_out[mode][entries]
        point.rounding[mode] = np.array(point.rounding[mode])
        point.rounding[mode][entries] = np.where(known, d.rounding, point.rounding[mode][entries])

    def against_differences(self, mode, entries, d: Differences) -> None:
        point = self.point
        rule = np.asarray(point.found[mode], "float64")[entries]
        names = [point.names[mode][i] for i in entries]
        # Where there is no clear slope, only what is far off is known to be wrong.
        # Rounding is known better than what the steps leave out.
        is_rough = (d.state == UNCLEAR) & (d.rounding < 0.5 * d.error)
        unsure = np.where(is_rough, 10.0, 2.0) * d.error
        if mode == "reverse":
            unsure = unsure + point.cancelling()[entries]
        if mode in SECOND and mode in point.rough:
            unsure = unsure + 4 * np.broadcast_to(point.rough[mode], rule.shape)[entries]
        unknown = ~np.isfinite(d.slope + d.error)
        unclear = unknown & ~point.left_out[mode][entries]
        if unclear.any():
            why = f"{some_are(names, unclear)} not resolved by differences there"
            self.unresolved = self.unresolved or why
            point.notes.append(f"the {WHAT[mode]}: {why}")
        self.compare(
            mode,
            "differences",
            rule,
            np.where(unknown, rule, d.slope),
            names=names,
            skip=point.left_out[mode][entries] | unknown,
            absolute=np.where(unknown, 0.0, unsure),
            zero=point.zero[mode][entries],
            tolerance=point.precision.numerical,
        )
        if mode == "reverse":
            self.at_kinks(entries, rule, d)
            if self.slopes.covering is not None:
                self.rows.append(self.slopes.covering)
                self.compared += 1

    def at_kinks(self, entries, rule, d: Differences) -> None:
        """Between the slopes on its two sides any number is right at a kink.

        At the edge of the domain it must be the slope on the one side; where a slope grows
        without bound, inf is right and so is any finite number that a rule puts in its place.
        """
        point = self.point
        kinks = np.flatnonzero(np.isin(d.state, (KINK, EDGE)))
        if not kinks.size:
            return
        plain = point.by_autodiff.get("reverse")
        around = self.slopes.slopes_around(entries, kinks)
        closest, between = [], []
        for i, others in zip(kinks, around, strict=True):
            sides = [s for s in (d.left[i], d.right[i]) if not np.isnan(s)]
            if d.state[i] == KINK:
                sides += [d.low[i], d.high[i], *others[np.isfinite(others)]]
            low, high = min(sides), max(sides)
            if np.isinf(low) or np.isinf(high):  # a finite number may stand for either
                low, high = min(low, -np.finfo(float).max), max(high, np.finfo(float).max)
            same = plain is not None and rule[i] == np.asarray(plain)[entries[i]]
            closest.append(rule[i] if same else np.clip(rule[i], low, high))
            between.append((min(sides), max(sides)))
        nearest = np.array(closest)
        # What a nan should have been is shown as a number.
        shown = np.where(np.isnan(nearest), [b[0] for b in between], nearest)
        width = np.array([b[1] - b[0] if np.isfinite(b).all() else 0.0 for b in between])
        self.compare(
            "reverse",
            "slopes at kinks",
            rule[kinks],
            shown,
            names=[point.names["reverse"][i] for i in entries[kinks]],
            absolute=1e-3 * width + 2 * np.nan_to_num(d.slack[kinks], posinf=0.0),
            zero=point.zero["reverse"][entries[kinks]],
            tolerance=max(1e-3, point.precision.numerical),
        )
        row = self.rows[-1]
        if not row.ok:
            place = [point.names["reverse"][i] for i in entries[kinks]].index(row.worst)
            self.rows[-1] = row.replace(between=between[place])
        self.name_kinks(entries, kinks)

    def name_kinks(self, entries, kinks) -> None:
        """For the reader, in terms of the sum of the results instead of a random projection."""
        point = self.point
        ones = np.where(point.usable, 1.0, 0.0).astype(point.w.dtype)
        only = np.zeros(len(entries), bool)
        only[kinks] = True
        others = [point.arrays[entries], np.ones(len(entries))]
        tops = schedule(point.own[entries], others, point.precision.eps, 2.0**-51)
        at = self.slopes.by_entry(ones, entries)
        summing = point.x, point.fixed, ones, point.v, point.u
        found, _ = point.programs.derivatives(*summing, **point.options)
        rule = np.asarray(found["reverse"])
        summed = search(at, tops, rule[entries], point.precision, only=only)
        for k in kinks:
            seen = summed if summed.state[k] in (KINK, EDGE) else None
            left, right = (seen.left[k], seen.right[k]) if seen else (summed.slope[k],) * 2
            name = point.names["reverse"][entries[k]]
            self.kinks.append(Kink(name, float(left), float(right), float(rule[entries[k]])))

    # ------------------------------------------------------------ what must hold of a rule besides

    def linearity(self) -> None:
        """Of the backward b in the upstream gradient."""
        point = self.point
        found, skip = point.found, point.left_out["reverse"]
        what, against = "b(w + 30z)", "b(w) + 30 b(z)"
        noise = _finite(np.asarray(found[against]))
        for start, stop in leaf_slices(point.programs.ours):
            noise[start:stop] = noise[start:stop].max(initial=0.0)
        self.compare(
            "reverse",
            against,
            found[what],
            found[against],
            what=what,
            skip=skip,
            absolute=32 * np.maximum(point.noise[what], point.noise[against])
            + 64 * point.precision.eps * noise,
        )
        self.compare(
            "reverse", "zero", found["b(0)"], np.zeros_like(point.x), what="b(0)", skip=skip
        )

    def op_by_op(self, modes) -> None:
        """Without jit around."""
        point = self.point
        at = jnp.asarray(point.x), point.fixed, point.w, point.v
        for mode in modes:
            rule = MODES[mode](point.programs.ours, *at)
            what = f"{WHAT[mode]}, op by op"
            self.compare(mode, "jitted", rule, point.found[mode], what=what, **point.leeway(mode))

    def vmapped(self, modes, plain_modes) -> None:
        """A batch of points nearby, each with its own w and v."""
        point = self.point
        X = point.x * (1 - 1e-3 * np.arange(BATCH)[:, None])
        W = (point.w * point.random.normal(size=(BATCH, 1))).astype(point.w.dtype)
        V = random_moves(point.random, np.broadcast_to(point.own, X.shape)) * point.moves

        def each(names):
            return [f"{name} of example {i}" for i in range(BATCH) for name in names]

        options = {"modes": modes, "plain_modes": tuple(m for m in plain_modes if m in modes)}
        mapped, shared = point.programs.vmapped(X, point.fixed, W, V, **options)
        for mode, (rule, alone) in mapped.items():
            leeway: dict[str, Any] = {
                k: np.tile(n, BATCH) for k, n in point.leeway(mode, 8).items()
            }
            self.compare(
                mode,
                "one by one",
                np.ravel(rule),
                np.ravel(alone),
                what=f"{WHAT[mode]}, vmapped",
                names=each(point.names[mode]),
                **leeway,
            )
        ours = point.programs.ours
        ends = np.cumsum(ours.sizes)
        whole = point.leeway("reverse", 8 * BATCH) if shared else {}
        for argument, (rule, alone) in shared.items():
            names: list[str] = []
            pieces: dict[str, list] = {k: [] for k in whole}
            for part, end, size in zip(ours.arguments, ends, ours.sizes, strict=True):
                here = point.names["reverse"][end - size : end]
                names += here if part == argument else each(here)
                for k, numbers in whole.items():
                    piece = numbers[end - size : end]
                    pieces[k].append(piece if part == argument else np.tile(piece, BATCH))
            leeway = {k: np.concatenate(n) for k, n in pieces.items()}
            self.compare(
                "reverse",
                "one by one",
                rule,
                alone,
                what=f"gradient, vmapped, {short(argument)} shared",
                names=names,
                **leeway,
            )

    # ----------------------------------------------------------------------------- narrower dtypes

    def in_dtypes(self, dtypes, modes, plain_modes) -> None:
        """First derivatives in narrower dtypes, against float64 at the same (rounded) point."""
        point = self.point
        if any(leaf.is_complex for leaf in point.programs.ours.leaves):
            for dtype in dtypes:
                for mode in modes:
                    if dtype != "float32":
                        self.skip(mode, f"JAX has no complex {dtype}", dtype)
            dtypes = [dtype for dtype in dtypes if dtype == "float32"]
        points = {}
        for dtype in dtypes:
            numbers = jnp.finfo(dtype)
            low, high = float(numbers.tiny) ** 0.5, float(numbers.max) ** 0.5
            size = np.clip(np.abs(point.v), low, high) * np.sign(point.v)
            with np.errstate(over="ignore"):
                at = [np.asarray(a).astype(jnp.dtype(dtype)) for a in (point.x, point.u, size)]
            if not np.isfinite(at[0][point.moves].astype("float64")).all():
                for mode in modes:
                    self.skip(mode, f"the arguments are too large for {dtype}", dtype)
                continue
            try:
                jax.jit(point.programs.reference).lower(at[0], point.fixed)
            except Exception as error:  # whatever the definition raises
                why_not = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                for mode in modes:
                    self.skip(mode, why_not, dtype)
                continue
            points[dtype] = at
        options = {"modes": modes, "plain_modes": tuple(m for m in plain_modes if m in modes)}
        found = point.programs.narrow(list(points.values()), point.fixed, **options)
        for dtype, (ours, plain, exact) in zip(points, found, strict=True):
            off = self.value_off(dtype, ours["value"], exact["value"])
            for mode in modes:
                rule, by_autodiff, true = (n.get(mode) for n in (ours, plain, exact))
                self.in_dtype(dtype, mode, rule, by_autodiff, true, off)

    def value_off(self, dtype, value, exact) -> float:
        """How far the value itself is off in this dtype, relative to the largest of its array."""
        value, exact = np.asarray(value, "float64"), np.asarray(exact, "float64")
        usable = np.isfinite(value) & np.isfinite(exact)
        size = self.point.array_size(np.where(usable, np.abs(exact), 0.0))
        size = np.maximum(size, float(jnp.finfo(dtype).tiny))
        off = np.abs(np.where(usable, value, 0.0) - np.where(usable, exact, 0.0))
        return float((off / size).max(initial=0.0))

    def in_dtype(self, dtype, mode, rule, plain, exact, value_off) -> None:
        point = self.point
        rule, exact = np.array(rule, "float64"), np.array(exact, "float64")
        numbers = jnp.finfo(dtype)
        eps = float(numbers.eps)
        # What the arguments' last places do to a derivative, a rounding on the way does as well.
        noise = point.noise[mode] * eps / (4 * point.precision.eps)
        # Terms of the size of the function cancel in a smaller derivative.
        if mode in BY_RESULT:
            size = np.maximum(point.array_size(point.size), point.array_size(_finite(exact)))
            noise = point.array_size(noise)
        else:
            u = np.abs(point.u.astype("float64"))
            size = np.linalg.norm(u * point.size) / point.arrays
            for start, stop in leaf_slices(point.programs.ours):
                largest = _finite(exact[start:stop]).max(initial=0.0)
                size[start:stop] = np.maximum(size[start:stop], largest)
                noise[start:stop] = noise[start:stop].max(initial=0.0)
        # Not where the true number is too large for the dtype.
        skip = point.left_out[mode] | ~(np.abs(exact) < float(numbers.max))
        # No more can be asked of a derivative than of the value.
        tolerance = max(64 * eps, point.precision.exact, 8 * value_off)
        if plain is None:
            # A function of many operations rounds more often than one of them.
            tolerance = max(tolerance, min(512 * eps, 0.05))
        else:
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
            absolute=16 * float(numbers.tiny) + 8 * noise,
        )


def _finite(numbers) -> np.ndarray:
    return np.where(np.isfinite(numbers), np.abs(numbers), 0.0)
