"""Derivatives by finite differences, with steps that fit the function.

No step is right for every function: x = 1e-12 and x = 1e12 need different ones, and so do sin(x)
and sin(1e9 x) at the same x. So differences are taken with blocks of six steps, each step a
quarter of the one before. Within a block, Ridders' method (Ridders, "Accurate computation of
F′(x) and F′(x)F″(x)", 1982; Numerical Recipes, section 5.7) extrapolates to the step 0, and
estimates how far the result may be off; blocks with larger and smaller steps follow until the
slope is known well enough. All is relative: to an entry's own size, and to the function's.

The same blocks tell where there is no slope. Where the function is smooth, the slope on the
right less that on the left goes to 0 with the step; at a kink it doesn't, and at the edge of
the domain there is only one of the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

STEPS = 6
FACTOR = 4.0
SHRINK = FACTOR ** -np.arange(STEPS)  # a block's steps, as shares of the largest

SMOOTH, UNCLEAR, KINK, EDGE, UNDEFINED = range(5)


@dataclasses.dataclass(frozen=True)
class Precision:
    """What to ask of a function that computes with numbers of this relative spacing.

    eps: the spacing, of the coarsest numbers between the arguments and the result.
    """

    eps: float

    @property
    def exact(self) -> float:
        """The tolerance where two programs compute the same: 1e-7 in float64, 8e-4 in float32."""
        return self.eps**0.447

    @property
    def numerical(self) -> float:
        """The tolerance against differences, on top of their own error: 2e-6 in float64."""
        return self.eps**0.36


class Block(NamedTuple):
    """Changes f(x ± h) − f(x) of n numbers, at STEPS steps h: arrays of shape (n, STEPS).

    low, high: if f is a sum, the sums of its terms' smaller and larger one-sided slopes.
    noise: (n,) how far a change may be off by rounding.
    """

    steps: np.ndarray
    plus: np.ndarray
    minus: np.ndarray
    low: np.ndarray
    high: np.ndarray
    noise: np.ndarray


@dataclasses.dataclass
class Differences:
    """The numerical slopes of n numbers.

    state: SMOOTH, UNCLEAR (there may be a slope, but rounding or a kink nearby hides it), KINK,
        EDGE (it is steep without bound, or defined on one side only) or UNDEFINED.
    slope, error: the slope and how far it may be off; (nan, inf) where nothing is known.
    rounding: the part of the error that is due to rounding.
    left, right: the one-sided slopes; inf where they grow without bound, nan where f is undefined.
    low, high: what lies between them.
    slack: how far the one-sided slopes may be off.
    kink_step: the smallest step at which a kink was seen, where larger ones see a slope.
    """

    state: np.ndarray
    slope: np.ndarray
    error: np.ndarray
    rounding: np.ndarray
    left: np.ndarray
    right: np.ndarray
    low: np.ndarray
    high: np.ndarray
    slack: np.ndarray
    kink_step: np.ndarray

    @staticmethod
    def unknown(n: int) -> Differences:
        full = lambda value: np.full(n, value)
        return Differences(
            state=full(UNCLEAR),
            slope=full(np.nan),
            error=full(np.inf),
            rounding=full(np.inf),
            left=full(np.nan),
            right=full(np.nan),
            low=full(np.nan),
            high=full(np.nan),
            slack=full(0.0),
            kink_step=full(np.inf),
        )


class _Tried(NamedTuple):
    """What one block says."""

    slope: np.ndarray
    error: np.ndarray
    rounding: np.ndarray
    is_smooth: np.ndarray
    is_zero: np.ndarray
    is_kink: np.ndarray
    left: np.ndarray
    right: np.ndarray
    grows_left: np.ndarray
    grows_right: np.ndarray
    low: np.ndarray
    high: np.ndarray
    slack: np.ndarray


class _Finest(NamedTuple):
    """The one-sided slopes from the smallest steps so far, and what rounding does to them.

    Steps over many waves of a function may look like a kink; smaller ones see other slopes.
    """

    step: np.ndarray
    left: np.ndarray
    right: np.ndarray
    off: np.ndarray

    @np.errstate(all="ignore")
    def and_of(self, block: Block, b: _Tried, where: np.ndarray) -> _Finest:
        step = block.steps[:, -1]
        is_finer = where & (step < self.step) & np.isfinite(b.left + b.right)
        new = step, b.left, b.right, 64 * block.noise / step
        return _Finest(*(np.where(is_finer, n, o) for n, o in zip(new, self, strict=True)))

    @np.errstate(all="ignore")
    def contradicts(self, found: Differences, step: np.ndarray) -> np.ndarray:
        """Do these slopes differ from those of a kink that larger steps saw?"""
        off = 0.25 * np.abs(found.right - found.left) + found.slack + self.off
        other = np.fmax(np.abs(self.left - found.left), np.abs(self.right - found.right)) > off
        return (self.step < step) & np.isfinite(step) & other


@np.errstate(all="ignore")
def _try(block: Block, precision: Precision, rule: np.ndarray) -> _Tried:
    h, noise = block.steps, block.noise[:, None] / block.steps
    right, left = block.plus / h, -block.minus / h
    # Changes that vanish only at the smaller steps are rounding, or another side of a kink.
    is_none = (block.plus == 0) & (block.minus == 0)
    is_zero = is_none.all(axis=1)
    hide = np.where(is_none & ~is_zero[:, None], np.nan, 0.0)
    jumps = [_jump(changes, block.noise) for changes in (block.plus, block.minus)]
    is_jump = (jumps[0] != 0) | (jumps[1] != 0)
    central, bend = (right + left) / 2 + hide, right - left + hide
    # What rounding does shows as slopes that differ in proportion to 1 / h.
    seen = np.abs(np.diff(central, axis=1)) * h[:, 1:]
    seen = np.nan_to_num(seen[:, -2:], nan=0.0, posinf=0.0).max(axis=1, initial=0.0)
    noise = np.maximum(noise, seen[:, None] / h)
    slope, error, rounding = _extrapolate(central, noise, (2, 4, 6))
    gap, gap_error, _ = _extrapolate(bend, 2 * noise, (1, 3))
    size = np.maximum(np.abs(slope), np.where(np.isfinite(rule), np.abs(rule), 0.0))
    tolerance = precision.numerical
    is_smooth = np.isfinite(slope) & (np.abs(gap) <= 4 * gap_error + tolerance * size)
    # Steps over many of a function's waves give slopes near 0, and smaller steps disagree by far
    # more than rounding explains.
    place = np.arange(len(h)), _last_finite(central)
    first = np.nan_to_num(np.abs(central[:, 0]), nan=0.0, posinf=0.0)
    known = 0.1 * np.maximum(np.abs(slope), first) + 64 * block.noise / h[place]
    is_smooth &= np.abs(central[place] - slope) <= known
    widest = np.nanmax(np.where(np.isfinite(bend), np.abs(bend), 0.0), axis=1)
    is_smooth &= np.abs(bend[place]) <= 2 * known + 0.25 * widest
    # The slopes beyond a jump are those of the piece that lies there.
    right, left = right - jumps[0][:, None] / h, left + jumps[1][:, None] / h
    noise = np.where(is_jump[:, None], block.noise[:, None] / h, noise)
    l, l_error, _ = _extrapolate(left + hide, noise, (1, 2))
    r, r_error, _ = _extrapolate(right + hide, noise, (1, 2))
    apart = np.abs(r - l)
    larger = np.nanmax(
        np.where(np.isfinite(right - left), np.fmax(abs(left), abs(right)), 0), axis=1
    )
    is_kink = (apart > 4 * (l_error + r_error) + tolerance * larger) & np.isfinite(apart)
    last = np.arange(len(h)), _last_finite(right + left)
    return _Tried(
        np.where(is_zero, 0.0, slope),
        np.where(is_zero, 2 * noise[:, 0], error),
        np.where(is_zero, 2 * noise[:, 0], rounding),
        (is_smooth & ~is_jump) | is_zero,
        is_zero,
        (is_kink | is_jump) & ~is_zero,
        np.where(np.isfinite(l), l, left[:, -1]),
        np.where(np.isfinite(r), r, right[:, -1]),
        _grows(left),
        _grows(right),
        np.where(is_jump, np.fmin(l, r), block.low[last]),
        np.where(is_jump, np.fmax(l, r), block.high[last]),
        np.fmax(np.abs(left[:, -1] - left[:, -2]), np.abs(right[:, -1] - right[:, -2])),
    )


def _extrapolate(values, noise, powers):
    """Ridders: values at the steps h, their error a series in h to these powers, taken to h = 0."""
    n = len(values)
    best, error, rounding = (np.full(n, fill) for fill in (np.nan, np.inf, np.inf))
    column, places = values, np.arange(values.shape[1])
    previous = None
    for power in (None, *powers):
        if power is None:
            found, off = column[:, 1:], np.abs(np.diff(column, axis=1))
            at = places[1:]
        else:
            weight = FACTOR**power
            found = (weight * previous[:, 1:] - previous[:, :-1]) / (weight - 1)
            off = np.maximum(np.abs(found - previous[:, 1:]), np.abs(found - previous[:, :-1]))
            at = places[len(places) - found.shape[1] :]
        round_off = 2 * noise[:, at]
        total = np.nan_to_num(off + round_off, nan=np.inf)
        place = np.argmin(total, axis=1)
        pick = np.arange(n), place
        better = total[pick] < error
        best = np.where(better, found[pick], best)
        rounding = np.where(better, round_off[pick], rounding)
        error = np.where(better, total[pick], error)
        previous = column if power is None else found
    return best, error, rounding


def _jump(changes, noise) -> np.ndarray:
    """How far the function jumps at the step 0; 0 if it doesn't."""
    before, last = changes[:, -2], changes[:, -1]
    jump = (FACTOR * last - before) / (FACTOR - 1)
    near = np.abs(np.diff(changes[:, -3:], axis=1)).max(axis=1) < 0.1 * np.abs(jump)
    return np.where(near & (np.abs(jump) > 64 * noise), jump, 0.0)


