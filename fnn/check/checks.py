"""All checks of one function at one point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.check.derivatives import _FIRST, _MODES, _SECOND, _WHAT, BATCH, Programs
from fnn.check.differences import COARSE, FINE, Differences, differences, slopes, unit
from fnn.check.directions import Leaf, as_vector, entry_names
from fnn.check.report import Check, Kink, Report


class Inspection:
    """All checks of one function at one point; each method below `report` adds rows to it."""

    def __init__(self, programs: Programs, name: str, arrays, seed: int, max_entries: int):
        self.programs, self.name, self.max_entries = programs, name, max_entries
        self.random = np.random.default_rng(seed)
        self.x, self.fixed = as_vector(programs.ours, arrays)
        self.value = np.asarray(programs.value(self.x, self.fixed))
        w = self.random.normal(size=self.value.shape)
        w = np.where(np.isfinite(self.value.astype("float64")), w, 0.0)
        self.w = w.astype(self.value.dtype)
        self.v = self.random.normal(size=self.x.shape)
        self.rows: list[Check] = []
        self.kinks: list[Kink] = []
        self.notes: list[str] = []
        self.precision = FINE
        if self.value.dtype != np.float64:
            self.precision = COARSE
            self.notes.append(
                f"{name} computes in {self.value.dtype} on float64 arguments: tolerances are wide"
            )
        inputs, outputs = programs.ours.input_names(), _output_names(programs, self.x, self.fixed)
        by_result = ("forward", "forward over forward")
        self.names = {m: outputs if m in by_result else inputs for m in _MODES}
        self.kinked = {m: np.zeros(len(self.names[m]), bool) for m in _MODES}
        self.along: dict[str, Differences] = {}

    @property
    def at(self):
        return self.x, self.fixed, self.w, self.v

    def report(self, dtypes: Sequence[str], order: int) -> Report:
        modes = [*_FIRST, *(_SECOND if order > 1 else ())]
        why_not = {m: self.programs.unavailable(m, *self.at) for m in modes}
        able = tuple(m for m in modes if not why_not[m])
        found, plain = self.programs.derivatives(*self.at, modes=able)
        if self.programs.plain is not None:
            for what in ("value", "value, differentiated"):
                if what in found:
                    self.compare(
                        "forward", "definition", found[what], self.value, what=what, order=0
                    )
        for mode in modes:
            if why_not[mode]:
                self.skip(mode, why_not[mode])
                continue
            differences = self.differences(mode, able, found, plain)
            if differences is not None:
                self.kinked[mode][differences.entries] = ~differences.smooth
            if mode in plain:
                skip = self.kinked[mode]
                self.compare(mode, "autodiff", found[mode], plain[mode], skip=skip)
            if differences is not None:
                self.against_differences(mode, np.asarray(found[mode]), differences)
            if mode == "reverse":
                self.linearity(found)
        first = tuple(m for m in able if m in _FIRST)
        self.op_by_op(first, found)
        self.vmapped(first)
        self.in_dtypes([dtype for dtype in dtypes if dtype != "float64"], first)
        return Report(self.name, tuple(self.rows), tuple(self.kinks), tuple(self.notes))

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
        uncertainty: Any = 0.0,
        tolerance: float | None = None,
        floor: tuple[float, float] = (1e-4, 1e-8),
    ) -> None:
        """Compare all entries but those to `skip`.

        The relative error's denominator is at least floor[0] times the largest entry, plus
        floor[1]: nothing can be asked of an entry that is small because large terms cancel in
        it.
        """
        rule, reference = np.array(rule, "float64"), np.array(reference, "float64")
        names = self.names[mode] if names is None else names
        tolerance = self.precision.exact if tolerance is None else tolerance
        skip = np.broadcast_to(skip, rule.shape)
        same = (rule == reference) | (np.isnan(rule) & np.isnan(reference))
        largest = np.abs(reference[np.isfinite(reference)]).max(initial=0.0)
        with np.errstate(invalid="ignore", over="ignore"):
            size = np.maximum(np.abs(rule), np.abs(reference))
            size = np.maximum(size, floor[0] * largest + floor[1])
            error = np.abs(rule - reference) / size
            allowed = tolerance + uncertainty / size
        error = np.where(same, 0.0, np.nan_to_num(error, nan=np.inf))
        wrong = ~(error <= allowed) & ~skip
        error = np.where(skip | (wrong.any() & ~wrong), 0.0, error)
        worst = int(np.argmax(error)) if error.size else None
        self.rows.append(
            Check(
                what or _WHAT[mode],
                against,
                dtype,
                1 + (mode in _SECOND) if order is None else order,
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
        order = 1 + (mode in _SECOND)
        self.rows.append(Check(_WHAT[mode], "", dtype, order, mode, skipped=why))

    def differences(self, mode, able, found, plain) -> Differences | None:
        """Of f for a first derivative, of our own first derivative for a second."""
        x, fixed, w, v = self.at
        eps = float(jnp.finfo(self.value.dtype).eps)
        largest = float(np.abs(x).max(initial=1.0))
        if mode == "reverse":
            sample = self.sample(np.asarray(found[mode]), plain.get(mode))
            changes, inside = self.by_entry(w, sample), min(largest, 1e3)
            return differences(changes, sample, self.precision, eps, inside, unit(x[sample]))
        of = {"forward": "value", "forward over forward": "forward"}.get(mode, "reverse")
        if of != "value" and of not in able:
            return None
        if of not in self.along:
            self.along[of] = differences(
                lambda step: self.programs.along(x, fixed, w, v, step, of=of),
                np.arange(len(self.names[mode])),
                self.precision,
                eps,
                largest,
            )
        return self.along[of]

    def by_entry(self, w, entries) -> Callable:
        def at_step(step):
            changes, size = self.programs.by_entry(self.x, self.fixed, w, entries, step)
            return np.asarray(changes).T, size

        return at_step

    def sample(self, rule, plain) -> np.ndarray:
        """The entries whose differences to take: all, or some and the most suspicious."""
        if rule.size <= self.max_entries:
            return np.arange(rule.size)
        chosen = self.random.permutation(rule.size)
        if plain is not None:
            off = np.nan_to_num(np.abs(rule - np.asarray(plain)), nan=np.inf)
            suspicious = np.argsort(off)[::-1][: self.max_entries // 4]
            chosen = np.concatenate([suspicious, chosen[~np.isin(chosen, suspicious)]])
        self.notes.append(
            f"differences by single entries: at {self.max_entries} of {rule.size} entries, chosen "
            "at random; differences in a direction, and autodiff: at all"
        )
        return np.sort(chosen[: self.max_entries])

    def against_differences(self, mode, rule, d: Differences) -> None:
        rule = rule[d.entries]
        names = [self.names[mode][i] for i in d.entries]
        self.compare(
            mode,
            "differences",
            rule,
            d.slope,
            names=names,
            skip=~d.smooth,
            uncertainty=2 * d.error,
            tolerance=self.precision.numerical,
        )
        if mode != "reverse" or d.smooth.all():
            return
        # At a kink, any number from the one slope to the other is right.
        low, high = np.minimum(d.left, d.right), np.maximum(d.left, d.right)
        kinks = np.flatnonzero(~d.smooth & np.isfinite(low + high))
        self.compare(
            mode,
            "slopes at kinks",
            rule[kinks],
            np.clip(rule, low, high)[kinks],
            names=[names[i] for i in kinks],
            tolerance=1e-3,
        )
        self.name_kinks(d.entries[~d.smooth])

    def name_kinks(self, entries) -> None:
        """For the reader, in terms of the sum of the results instead of a random projection."""
        ones, step = np.ones_like(self.w), self.precision.steps[-1]
        changes, size = self.by_entry(ones, entries)(step)
        *_, left, right = slopes(changes, np.asarray(size), step, 0.0) / unit(self.x[entries])
        at = (self.x, self.fixed, ones, self.v)
        rule = self.programs.derivatives(*at, modes=("reverse",))[0]["reverse"]
        for i, a, b in zip(entries, left, right, strict=True):
            place = self.names["reverse"][i]
            self.kinks.append(Kink(place, float(a), float(b), float(rule[i])))

    def linearity(self, found) -> None:
        """Of the backward b in the upstream gradient."""
        for what, against in (("b(w + 30z)", "b(w) + 30 b(z)"), ("b(0)", "zero")):
            reference = found.get(against, np.zeros_like(self.x))
            skip = self.kinked["reverse"]
            self.compare("reverse", against, found[what], reference, what=what, skip=skip)

    def op_by_op(self, modes, found) -> None:
        """Without jit around."""
        for mode in modes:
            rule = _MODES[mode](self.programs.ours, jnp.asarray(self.x), *self.at[1:])
            what, skip = f"{_WHAT[mode]}, op by op", self.kinked[mode]
            self.compare(mode, "jitted", rule, found[mode], what=what, skip=skip)

    def vmapped(self, modes) -> None:
        """A batch of points nearby, each with its own w and v."""
        X = self.x * (1 - 1e-3 * np.arange(BATCH)[:, None])
        W = (self.w * self.random.normal(size=(BATCH, 1))).astype(self.w.dtype)
        V = self.random.normal(size=X.shape)

        def each(names):
            return [f"{name} of example {i}" for i in range(BATCH) for name in names]

        mapped, shared = self.programs.vmapped(X, self.fixed, W, V, modes=modes)
        for mode, (rule, alone) in mapped.items():
            self.compare(
                mode,
                "one by one",
                np.ravel(rule),
                np.ravel(alone),
                what=f"{_WHAT[mode]}, vmapped",
                names=each(self.names[mode]),
                skip=np.tile(self.kinked[mode], BATCH),
            )
        ends = np.cumsum(self.programs.ours.sizes)
        for argument, (rule, alone) in shared.items():
            names: list[str] = []
            skip = []
            for part, end, size in zip(
                self.programs.ours.arguments, ends, self.programs.ours.sizes, strict=True
            ):
                here = self.names["reverse"][end - size : end]
                kinked = self.kinked["reverse"][end - size : end]
                names += here if part == argument else each(here)
                skip.append(kinked if part == argument else np.tile(kinked, BATCH))
            self.compare(
                "reverse",
                "one by one",
                rule,
                alone,
                what=f"gradient, vmapped, {argument} shared",
                names=names,
                skip=np.concatenate(skip),
            )

    def in_dtypes(self, dtypes, modes) -> None:
        """First derivatives in narrower dtypes, against float64 at the same (rounded) point."""
        if any(leaf.is_complex for leaf in self.programs.ours.leaves):
            for dtype in dtypes:
                for mode in modes:
                    if dtype != "float32":
                        self.skip(mode, f"JAX has no complex {dtype}", dtype)
            dtypes = [dtype for dtype in dtypes if dtype == "float32"]
        points = {
            dtype: [np.asarray(a).astype(jnp.dtype(dtype)) for a in (self.x, self.w, self.v)]
            for dtype in dtypes
        }
        for dtype, (x, *_) in list(points.items()):
            try:
                jax.jit(self.programs.reference).lower(x, self.fixed)
            except Exception as error:  # whatever the definition raises
                why_not = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                for mode in modes:
                    self.skip(mode, why_not, dtype)
                del points[dtype]
        found = self.programs.narrow(list(points.values()), self.fixed, modes=modes)
        for dtype, numbers in zip(points, found, strict=True):
            for mode in modes:
                rule, plain, exact = (np.array(n[mode], "float64") for n in numbers)
                self.in_dtype(dtype, mode, rule, plain, exact)

    def in_dtype(self, dtype, mode, rule, plain, exact) -> None:
        # w and v are about 1, and so are the terms that cancel in a smaller number.
        floor = (1.0, 0.1)
        # Not where the true number is too large for the dtype.
        skip = self.kinked[mode] | ~(np.abs(exact) < float(jnp.finfo(dtype).max))
        tolerance = max(64 * float(jnp.finfo(dtype).eps), self.precision.exact)
        if self.programs.plain is not None:
            # No more can be asked than of autodiff in this dtype.
            skip |= ~np.isfinite(plain)
            off = np.abs(plain - exact)[~skip].max(initial=0.0)
            size = np.abs(exact)[~skip].max(initial=0.0) + floor[1]
            tolerance = max(tolerance, 8 * float(off / size))
        options = {"dtype": dtype, "skip": skip, "tolerance": tolerance, "floor": floor}
        self.compare(mode, "float64", rule, exact, **options)


def _output_names(programs, x, fixed) -> list[str]:
    parts = programs.ours.split(jnp.asarray(x))
    result = jax.eval_shape(programs.reference.value, parts, fixed)
    names = []
    for path, y in jax.tree_util.tree_flatten_with_path(result)[0]:
        if jax.dtypes.issubdtype(y.dtype, jnp.inexact):
            is_complex = bool(jnp.issubdtype(y.dtype, jnp.complexfloating))
            label = "result" + jax.tree_util.keystr(path)
            names += entry_names(label, Leaf(label, label, tuple(y.shape), True, is_complex, None))
    return names
