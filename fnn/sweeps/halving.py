"""Successive halving: most networks are given up early, the best go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fnn import arguments
from fnn.sweeps.axes import Axes
from fnn.sweeps.table import places_of


class Halving(NamedTuple):
    """Successive halving, for `fnn.sweep(..., halving=fnn.Halving(after=2, eta=3))`.

    After `after` epochs the best 1/`eta` of the networks go on, after `after` · `eta` epochs the
    best 1/`eta` of those, and so on; the others stay as they are. What goes on is trained as if
    alone: the choice changes none of its numbers. (Jamieson and Talwalkar, 2016, arXiv:1502.07943;
    rounds as in Li et al., Hyperband, 2018, arXiv:1603.06560.)

    Fields:
        after: the epochs before the first choice.
        eta: one in how many goes on; above 1.
        by: the quantity to choose by; the validation loss unless given, or the loss.
        largest: whether larger is better.
        over: the axis, or several, over whose mean to choose: with "seed", all seeds of a
            setting go on, or none.
    """

    after: int
    eta: float = 2
    by: str | None = None
    largest: bool = False
    over: str | Sequence[str] = ()


def checked(halving: Any, axes: Axes) -> Halving | None:
    """The caller's `halving`, if it is one.

    Raises:
        TypeError, ValueError: it isn't, or a field is out of range.
    """
    if halving is None:
        return None
    if not isinstance(halving, Halving):
        raise TypeError(
            "sweep: halving must be an fnn.Halving, such as fnn.Halving(after=2, eta=3), but got "
            f"{arguments.show(halving)}."
        )
    after = arguments.integer("Halving", "after", halving.after, least=1)
    arguments.number("Halving", "eta", halving.eta, above=1)
    arguments.flag("Halving", "largest", halving.largest)
    if halving.by is not None and not isinstance(halving.by, str):
        raise TypeError(f"Halving: by must be a quantity's name, but got {halving.by!r}.")
    places_of("Halving", axes.all, halving.over)
    return halving._replace(after=after)


def rounds(halving: Halving | None, epochs: int) -> list[int]:
    """After how many epochs there is a choice; all before the last epoch."""
    found: list[int] = []
    epoch = float(halving.after) if halving is not None else epochs
    while halving is not None and round(epoch) < epochs:
        if not found or round(epoch) > found[-1]:
            found.append(round(epoch))
        epoch *= halving.eta
    return found


def chosen(halving: Halving, axes: Axes, members: Sequence[int], values: np.ndarray) -> list[int]:
    """The members that go on.

    Args:
        halving: how to choose.
        axes: the sweep's.
        members: those that are still trained.
        values: the quantity to choose by of each of them. nan and inf are the worst.
    """
    signed = -values if halving.largest else values
    signed = np.where(np.isfinite(signed), signed, np.inf)
    over = places_of("Halving", axes.all, halving.over)
    settings: dict[tuple[int, ...], list[int]] = {}
    for i, member in enumerate(members):
        place = np.unravel_index(member, axes.shape)
        setting = tuple(int(p) for k, p in enumerate(place) if k not in over)
        settings.setdefault(setting, []).append(i)
    means = {setting: float(np.mean(signed[own])) for setting, own in settings.items()}
    count = max(1, int(len(means) / halving.eta))
    best = sorted(means, key=means.__getitem__)[:count]  # of equals, the first in the grid
    return sorted(members[i] for setting in best for i in settings[setting])