def _last_finite(values) -> np.ndarray:
    finite = np.isfinite(values)
    last = values.shape[1] - 1 - np.argmax(finite[:, ::-1], axis=1)
    return np.where(finite.any(axis=1), last, values.shape[1] - 1)


def _grows(slopes) -> np.ndarray:
    """Do the one-sided slopes grow without bound as the step shrinks?"""
    size = np.abs(slopes)
    ratio = size[:, 1:] / size[:, :-1]
    last = ratio[:, -3:]  # 4 is a jump
    return ((last > 1.1) & (last < 3.5)).all(axis=1) & (np.abs(np.diff(last)) < 0.2).all(axis=1)


def schedule(
    own: np.ndarray, others: Sequence[np.ndarray], eps: float, least: float
) -> tuple[list, list]:
    """The largest steps of the blocks to try: those that must be, and those that may help.

    own: (n,) each number's own scale, a power of two.
    others: further scales that the function may have.
    least: relative to `own`, the smallest step that isn't lost in a number's last place.
    """
    smallest = own * least * FACTOR ** (STEPS - 1)

    def top(scale, power):
        return np.maximum(scale * max(2.0**power, min(eps * 2.0**14, 0.5)), smallest)

    first = [top(own, -4), top(own, -14)]
    exact = eps < 1e-10
    if exact:
        first.append(top(own, 6))
    more = [top(own, -24), top(own, -34)]
    for other in others:
        apart = np.abs(np.log2(other) - np.log2(own)) > 10
        if apart.any():
            first.append(np.where(apart, top(other, -4), np.nan))
            more += [np.where(apart, top(other, p), np.nan) for p in (-14, -24, -34)]
    if exact:
        more += [top(own, p) for p in (16, 26, 36)]
    return _once(first, more)


