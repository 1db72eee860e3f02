"""Arrays of which each process has some parts: the parts' checksums, and how they are read.

Of the whole no process could compute a checksum. A part is told of by where it begins and ends
along each axis. Who reads an array divided in another way reads the parts, as they were written,
that its own numbers are in, checks each, and cuts out what it needs.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fnn.train.together import in_all

# Where a part begins and ends along each axis.
Bounds = tuple[tuple[int, int], ...]


class WrongNumbers(Exception):
    """A part's numbers haven't their checksum."""


def checksum(array: np.ndarray) -> int:
    """The CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def is_divided(value: Any) -> bool:
    """Has this process only some of the array's numbers?"""
    is_array = isinstance(value, jax.Array)
    return is_array and not (value.is_fully_addressable or value.is_fully_replicated)


def checksums(arrays: Sequence[jax.Array]) -> list[list[tuple[Bounds, int]]]:
    """The parts of each array, and their checksums. All processes must call it.

    Args:
        arrays: divided ones, in the same order in each process.
    """
    if not arrays:
        return []
    parts = [_parts(x.sharding, x.shape) for x in arrays]
    found = np.zeros((2, len(arrays), max(map(len, parts))), np.uint32)
    for i, x in enumerate(arrays):
        for shard in x.addressable_shards:
            place = parts[i].index(_bounds(shard.index, x.shape))
            if not found[0, i, place]:
                found[:, i, place] = 1, checksum(np.asarray(shard.data))
    known = in_all(found)
    who = np.argmax(known[:, 0], axis=0)  # of each part, the first process that has it
    return [
        [(bounds, int(known[who[i, j], 1, i, j])) for j, bounds in enumerate(own)]
        for i, own in enumerate(parts)
    ]


def are_intact(array: np.ndarray, parts: Sequence[tuple[Bounds, int]]) -> bool:
    """Whether the parts of a whole array have their checksums."""
    return all(checksum(array[_slices(bounds)]) == wanted for bounds, wanted in parts)


def read_onto(
    sharding: Any,
    shape: tuple[int, ...],
    parts: Sequence[tuple[Bounds, int | None]],
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """An array on some devices, of which this process reads what its own devices have.

    Args:
        sharding: on devices of several processes.
        shape: the array's.
        parts: as it was written, with checksums; None for one that isn't known.
        read: what reads a part.

    Raises:
        WrongNumbers: a part hasn't its checksum.
    """

    @functools.cache
    def part(place: int) -> np.ndarray:
        bounds, wanted = parts[place]
        numbers = read(_slices(bounds))
        if wanted is not None and checksum(numbers) != wanted:
            raise WrongNumbers
        return numbers

    def of_device(bounds: Bounds) -> np.ndarray:
        made = None
        for place, (written, _) in enumerate(parts):
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, written, strict=True)]
            if any(start >= stop for start, stop in both):
                continue
            within = tuple(
                slice(start - first, stop - first)
                for (start, stop), (first, _) in zip(both, written, strict=True)
            )
            numbers = part(place)[within]
            if made is None:
                made = np.empty([stop - start for start, stop in bounds], numbers.dtype)
            there = tuple(
                slice(start - first, stop - first)
                for (start, stop), (first, _) in zip(both, bounds, strict=True)
            )
            made[there] = numbers
        assert made is not None
        return made

    # All are read before the first is placed: what is wrong is an error before anything is made.
    own = sharding.addressable_devices_indices_map(shape).values()
    pieces = {bounds: of_device(bounds) for bounds in {_bounds(index, shape) for index in own}}
    return jax.make_array_from_callback(
        shape, sharding, lambda index: pieces[_bounds(index, shape)]
    )


def whole(shape: Sequence[int]) -> Bounds:
    """The bounds of all of an array."""
    return tuple((0, size) for size in shape)


def _parts(sharding: Any, shape: tuple[int, ...]) -> list[Bounds]:
    indices = sharding.devices_indices_map(shape).values()
    return sorted({_bounds(index, shape) for index in indices})


def _bounds(index: Any, shape: Sequence[int]) -> Bounds:
    limits = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in limits)


def _slices(bounds: Bounds) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in bounds)
