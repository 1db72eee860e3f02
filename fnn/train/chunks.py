"""Batches as the device takes them: many at a time.

A chunk is what one call of the device can run through. Arrays that fit lie on the device, and an
epoch of them is one chunk; of batches that come one by one, as many are stacked as make a few
megabytes.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn.footprint.compiled import room
from fnn.sharding import Layout
from fnn.train.data import Arrays, Stream, filled, fold_in
from fnn.train.devices import Placed

# Batches are stacked up to so many bytes, and so many of them, in one chunk.
STACKED_BYTES, MOST_STACKED = 2**22, 64

# A chunk goes on its way, though there are places left, so many seconds after its first batch came.
PATIENCE = 0.2

# Arrays lie on the device if they take no more than this part of its memory.
PART_OF_MEMORY = 0.25


class Chunk(NamedTuple):
    """Batches on the device, or on their way there.

    Fields:
        kind: how they lie in `data`. "rows": batch i is the rows `rows[i]`; "stack": the i-th
            entries along a first axis; "batch": data is one batch.
        data: a tree of arrays.
        rows: numbers of examples, (batches, batch size); None unless kind is "rows".
        sizes: how many examples each batch has, on the host.
        masked: whether batches may be filled up with others, that don't count.
        start: the first batch that isn't over.
        fill: up to how many examples `data`, one batch on a layout, is yet to be filled up.
    """

    kind: str
    data: Any
    rows: Any
    sizes: np.ndarray
    masked: bool
    start: int = 0
    fill: int | None = None


# -------------------------------------------------------------------------- data on the device


def device_memory() -> int:
    """How many bytes of memory the device has, as far as can be known."""
    there = room()
    return there.total if there is not None else 2**32


def fits(data: Any, layout: Layout | None = None) -> bool:
    """Whether arrays lie on the device, or can be put there with room to spare.

    Args:
        data: a tree of arrays.
        layout: of the devices each of which gets them, if it isn't one alone.
    """
    leaves = jax.tree.leaves(data)
    if layout is None:
        size = sum(x.nbytes for x in leaves if not isinstance(x, jax.Array))
    else:
        part = lambda x: math.prod(layout.of_data(x.shape).shard_shape(x.shape))
        size = sum(part(x) * x.dtype.itemsize for x in leaves)
        if layout.mesh.devices.flat[0].platform == "cpu":  # whose devices share one memory
            size *= layout.mesh.size
    return size <= PART_OF_MEMORY * device_memory()


@dataclasses.dataclass(frozen=True)
class Resident:
    """Arrays that lie on the device: an epoch is one chunk, shuffled there.

    Fields:
        source: the arrays.
        data: the same on the device.
        pad: whether a smaller last batch may be filled up. Else it is a chunk of its own.
        last: the number of the last epoch.
        on_mesh: whether they lie on the devices of a layout.
    """

    source: Arrays
    data: Any
    pad: bool
    last: int
    on_mesh: bool = False
    _made: dict[int, tuple[Chunk, ...]] = dataclasses.field(default_factory=dict)
    _drawn: dict[int, Callable[[], list]] = dataclasses.field(default_factory=dict)

    def chunks(self, key: Any, epoch: int, start: int) -> Iterator[Chunk]:
        """Those of an epoch, without its first `start` batches."""
        for chunk in self._of_epoch(key, epoch):
            if start < len(chunk.sizes):
                yield chunk._replace(start=max(0, start))
            start -= len(chunk.sizes)

    def after(self, key: Any, epoch: int, chunk: Chunk) -> Chunk | None:
        """The chunk after one of an epoch; None after the last."""
        own = self._of_epoch(key, epoch)
        (place,) = [i for i, other in enumerate(own) if other.sizes is chunk.sizes]
        if place + 1 < len(own):
            return own[place + 1]
        return self._of_epoch(key, epoch + 1)[0] if epoch < self.last else None

    def _of_epoch(self, key: Any, epoch: int) -> tuple[Chunk, ...]:
        if epoch not in self._made:
            ahead = lambda epoch: self.source.rows_ahead(key, epoch, self.last)
            drawn = (self._drawn.pop(epoch, None) or ahead(epoch))()
            for old in [e for e in self._made if e < epoch - 1]:
                del self._made[old]
            self._made.update((epoch + i, self._cut(rows)) for i, rows in enumerate(drawn))
            if (following := epoch + len(drawn)) <= self.last:
                self._drawn[following] = ahead(following)
        return self._made[epoch]

    def _cut(self, rows: Any) -> tuple[Chunk, ...]:
        sizes = self.source.sizes
        rows = np.asarray(rows) if self.on_mesh else rows  # not on one device alone
        even = sizes[-1] == self.source.batch_size
        if even or self.pad:
            return (Chunk("rows", self.data, rows, sizes, not even),)
        return tuple(
            Chunk("rows", self.data, own_rows, own_sizes, False)
            for own_rows, own_sizes in (
                (rows[:-1], sizes[:-1]),
                (rows[-1:, : sizes[-1]], sizes[-1:]),
            )
            if len(own_sizes)
        )


def on_device(source: Arrays, layout: Layout | None = None) -> Any:
    """The arrays, on their way to the device, or to the devices of a layout."""
    if layout is None:
        return jax.tree.map(_put, source.data)
    return layout.place_data(source.data)


def _put(x: Any) -> jax.Array:
    """An array on its way to the device, in memory of its own."""
    if not isinstance(x, np.ndarray) or jax.default_backend() != "cpu":
        return jnp.asarray(x)
    own = _memory(x.shape, x.dtype)
    own[...] = x
    return _handed_over(own)


def _memory(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array to be filled and handed over.

    JAX's CPU backend reads numpy's memory where it lies, if it begins at a multiple of 64 bytes. A
    copy to there takes a fifth of the time of `jnp.asarray`'s.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8) if size <= STACKED_BYTES else _pages(size)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _pages(size: int) -> np.ndarray:
    """So many bytes, in pages of the usual size.

    For large arrays numpy asks Linux for huge pages. To get and fill 63 MB of those took from 10 to
    165 ms from call to call, of these from 31 to 41 (a virtual machine with 2 cores).
    """
    flags = 0
    for name in ("MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_POPULATE"):  # not all systems know all
        flags |= getattr(mmap, name, 0)
    options = {"flags": flags} if flags else {}
    return np.frombuffer(mmap.mmap(-1, size, **options), np.uint8)


def _handed_over(own: np.ndarray) -> jax.Array:
    """The array as one of JAX's; nobody writes to it any more."""
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    return jnp.asarray(own) if on_mesh else jax.device_put(own)