def _once(first: list, more: list) -> tuple[list, list]:
    """The same blocks, none of them twice for a number."""
    seen: list[np.ndarray] = []
    for tops in (first, more):
        for i, top in enumerate(tops):
            is_new = np.isfinite(top)
            for other in seen:
                is_new &= top != other
            tops[i] = np.where(is_new, top, np.nan)
            seen.append(top)
    return first, more


def search(
    at: Callable[[np.ndarray, np.ndarray], Block],
    tops: tuple[list, list],
    rule: np.ndarray,
    precision: Precision,
    enough: np.ndarray | None = None,
    only: np.ndarray | None = None,
    believe: bool = False,
    doubt: np.ndarray | float = 0.0,
) -> Differences:
    """The slopes of n numbers, by as many blocks as it takes.

    at: gives the block of those largest steps (n,) at the chosen numbers, a mask (n,).
    tops: what `schedule` makes.
    rule: (n,) what the rule says. Where a block bears it out, nothing more is asked.
    enough: (n,) the error that is small enough; relative to the slope unless given.
    only: (n,) which of the numbers to look at; all unless given.
    believe: take the first slope that is known well, even if the rule says something else.
    doubt: (n,) the rounding of the function where the arguments are of size 1. That of log(1 + x)
        at x = 1e-12 is as large, and hides from the values at x.
    """
    n = len(rule)
    found = Differences.unknown(n)
    if not n:
        return found
    done = np.zeros(n, bool) if only is None else ~only
    is_resolved, is_zero = np.zeros(n, bool), np.zeros(n, bool)
    rough = np.zeros(n, bool)
    resolved_step = np.full(n, np.inf)
    finest = _Finest(*(np.full(n, np.inf) for _ in range(4)))
    kink_step, edge_step = np.full(n, np.inf), np.full(n, np.inf)
    required, further = tops
    earlier: list[tuple[Block, np.ndarray]] = []
    for number, top in enumerate([*required, *further]):
        todo = ~done & np.isfinite(top)
        if not todo.any():
            continue
        block = at(np.where(np.isfinite(top), top, 1.0), todo)
        b = _try(block, precision, rule)
        with np.errstate(all="ignore"):
            # No change may be one that rounding swallowed.
            swallowed = np.where(b.is_zero, 2 * doubt / block.steps[:, 0], 0.0)
            b = b._replace(
                error=np.maximum(b.error, swallowed), rounding=np.maximum(b.rounding, swallowed)
            )
            size = np.maximum(np.abs(b.slope), np.where(np.isfinite(rule), np.abs(rule), 0.0))
            limit = 0.1 * precision.numerical * size if enough is None else enough
            # Where the function is rough, larger steps see another function.
            smooth = b.is_smooth & ~(rough & (block.steps[:, 0] > 2 * required[0]))
            resolved = todo & smooth & ((b.error <= limit) | (b.is_zero & (rule == 0)))
            # Changes that vanish at small steps, but not at large ones, are rounding.
            resolved &= ~(b.is_zero & is_resolved & ~is_zero)
            better = todo & smooth & ~(b.is_zero & ~resolved)
            better &= (b.error < found.error) | (is_zero & resolved & ~b.is_zero)
            # What smaller steps saw instead is rounding, if it is no larger than that.
            seen = rough | is_zero | np.isin(found.state, (KINK, EDGE, UNDEFINED))
            rounded = todo & b.is_smooth & ~b.is_zero & (b.error <= limit) & seen
            if rounded.any():
                rounded &= _explained(earlier, block.steps, b.slope, doubt)
            resolved, better = resolved | rounded, better | rounded
        earlier.append((block, todo))
        for name in ("slope", "error", "rounding"):
            setattr(found, name, np.where(better, getattr(b, name), getattr(found, name)))
        is_zero = np.where(better, b.is_zero, is_zero)
        if number == 0:
            rough = ~b.is_smooth
        with np.errstate(all="ignore"):
            # A kink that larger steps don't see bears out the rule.
            width = np.abs(b.right - b.left)
            beside = np.fmax(np.fmin(b.left, b.right) - rule, rule - np.fmax(b.left, b.right))
            fits = beside <= 1e-2 * (np.where(width < np.abs(rule), width, 0.0) + np.abs(rule))
            hidden = todo & b.is_kink & is_resolved & fits & (block.steps[:, 0] < resolved_step)
        is_resolved = (is_resolved | resolved) & ~hidden
        resolved_step = np.where(better & resolved, block.steps[:, 0], resolved_step)
        for name, nothing in (("slope", np.nan), ("error", np.inf), ("rounding", np.inf)):
            setattr(found, name, np.where(hidden, nothing, getattr(found, name)))
        _look_for_a_kink(found, block, b, todo & ~is_resolved, kink_step, edge_step)
        finest = finest.and_of(block, b, todo)
        no_kink = (found.state == KINK) & finest.contradicts(found, kink_step)
        found.state = np.where(no_kink, UNCLEAR, found.state)
        kink_step[no_kink] = np.inf
        found.state = np.where(is_resolved, SMOOTH, found.state)
        found.kink_step = np.where(hidden, block.steps[:, -1], found.kink_step)
        done |= hidden
        with np.errstate(all="ignore"):
            off = np.abs(found.slope - rule)
            agrees = off <= 2 * found.error + precision.numerical * size
            done |= (is_resolved & (agrees | believe)) | rounded
            if number >= len(required) - 1:
                # Not known well, but well enough: with other steps it won't be either.
                done |= (found.state == UNCLEAR) & agrees
            if number >= len(required) + 1:
                done |= np.isin(found.state, (KINK, EDGE, UNDEFINED))
    return found


