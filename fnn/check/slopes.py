"""The numerical slopes of a function at a point: of single entries, and along directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fnn.check.differences import SHRINK, SMOOTH, UNCLEAR, Block, Differences, schedule, search
from fnn.check.directions import leaf_slices, power_of_two, random_moves
from fnn.check.point import Point
from fnn.check.report import Check, short


class Slopes:
    """Differences of f at a point, and of our first derivative of f for the second derivatives.

    covering: the comparison of the gradient with differences along random directions, if there
        were too many entries to take each one's difference.
    """

    def __init__(self, point: Point, max_entries: int):
        self.point, self.max_entries = point, max_entries
        self.covering: Check | None = None
        self.close_kinks = False
        self.blocks: dict = {}
        self.looked_nearby = False
        self.place_nearby: tuple[np.ndarray, np.ndarray] | None = None

    def differences(self, mode, able) -> tuple[np.ndarray, Differences | None]:
        """Of f for a first derivative, of our own first derivative for a second."""
        point = self.point
        rule = np.asarray(point.found[mode], "float64")
        if mode == "reverse":
            entries = self.sample(rule)
            at = self.by_entry(point.w, entries)
            others = [point.arrays[entries], np.ones(len(entries))]
            tops = schedule(point.own[entries], others, point.precision.eps, 2.0**-51)
            total = float(np.sum(np.abs(point.w) * self.far_rounding("value")))
            doubt = np.full(len(entries), total)
            found = search(at, tops, rule[entries], point.precision, doubt=doubt)
            self.close_kinks = bool((found.kink_step < 2.0**-20 * point.own[entries]).any())
            return entries, found
        of = {"forward": "value", "forward over forward": "forward"}.get(mode, "reverse")
        entries = np.arange(len(point.names[mode]))
        if of != "value" and of not in able:
            return entries, None
        at = self.along(of, point.v, point.noise.get(of, 0.0))
        # v moves arguments by their own sizes; these moves are of size 1.
        sizes = np.unique(point.own[point.moves])
        ones = [np.full(len(entries), 1 / size) for size in (*sizes[:1], *sizes[1:][-1:])]
        tops = schedule(np.ones(len(entries)), ones, point.precision.eps, 2.0**-36)
        doubt = self.far_rounding(of)
        found = search(at, tops, rule, point.precision, doubt=doubt)
        if self.close_kinks:
            # Steps along v are too large to see them, and what they see instead says nothing.
            with np.errstate(all="ignore"):
                off = np.abs(found.slope - rule) > 2 * found.error
            found.slope[off], found.error[off], found.state[off] = np.nan, np.inf, UNCLEAR
        return entries, found

    def by_entry(self, w, entries, x=None) -> Callable:
        """Blocks of differences of wᵀf, as single entries of x move."""
        point = self.point
        x = point.x if x is None else x
        spacing = np.spacing(np.abs(x[entries]))
        largest = np.zeros(len(entries))  # of what any step changed

        def at(tops, todo):
            order = np.argsort(~todo, kind="stable")
            steps = tops[:, None] * SHRINK
            count = int(todo.sum())
            arguments = x, point.fixed, w, entries[order], steps[order], count
            rows, sizes = (np.asarray(a) for a in point.programs.by_entry(*arguments))
            table, size = np.empty_like(rows), np.empty_like(sizes)
            table[order], size[order] = rows, sizes
            # A step that is lost in the argument's last place says nothing.
            table[steps < 2 * spacing[:, None]] = np.nan
            np.maximum(largest, np.where(todo, size, 0.0), out=largest)
            return Block(steps, *np.moveaxis(table, 2, 0), 2 * point.precision.eps * largest)

        return at

    def far_rounding(self, of) -> np.ndarray:
        """The rounding of f, or of our derivative, where arguments are moved by 1; by result."""
        point = self.point
        sizes: Any = 0.0
        for sign in (-1.0, 1.0):
            x = point.x + sign * point.moves
            middle = np.abs(point.changes_along(of, point.v, 2.0**-4, x)[1]).astype("float64")
            sizes = np.fmax(sizes, np.where(np.isfinite(middle), middle, 0.0))
        return 2 * point.precision.eps * sizes

    def along(self, of, v, noise) -> Callable:
        """Blocks of differences of f, or of our derivative, in direction v; by result."""
        point = self.point
        ever_moved = np.array(False)

        def at(tops, todo):
            nonlocal ever_moved
            top = float(tops[todo][0])
            if (of, top) not in self.blocks:
                self.blocks[of, top] = point.changes_along(of, v, top)
            changes, middle = self.blocks[of, top]
            plus, minus = changes[:, 0].T, changes[:, 1].T
            steps = np.broadcast_to(top * SHRINK, plus.shape)
            # Smaller moves are lost in the last places of the arguments.
            plus, minus = (np.where(steps < 2.0**-36, np.nan, c) for c in (plus, minus))
            with np.errstate(all="ignore"):
                sides = plus / steps, -minus / steps
                size = np.abs(np.where(np.isfinite(middle), middle, 0.0)).astype("float64")
            ever_moved = ever_moved | (changes != 0).any(axis=(0, 1))
            off = 2 * point.precision.eps * size + (noise if of != "value" else 0.0)
            if of == "value":
                off = off + 2 * point.precision.eps * point.rate
            return Block(
                steps, plus, minus, np.minimum(*sides), np.maximum(*sides), off * ever_moved
            )

        return at

    def sample(self, rule) -> np.ndarray:
        """The entries whose differences to take: all, or some and the most suspicious."""
        point = self.point
        able = np.flatnonzero(point.moves)
        if able.size <= self.max_entries:
            return able
        suspicious = [np.array(self.cover(rule), int), np.flatnonzero(~np.isfinite(rule))]
        if "reverse" in point.by_autodiff:
            plain = np.asarray(point.by_autodiff["reverse"])
            with np.errstate(all="ignore"):
                off = np.abs(rule - plain) / np.maximum(np.abs(rule), np.abs(plain))
            off = np.nan_to_num(off, nan=0.0)
            worst = np.argsort(off)[::-1][: max(1, self.max_entries // 4)]
            suspicious.append(worst[off[worst] > 0])
        first = np.concatenate(suspicious)
        first = first[point.moves[first]]
        _, order = np.unique(first, return_index=True)
        first = first[np.sort(order)]
        others = point.random.permutation(able)
        chosen = np.concatenate([first, others[~np.isin(others, first)]])[: self.max_entries]
        by_autodiff = ", and by autodiff" if point.by_autodiff else ""
        point.notes.append(
            f"differences of single entries: at {self.max_entries} of {able.size} entries, chosen "
            f"at random; along random directions{by_autodiff}: at all"
        )
        return np.sort(chosen)

    def cover(self, gradient) -> list[int]:
        """Differences along random directions, which move every entry of every array.

        The difference of wᵀf along v must be the gradient times v. In a second direction those
        entries move less that would drown the others. Where the two numbers disagree, halving
        the direction again and again finds an entry that is wrong.
        """
        point = self.point
        place, suspects = (point.x, np.asarray(gradient)), []
        worst: tuple | None = None
        rough: list[str] = []
        leaves = zip(point.programs.ours.moving, leaf_slices(point.programs.ours), strict=True)
        for leaf, (start, stop) in leaves:
            for equal in (False, True):
                v = np.zeros_like(point.x)
                v[start:stop] = point.v[start:stop]
                share = self.share(place, v)
                known = np.abs(share[share != 0])
                if equal:
                    if not known.size:
                        continue
                    low = np.quantile(known, 0.1)
                    with np.errstate(all="ignore"):
                        less = np.where(share != 0, np.minimum(1.0, low / np.abs(share)), 1.0)
                    v *= power_of_two(np.where(less > 0, less, 1.0))
                here, seen = place, self.along_all(place, v)
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
                    name = point.names["reverse"][entry]
                if worst is None or error > worst[0]:
                    worst = error, name, rule, slope, off <= allowed
        if rough:
            point.notes.append(
                "along random directions, differences are too rough to show a single wrong entry "
                f"of {', '.join(short(p) for p in rough[:3])}"
                + (f" and {len(rough) - 3} more arrays" if len(rough) > 3 else "")
            )
        if worst is not None:
            error, name, rule, slope, ok = worst
            numbers = error, name if error else "", rule, slope
            what = "gradient times v"
            self.covering = Check(what, "differences", "float64", 1, "reverse", *numbers, ok=ok)
        return suspects

    def share(self, place, v) -> np.ndarray:
        """Each entry's part of the gradient times v."""
        with np.errstate(all="ignore"):
            share = place[1] * v
        return np.where(np.isfinite(share), share, 0.0)

    def along_all(self, place, v, quick: bool = False):
        """How far the gradient times v is off the difference along v, or None if that is rough.

        Returns the distance, what it may be, the two numbers, and the largest entry's part.
        """
        point = self.point
        x, gradient = place
        v = np.where(np.isfinite(gradient), v, 0.0)
        share = self.share(place, v)
        known = np.abs(share[share != 0])
        typical = float(np.median(known)) if known.size else 0.0
        rule = math.fsum(share)
        eps, w = point.precision.eps, point.w.astype("float64")

        def at(tops, todo):
            changes, middle = point.changes_along("value", v, float(tops[0]), x)
            with np.errstate(all="ignore"):
                plus, minus = (changes @ w).T[:, None]
                steps = np.broadcast_to(tops[0] * SHRINK, plus.shape)
                size = np.where(np.isfinite(middle), middle, 0.0).astype("float64")
            moved = (changes != 0).any(axis=(0, 1))
            off = 2 * eps * np.linalg.norm(w * size * moved) + 4 * eps * np.linalg.norm(share)
            return Block(steps, plus, minus, plus / steps, plus / steps, np.array([off]))

        limit = np.array([1e-4 * typical + 16 * eps * np.linalg.norm(share)])
        tops = schedule(np.ones(1), [], eps, 2.0**-36)
        if quick:
            tops = tops[0][:2] + tops[1][:2], []
        d = search(at, tops, np.array([rule]), point.precision, limit, believe=quick)
        error = float(d.error[0])
        largest = float(known.max(initial=0.0))
        if d.state[0] not in (SMOOTH, UNCLEAR) or not np.isfinite(error):
            return None
        allowed = 4 * error + point.precision.numerical * typical
        if not known.size:
            allowed += self.zero_along(v)
        off = abs(rule - float(d.slope[0]))
        if typical and off <= allowed and error > 0.2 * typical:
            return None
        return off, allowed, rule, float(d.slope[0]), largest

    def zero_along(self, v) -> float:
        return float(np.linalg.norm(self.point.zero["reverse"] * v))

    def nearby(self):
        """A point next to x, off the kinks that x may lie on, and the gradient there."""
        point = self.point
        if not self.looked_nearby:
            self.looked_nearby = True
            x = point.x + 2.0**-7 * random_moves(point.random, point.own) * point.moves
            found, _ = point.programs.derivatives(
                x, point.fixed, point.w, point.v, point.u, **point.options
            )
            if np.isfinite(np.asarray(found["value"])[point.usable]).all():
                self.place_nearby = x, np.asarray(found["reverse"])
        return self.place_nearby

    def halve(self, place, v, start, stop) -> int:
        """An entry at which the gradient is wrong, given that one of start:stop is."""
        while stop - start > 1:
            middle = (start + stop) // 2
            part = np.zeros_like(v)
            part[start:middle] = v[start:middle]
            seen = self.along_all(place, part, quick=True)
            if seen is not None and seen[0] > seen[1]:
                stop = middle
            else:
                start = middle
        return start

    def slopes_around(self, entries, kinks) -> np.ndarray:
        """The slopes at points next to x, (kinks, points): where ties are broken, say.

        They are what a kink's one slope is chosen from, too, where several pieces meet in it.
        """
        point = self.point
        found = []
        todo = np.zeros(len(entries), bool)
        todo[kinks] = True
        for _ in range(6):
            x = point.x + 2.0**-18 * random_moves(point.random, point.own) * point.moves
            block = self.by_entry(point.w, entries, x)(point.own[entries] * 2.0**-22, todo)
            with np.errstate(all="ignore"):
                found.append(((block.plus - block.minus) / (2 * block.steps))[kinks, 2])
        return np.transpose(found)
