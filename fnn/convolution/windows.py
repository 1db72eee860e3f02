"""How the window of a convolution meets its input, and some images at a time.

Arrays of images are (images, space..., features). A patch is what one place of the window meets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy
from jax import lax

from fnn.meshes import as_varying

# The patches of so many bytes at a time: they stay in a core's cache.
CACHED = 2**20

# For a weight's gradient more: a block's product is then large enough for all cores.
FOR_ALL_CORES = 3 * 2**20

# The products of single pixels with a window of so many bytes at a time.
FOR_PIXELS = 8 * 2**20

# From so many weights on, their order of axes matters.
LARGE = 2**18

# Whether XLA's library computes each row of y on one core, unless it has many features or pixels.
ROWS_ON_ONE_CORE = jax.__version_info__ < (0, 11)

# So many multiplications and additions of shifted copies are faster than the library.
FEW = 49

# So many terms or fewer are compiled one by one.
MANY = 128


class Window(NamedTuple):
    """How a convolution meets its input, for each axis of space.

    holes: the dilation of the window. between: that of x, the zeros between its entries plus 1.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    between: tuple[int, ...]
    holes: tuple[int, ...]


def in_usual_order(x, w, numbers) -> tuple[jax.Array, jax.Array]:
    """x as (batch, space..., in), and w as (window..., in, out)."""
    x_spec, w_spec, _ = numbers
    x = lax.transpose(x, (x_spec[0], *x_spec[2:], x_spec[1]))
    return x, lax.transpose(w, (*w_spec[2:], w_spec[1], w_spec[0]))


def in_order_of(y, y_spec) -> jax.Array:
    """(batch, space..., features) with each axis where it belongs."""
    order = (y_spec[0], *y_spec[2:], y_spec[1])
    return lax.transpose(y, tuple(int(d) for d in numpy.argsort(order)))


def out_space(x, w, window: Window) -> list[int]:
    """The output's size along each axis of space."""
    found = []
    for n, k, stride, (low, high), between, hole in zip(
        x.shape[1:-1], w.shape[:-2], *window, strict=True
    ):
        size = (1 + between * (n - 1) if n else 0) + low + high
        reach = 1 + hole * (k - 1) if k else 0
        found.append(max(0, (size - reach) // stride + 1))
    return found


def padded(x, window: Window):
    """x with its zeros around and between."""
    pads = [
        (low, high, d - 1) for (low, high), d in zip(window.padding, window.between, strict=True)
    ]
    if not any(itertools.chain(*pads)):
        return x
    return lax.pad(x, lax.full_like(x, 0, shape=()), [(0, 0, 0), *pads, (0, 0, 0)])


def with_zeros(x, axis: int, low: int, high: int) -> jax.Array:
    """Zeros before and behind what there is along this axis, or so many less of it."""
    if low == high == 0:
        return x
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (low, high, 0)
    return lax.pad(x, lax.full_like(x, 0, shape=()), pads)


def patch_at(x, place: Sequence[int], out: Sequence[int], strides, holes, first: int = 1) -> Any:
    """What one place of the window meets: x[:, o·stride + place·hole, :] for all o.

    first: the number of x's first axis of space.
    """
    start, stop, step = [0] * x.ndim, list(x.shape), [1] * x.ndim
    for axis, (k, n, stride, hole) in enumerate(
        zip(place, out, strides, holes, strict=True), first
    ):
        start[axis], step[axis] = k * hole, stride
        stop[axis] = start[axis] + (n - 1) * stride + 1
    return lax.slice(x, start, stop, step)


def patches_by_group(x, kernel, out, strides, holes, groups: int) -> jax.Array:
    """(images · out, groups, kernel · features of a group): what each output place sees of x."""
    rows = (x.shape[0] * math.prod(out), groups, x.shape[-1] // groups)
    found = [patch_at(x, place, out, strides, holes) for place in numpy.ndindex(*kernel)]
    return lax.concatenate([lax.reshape(patch, rows) for patch in found], 2)


def patch_rows(x, kernel, out, strides, holes, inner: int) -> jax.Array:
    """What each output place sees of x, a row: its features, each with all places; or reversed."""
    found = [patch_at(x, place, out, strides, holes) for place in numpy.ndindex(*kernel)]
    axis = x.ndim if inner == 0 else x.ndim - 1
    rows = lax.concatenate([lax.expand_dims(patch, (axis,)) for patch in found], axis)
    pixels = x.shape[0] * math.prod(out)
    return lax.reshape(rows, (pixels, math.prod(kernel) * x.shape[-1]))


def repeated(x, times: int) -> jax.Array:
    """Each feature so many times, one beside the other."""
    if times == 1:
        return x
    wide = lax.broadcast_in_dim(x, (*x.shape, times), range(x.ndim))
    return lax.reshape(wide, (*x.shape[:-1], x.shape[-1] * times))


def matrix_of(one: int, other: int, space: Sequence[int]) -> tuple[int | None, int]:
    """How weights lie as a matrix of one axis with all others: (its side, the other's place).

    Args:
        one, other: the places of the two axes of features in memory.
        space: those of the window's.

    Returns:
        The side of the matrix, 0 or 1, on which `one` is, None where it lies between others. And
        whether the other axis of features lies before the window's (0) or behind (1).
    """
    if list(space) != list(range(space[0], space[0] + len(space))):
        return None, 0
    side = {0: 0, len(space) + 1: 1}.get(one)
    return side, int(other > space[0])


def blocks_of(x, size: int) -> tuple:
    """x as (blocks, size, ...), how many blocks there are, and what is left over.

    No blocks where all of it is one.
    """
    blocks, rest = divmod(x.shape[0], size)
    if x.shape[0] <= size:
        return x, 0, None
    whole = lax.reshape(lax.slice_in_dim(x, 0, blocks * size), (blocks, size, *x.shape[1:]))
    return whole, blocks, lax.slice_in_dim(x, blocks * size, x.shape[0]) if rest else None


def even(size: int, count: int) -> int:
    """So many at a time, or some fewer, so that none of `count` are left over."""
    if count <= size:
        return size
    return next((n for n in range(size, size // 2, -1) if count % n == 0), size)


def block_by_block(function, x, size: int) -> jax.Array:
    """function(x), of so many images at a time, or of some fewer; see `even`."""
    size = even(size, x.shape[0])
    whole, blocks, rest = blocks_of(x, size)
    if not blocks:
        return function(x)
    y = lax.map(function, whole)
    y = lax.reshape(y, (blocks * size, *y.shape[2:]))
    return y if rest is None else lax.concatenate([y, function(rest)], 0)


def zeros_to_sum_in(shape: Sequence[int], x, w) -> jax.Array:
    """Zeros that a loop may carry. Under shard_map they vary over devices as x and w do."""
    zeros = jnp.zeros(shape, x.dtype)
    for a in (x, w):
        zeros = as_varying(zeros, jax.typeof(a))
    return zeros


def sum_of_blocks(function, x, g, size: int):
    """Σ function(x, g) over blocks of so many images, or of some fewer, one after the other."""
    size = even(size, x.shape[0])
    xs, blocks, x_rest = blocks_of(x, size)
    gs, _, g_rest = blocks_of(g, size)
    if not blocks:
        return function(x, g)
    start = zeros_to_sum_in(jax.eval_shape(function, x[:size], g[:size]).shape, x, g)
    add = lambda total, pair: (lax.add(total, function(*pair)), None)
    total, _ = lax.scan(add, start, (xs, gs))
    return total if x_rest is None else lax.add(total, function(x_rest, g_rest))