def _explained(earlier, steps, slope, doubt) -> np.ndarray:
    """Is what smaller steps changed, less what the slope says, no more than rounding?"""
    explained = np.broadcast_to(doubt > 0, slope.shape) * True
    for block, tried in earlier:
        size = np.abs(slope[:, None] * block.steps)
        off = np.fmax(
            np.abs(block.plus - slope[:, None] * block.steps),
            np.abs(block.minus + slope[:, None] * block.steps),
        )
        fits = ~(off > 16 * np.reshape(doubt, (-1, 1)) + 0.05 * size).any(axis=1)
        explained &= fits | ~tried | (block.steps[:, 0] >= steps[:, 0])
    return explained


@np.errstate(all="ignore")
def _look_for_a_kink(found, block, b, where, kink_step, edge_step) -> None:
    """Note kinks and edges; those that block with the smallest steps shows are the true ones."""
    smallest = block.steps[:, -1]
    no_left, no_right = ~np.isfinite(block.minus[:, -1]), ~np.isfinite(block.plus[:, -1])
    steep = b.grows_left & b.grows_right
    is_edge = no_left | no_right | steep
    closer = where & (smallest < edge_step)
    is_kink = where & b.is_kink & ~is_edge & (smallest < kink_step)
    was_edge = closer & np.isin(found.state, (EDGE, UNDEFINED))
    found.state = np.where(was_edge, UNCLEAR, found.state)
    is_edge &= closer
    found.state = np.where(is_kink, KINK, found.state)
    found.state = np.where(is_edge, EDGE, found.state)
    found.state = np.where(is_edge & no_left & no_right, UNDEFINED, found.state)
    kink_step[is_kink] = smallest[is_kink]
    edge_step[closer] = smallest[closer]
    left = np.where(b.grows_left & (no_right | steep), np.copysign(np.inf, b.left), b.left)
    right = np.where(b.grows_right & (no_left | steep), np.copysign(np.inf, b.right), b.right)
    sides = np.where(no_left, np.nan, left), np.where(no_right, np.nan, right), b.low, b.high
    names = "left", "right", "low", "high", "slack"
    for name, value in zip(names, (*sides, b.slack), strict=True):
        setattr(found, name, np.where(is_kink | is_edge, value, getattr(found, name)))