# ----------------------------------------------------------------------------- data that come


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Batches that come one by one, stacked.

    Fields:
        source: arrays too large for the device, or batches from outside.
        look_at: called with each batch on its way.
        may_pad: of a batch, whether an epoch's last one may be filled up if it is smaller.
        most: tells how many batches to wait for at most. The stack has the same number of places
            in any case, by the bytes of a batch: its program is then the same, to the last bit.
    """

    source: Arrays | Stream | Placed
    look_at: Callable[[Any], None]
    may_pad: Callable[[Any], bool]
    most: Callable[[], int] = lambda: MOST_STACKED

    @property
    def may_run_ahead(self) -> bool:
        """Whether a thread may read it. Not if that takes programs of several devices."""
        held = self.source.source if isinstance(self.source, Placed) else None
        leaves = jax.tree.leaves(held.data) if isinstance(held, Arrays) else []
        several = any(isinstance(x, jax.Array) and len(x.devices()) > 1 for x in leaves)
        return not (several or self.comes_once)

    @property
    def comes_once(self) -> bool:
        """Whether what is read is gone: then nothing may be read that isn't trained on."""
        source = self.source.source if isinstance(self.source, Placed) else self.source
        return isinstance(source, Stream) and isinstance(source.source, Iterator)

    def chunks(self, key: Any, epoch: int, start: int) -> Iterator[Chunk]:
        """Those of an epoch, without its first `start` batches.

        An error of the source comes after the batches before it.
        """
        return self._made(self._looked_at(self.source.epoch(fold_in(key, epoch), start)))

    def _looked_at(self, batches: Iterable) -> Iterator[Any]:
        for batch in batches:
            self.look_at(batch)
            yield batch

    def _made(self, batches: Iterator[Any]) -> Iterator[Chunk]:
        """Groups of batches that are alike, of at most as many as one chunk has places for."""
        group: list = []
        kind: Any = None  # of the batches in the group
        before: Any = None  # of the group before it
        began, problem = 0.0, None
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except BaseException as error:
                problem = error
                break
            own, pad = _kind(batch), self.may_pad(batch)
            most = min(self._places(batch), self.most())
            if group and (own != kind or len(group) >= most):
                yield self._chunk(group)
                group, before = [], kind
            if not group:
                kind, began = own, time.monotonic()
            group.append(batch)
            full = len(group) >= most or time.monotonic() - began > PATIENCE
            if full and not (pad and len(group) == 1 and _is_short(kind, before)):
                yield self._chunk(group)
                group, before = [], kind
        if group:
            fill = pad and len(group) == 1 and _is_short(kind, before)
            yield self._chunk(group, before.size if fill else None)
        if problem is not None:
            raise problem

    def _chunk(self, group: list, size: int | None = None) -> Chunk:
        """A chunk of them; the only one filled up to `size` examples, if given."""
        sizes = np.array([jax.tree.leaves(batch)[0].shape[0] for batch in group], np.int32)
        masked = self.may_pad(group[0])
        if isinstance(self.source, Placed):
            return Chunk("batch", group[0], None, sizes, masked, fill=size)
        group = [filled(batch, size) for batch in group]
        places = self._places(group[0])
        if places == 1:
            return Chunk("batch", group[0], None, sizes, masked)
        data = jax.tree.map(lambda *xs: _stacked(xs, places), *group)
        return Chunk("stack", data, None, sizes, masked)

    def _places(self, batch: Any) -> int:
        """How many such batches are stacked."""
        leaves = jax.tree.leaves(batch)
        several = any(isinstance(x, jax.Array) and len(x.devices()) > 1 for x in leaves)
        if several or isinstance(self.source, Placed):
            return 1
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
        return max(1, min(MOST_STACKED, STACKED_BYTES // max(1, size)))


class _Kind(NamedTuple):
    """How a batch is built: its tree, each array's type without the first axis, and its size."""

    tree: Any
    types: tuple
    size: int


def _kind(batch: Any) -> _Kind:
    leaves, tree = jax.tree.flatten(batch)
    types = [(x.shape[1:], x.dtype, isinstance(x, jax.Array)) for x in leaves]
    return _Kind(tree, tuple(types), leaves[0].shape[0])


def _is_short(kind: _Kind, before: _Kind | None) -> bool:
    """Is this kind of batch as the one before, but smaller?"""
    return before is not None and kind[:2] == before[:2] and kind.size < before.size


def _stacked(arrays: tuple, places: int) -> jax.Array:
    """Arrays along a new first axis with so many places; what is in those left doesn't matter."""
    if isinstance(arrays[0], jax.Array):
        return jnp.stack([*arrays, *arrays[-1:] * (places - len(arrays))])
    stack = _memory((places, *arrays[0].shape), arrays[0].dtype)
    for i, x in enumerate(arrays):
        stack[i] = x
    stack[len(arrays) :] = 0
    return _handed_over(stack)
