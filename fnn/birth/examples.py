"""Which example of the arguments an entry belongs to.

Found by trying: if the examples are moved on by one place and the array's rows along an axis move
with them, then the place along this axis is the example's. Nothing needs to be known of `vmap`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fnn.birth.entries import can_be_read, on_host
from fnn.birth.levels import Level, Place

_MOST_AXES = 4


def example_of(
    place: Place, args: Sequence, labels: Sequence[str]
) -> tuple[int | None, tuple[str, ...]]:
    """The example that an entry belongs to, and the arguments whose first axis it counts along.

    Args:
        place: the entry.
        args, labels: the function's inputs and what they are called.

    Returns:
        None and nothing if it belongs to no single example, or that isn't certain.
    """
    level, number, index = place
    if level.devices is not None:  # an example's rows are spread over devices
        return None, ()
    value = level.values[number]
    if not can_be_read(value):
        return None, ()
    before = on_host(value)
    for axis in range(min(before.ndim, _MOST_AXES)):
        size = before.shape[axis]
        wanted = np.roll(before, 1, axis)
        if size < 2 or _same(wanted, before):
            continue
        for chosen in _choices(args, labels, size):
            moved = [jnp.roll(x, 1, 0) if i in chosen else x for i, x in enumerate(args)]
            with contextlib.suppress(Exception):  # the function may refuse them
                if _same(on_host(_again(level, [number], moved)[0]), wanted):
                    return index[axis], tuple(dict.fromkeys(_name(labels[i]) for i in chosen))
    return None, ()


def _choices(args: Sequence, labels: Sequence[str], size: int) -> list[set[int]]:
    """The arguments with so many examples: all together, and by name."""
    fitting = [i for i, x in enumerate(args) if np.ndim(x) and np.shape(x)[0] == size]
    by_name: dict[str, set[int]] = {}
    for i in fitting:
        by_name.setdefault(_name(labels[i]), set()).add(i)
    several = [set(fitting)] if len(by_name) > 1 else []
    return [*several, *by_name.values()][:_MOST_AXES]


def _name(label: str) -> str:
    """`batch` of `batch[0]['x']`."""
    return re.split(r"[\[.]", label)[0]


def _again(level: Level, numbers: Sequence[int], args: Sequence) -> list[Any]:
    """The values that these are at other arguments of the function."""
    if level.around is not None:
        outer, equation = level.around
        args = level.enter(_again(outer, equation.ins, args))
    values = level.start(args)
    for equation in level.flat.needed_for(numbers)[0]:
        outs = level.apply(equation, [values[i] for i in equation.ins])
        values.update(zip(equation.outs, outs, strict=True))
    return [values[i] for i in numbers]


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True))
