"""Which example of the arguments an entry belongs to.

Found by trying: if the examples are moved on by one place and the array's rows along an axis move
with them, then the place along this axis is the example's. Nothing needs to be known of `vmap`.
Under shard_map the rows may go on from device to device.
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
from fnn.meshes import spec_of, with_auto_axes

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
    value = level.values[number]
    if not can_be_read(value):
        return None, ()
    before = on_host(value)
    of_devices = 0 if level.devices is None else len(level.devices.axes)
    for axes in _groups(before.shape, of_devices):
        rows = _rows(before, axes)
        wanted = np.roll(rows, 1, 0)
        if len(rows) < 2 or _same(wanted, rows):
            continue
        for chosen in _choices(args, labels, len(rows)):
            with contextlib.suppress(Exception):  # the function may refuse them
                moved = [_moved_on(x) if i in chosen else x for i, x in enumerate(args)]
                if _same(_rows(on_host(_again(level, [number], moved)[0]), axes), wanted):
                    lengths, at = [before.shape[k] for k in axes], [index[k] for k in axes]
                    found = int(np.ravel_multi_index(at, lengths))
                    return found, tuple(dict.fromkeys(_name(labels[i]) for i in chosen))
    return None, ()


def _groups(shape: Sequence[int], of_devices: int) -> list[tuple[int, ...]]:
    """The axes that examples may lie along: one, or devices along some axes of their mesh and one.

    Args:
        shape: of an array.
        of_devices: how many of its axes, the first ones, are those of a mesh.
    """
    own = [(k,) for k in range(of_devices, len(shape))][:_MOST_AXES]
    spread = [k for k in range(of_devices) if shape[k] > 1]
    divisions = [tuple(spread)] if len(spread) > 1 else []
    divisions += [(k,) for k in spread]
    return [(*d, *k) for d in divisions for k in [*own, ()]] + own


def _rows(x: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """The array with some axes as one, its first."""
    x = np.moveaxis(x, axes, range(len(axes)))
    return x.reshape(-1, *x.shape[len(axes) :])


def _moved_on(x: Any) -> Any:
    """An array's rows, each at the place of the next one; on the devices that they lie on."""
    return with_auto_axes(lambda x: jnp.roll(x, 1, 0), (x,), spec_of(x))


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
