"""Pooling: the largest entry, or the mean, of windows that move over an image.

Images are `(height, width, features)`; each feature is pooled by itself. The window says how many
axes of space there are: one number stands for both axes of an image, `(3,)` for the one of a
sequence. Axes in front are a batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn import arguments
from fnn.convolution.windows import with_zeros
from fnn.meshes import sharding_of
from fnn.operation import compiled_rule as rule
from fnn.ops.arguments import must_be_real
from fnn.ops.convolutions import Padding, Sizes, pads_of, sizes_of
from fnn.precision import wide

# Windows of more places are gone through axis by axis: n + m places and not n · m.
_MANY_PLACES = 25


def max_pool(
    x: chex.Array,
    window: Sizes,
    *,
    stride: Sizes | None = None,
    padding: Padding = "valid",
    dilation: Sizes = 1,
) -> jax.Array:
    """y[o] = max over window places k of x[o·stride + k·dilation − pad], for each feature.

    Args:
        x: `(..., *space, features)`.
        window: its sizes: one number for the two axes of an image, or one for each axis.
        stride: how far it moves; as far as it is long unless given.
        padding: as of `convolution`, "circular" excepted; what is padded is never the largest.
        dilation: the distance of the window's places.

    Returns:
        y, `(..., *out_space, features)`, of x's dtype.

    Local gradient: 1 for the window's largest entry, the first in order if several are equal, 0
    for the others. Kept: which place it was, one byte for each output (and of a window of more
    than 25 places one for each axis). A nan is the largest of all.

    Raises:
        TypeError: x isn't real floating, or an option isn't of its kind.
        ValueError: the window doesn't fit into x, is all padding, or options don't fit.

    Source: CS231n, "Convolutional networks" (pooling); Yamaguchi et al., "A neural network for
    speaker-independent isolated word recognition", 1990.

    >>> max_pool(jnp.arange(16.0).reshape(4, 4, 1), 2)[..., 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    must_be_real("max_pool", x=x)
    windows, strides, pads, dilations = _options("max_pool", x, window, stride, padding, dilation)
    if math.prod(windows) <= _MANY_PLACES:
        return window_max(
            x,
            space=x.shape[-1 - len(windows) : -1],
            windows=windows,
            strides=strides,
            pads=pads,
            dilations=dilations,
        )
    for axis in reversed(range(len(windows))):  # the last axis first: the first place in order
        alone = lambda values, rest, axis=axis: tuple(
            v if i == axis else rest for i, v in enumerate(values)
        )
        x = window_max(
            x,
            space=x.shape[-1 - len(windows) : -1],
            windows=alone(windows, 1),
            strides=alone(strides, 1),
            pads=alone(pads, (0, 0)),
            dilations=alone(dilations, 1),
        )
    return x


@rule
def window_max(x, *, space, windows, strides, pads, dilations):
    """`max_pool` with its options spelled out for each axis of space, whose sizes `space` are."""
    patches = _patches(_padded(x, pads, -jnp.inf), windows, strides, dilations)
    return functools.reduce(jnp.maximum, patches)


@window_max.forward
def _(x, *, space, windows, strides, pads, dilations):
    patches = _patches(_padded(x, pads, -jnp.inf), windows, strides, dilations)
    y = functools.reduce(jnp.maximum, patches)
    where = jnp.zeros(y.shape, jnp.uint8 if len(patches) < 256 else jnp.int32)
    for k in reversed(range(len(patches))):
        is_largest = (patches[k] == y) | (jnp.isnan(patches[k]) & jnp.isnan(y))
        where = jnp.where(is_largest, jnp.asarray(k, where.dtype), where)
    return y, where


@window_max.backward
def _(where, g, *, space, windows, strides, pads, dilations):
    """g, at the place of each window that was largest; summed where windows overlap."""
    if set(dilations) == {1} and _are_tiles(g, windows, strides):
        return (_in_tiles(where, g, space, windows, pads),)
    total = None
    for k, place in enumerate(np.ndindex(*windows)):
        share = jnp.where(where == jnp.asarray(k, where.dtype), g, jnp.zeros((), g.dtype))
        around = [(0, 0, 0)] * g.ndim
        for i, at in enumerate(place):
            axis = g.ndim - len(windows) - 1 + i
            before = at * dilations[i] - pads[i][0]
            around[axis] = _around(g.shape[axis], before, strides[i], space[i])
        share = lax.pad(share, jnp.zeros((), g.dtype), around)
        total = share if total is None else total + share
    return (total,)


def _around(count: int, before: int, stride: int, n: int) -> tuple[int, int, int]:
    """`lax.pad`'s zeros by which so many entries lie a stride apart, among n, from `before` on."""
    return before, n - before - (count - 1) * stride - 1, stride - 1


def _in_tiles(where, g, space, windows, pads):
    """g at the place `where` of each window, which lie side by side, and zeros elsewhere."""
    first, (shape, kept) = g.ndim - len(windows) - 1, _tiles(g, windows)
    place = jnp.zeros((), where.dtype)
    for axis, size in enumerate(windows):
        place = place * jnp.asarray(size, where.dtype)
        place += lax.broadcasted_iota(where.dtype, shape, first + 2 * axis + 1)
    where, g = (lax.broadcast_in_dim(a, shape, kept) for a in (where, g))
    return _untiled(jnp.where(where == place, g, jnp.zeros((), g.dtype)), space, windows, pads)


def _are_tiles(g, windows, strides) -> bool:
    """Whether each entry of x is in one window at most, and axes may be joined.

    On a mesh with explicit axes JAX doesn't join them.
    """
    return windows == strides and sharding_of(g) is None


def _tiles(g, windows) -> tuple[list[int], list[int]]:
    """The shape (..., out, window, out, window, features), and where g's axes are in it."""
    first, kept, shape = g.ndim - len(windows) - 1, [], list(g.shape)
    for axis, size in enumerate(windows):
        kept.append(first + 2 * axis)
        shape.insert(kept[-1] + 1, size)
    return shape, [*range(first), *kept, len(shape) - 1]


def _untiled(tiles, space, windows, pads):
    """Windows side by side as x, whose space is this long: no padding, and what is left over."""
    first = tiles.ndim - 2 * len(windows) - 1
    sizes = [tiles.shape[first + 2 * i] * size for i, size in enumerate(windows)]
    x = tiles.reshape(*tiles.shape[:first], *sizes, tiles.shape[-1])
    around = [
        (-low, n + low - size, 0) for n, size, (low, _) in zip(space, sizes, pads, strict=True)
    ]
    if not any(map(any, around)):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [*[(0, 0, 0)] * first, *around, (0, 0, 0)])


def average_pool(
    x: chex.Array,
    window: Sizes,
    *,
    stride: Sizes | None = None,
    padding: Padding = "valid",
    count_padding: bool = True,
) -> jax.Array:
    """y[o] = the mean over window places k of x[o·stride + k − pad], for each feature.

    Args:
        x: `(..., *space, features)`.
        window: its sizes: one number for the two axes of an image, or one for each axis.
        stride: how far it moves; as far as it is long unless given.
        padding: as of `convolution`, "circular" excepted.
        count_padding: whether the zeros of the padding count in the mean, as they do in PyTorch
            unless it is told otherwise.

    Returns:
        y, `(..., *out_space, features)`, of x's dtype; 16-bit floats are summed in float32.

    Local gradient: 1 / n for each of the n entries that count. Nothing is kept. Linear: no kink.

    Raises:
        TypeError: x isn't real floating, or an option isn't of its kind.
        ValueError: the window doesn't fit into x, or options don't fit.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998
    (subsampling).

    >>> average_pool(jnp.arange(16.0).reshape(4, 4, 1), 2)[..., 0].tolist()
    [[2.5, 4.5], [10.5, 12.5]]
    """
    op = "average_pool"
    must_be_real(op, x=x)
    arguments.flag(op, "count_padding", count_padding)
    x = jnp.asarray(x)
    windows, strides, pads, _ = _options(op, x, window, stride, padding, 1)
    space = x.shape[-1 - len(windows) : -1]
    y = window_mean(
        wide(x),
        space=space,
        windows=windows,
        strides=strides,
        pads=pads,
        count_padding=bool(count_padding),
    )
    return y.astype(x.dtype)


@rule
def window_mean(x, *, space, windows, strides, pads, count_padding):
    """`average_pool` with its options spelled out for each axis of space, whose sizes `space` are.

    Axis by axis: a sum of slices, over how many entries count.
    """
    for i, axis in enumerate(range(x.ndim - 1 - len(windows), x.ndim - 1)):
        x = _sum_along(x, axis, windows[i], strides[i], pads[i])
        x = _over_counts(x, axis, space[i], windows[i], strides[i], pads[i], count_padding)
    return x


@window_mean.forward
def _(x, **options):
    return window_mean.definition(x, **options), None


@window_mean.backward
def _(_, g, *, space, windows, strides, pads, count_padding):
    """Each entry of x gets its windows' g, over how many entries count in them."""
    first = g.ndim - 1 - len(windows)
    for i in range(len(windows)):
        counts = space[i], windows[i], strides[i], pads[i], count_padding
        g = _over_counts(g, first + i, *counts)
    if _are_tiles(g, windows, strides):
        shape, kept = _tiles(g, windows)
        return (_untiled(lax.broadcast_in_dim(g, shape, kept), space, windows, pads),)
    for i in range(len(windows)):
        g = _spread_along(g, first + i, space[i], windows[i], strides[i], pads[i])
    return (g,)


@window_mean.tangent
def _(_, dx, **options):
    return window_mean.definition(dx, **options)


def _sum_along(x, axis: int, size: int, stride: int, pad: tuple[int, int]):
    if size == x.shape[axis] and pad == (0, 0):
        return jnp.sum(x, axis, keepdims=True)
    x = with_zeros(x, axis, *pad)
    count = (x.shape[axis] - size) // stride + 1
    stops = [k + (count - 1) * stride + 1 for k in range(size)]
    cut = lambda k: lax.slice_in_dim(x, k, stops[k], stride, axis)
    return functools.reduce(jnp.add, map(cut, range(size)))


def _spread_along(g, axis: int, n: int, size: int, stride: int, pad: tuple[int, int]):
    """Each of g to the `size` entries of x that its window holds, of n and the padding's."""
    terms = []
    for k in range(size):
        around = [(0, 0, 0)] * g.ndim
        around[axis] = _around(g.shape[axis], k - pad[0], stride, n)
        terms.append(lax.pad(g, jnp.zeros((), g.dtype), around))
    return functools.reduce(jnp.add, terms)


def _over_counts(
    x, axis: int, n: int, size: int, stride: int, pad: tuple[int, int], count_padding: bool
):
    """Over how many entries of n count in each window: all, or those that aren't padding."""
    if count_padding:
        return x / size
    starts = np.arange(x.shape[axis]) * stride - pad[0]
    inside = np.minimum(starts + size, n) - np.maximum(starts, 0)
    return x / np.expand_dims(inside, tuple(range(1, x.ndim - axis))).astype(x.dtype)


def adaptive_average_pool(x: chex.Array, sizes: Sizes) -> jax.Array:
    """y[o] = the mean of x[⌊o n / m⌋] … x[⌈(o + 1) n / m⌉ − 1]: n entries to m, along each axis.

    Args:
        x: `(..., *space, features)`.
        sizes: of the output: one number for the two axes of an image, or one for each axis. With 1
            it is the mean over all of space, "global" pooling.

    Returns:
        y, `(..., *sizes, features)`, of x's dtype; 16-bit floats are summed in float32. With the
        windows of PyTorch's AdaptiveAvgPool.

    Local gradient: 1 / n for each of a window's n entries. Nothing is kept. Linear: no kink.

    Raises:
        TypeError: x isn't real floating, or sizes are no integers.
        ValueError: x has too few axes, or an axis of space is empty.

    Source: Lin, Chen, Yan, "Network in network", arXiv:1312.4400 (global average pooling).
    """
    op = "adaptive_average_pool"
    must_be_real(op, x=x)
    x = jnp.asarray(x)
    outs = _axes_of(op, x, "sizes", sizes)
    dtype, x = x.dtype, wide(x)
    for axis, m in enumerate(outs, x.ndim - 1 - len(outs)):
        n = x.shape[axis]
        if n % m == 0:
            x = jnp.mean(x.reshape(*x.shape[:axis], m, n // m, *x.shape[axis + 1 :]), axis + 1)
        else:
            means = np.zeros((m, n))
            for o, (start, stop) in enumerate(_ranges(n, m)):
                means[o, start:stop] = 1 / (stop - start)
            x = jnp.moveaxis(jnp.tensordot(x, jnp.asarray(means, x.dtype), (axis, 1)), -1, axis)
    return x.astype(dtype)


def adaptive_max_pool(x: chex.Array, sizes: Sizes) -> jax.Array:
    """y[o] = max of x[⌊o n / m⌋] … x[⌈(o + 1) n / m⌉ − 1]: n entries become m, along each axis.

    Args:
        x: `(..., *space, features)`.
        sizes: of the output: one number for the two axes of an image, or one for each axis. With 1
            it is the maximum over all of space.

    Returns:
        y, `(..., *sizes, features)`, with the windows of PyTorch's AdaptiveMaxPool.

    Local gradient: as of `max_pool`, of which it is made.

    Raises:
        TypeError: x isn't real floating, or sizes are no integers.
        ValueError: x has too few axes, or an axis of space is empty.
    """
    op = "adaptive_max_pool"
    must_be_real(op, x=x)
    outs = _axes_of(op, x, "sizes", sizes)
    space = len(outs)
    for axis in reversed(range(space)):  # the last axis first: the first place in order
        n, m, at = x.shape[axis - space - 1], outs[axis], x.ndim - 1 - space + axis
        along = lambda size, axis=axis: tuple(size if i == axis else 1 for i in range(space))
        if n % m == 0:
            x = max_pool(x, along(n // m))
        else:
            parts = [lax.slice_in_dim(x, a, b, axis=at) for a, b in _ranges(n, m)]
            x = jnp.concatenate([max_pool(p, along(p.shape[at])) for p in parts], at)
    return x


def _ranges(n: int, m: int) -> list[tuple[int, int]]:
    return [(o * n // m, -(-(o + 1) * n // m)) for o in range(m)]


# ------------------------------------------------------------------------------------ windows


def _options(op: str, x, window, stride, padding, dilation) -> tuple[tuple, tuple, tuple, tuple]:
    """The window, the stride, the padding and the dilation, for each axis of space."""
    windows = _axes_of(op, x, "window", window)
    space = len(windows)
    strides = windows if stride is None else sizes_of(op, "stride", stride, space)
    dilations = sizes_of(op, "dilation", dilation, space)
    sizes = x.shape[-1 - space : -1]
    reach = [1 + d * (k - 1) for k, d in zip(windows, dilations, strict=True)]
    pads = tuple(pads_of(op, padding, sizes, reach, strides))
    for n, r, (low, high) in zip(sizes, reach, pads, strict=True):
        if n + low + high < r:
            raise ValueError(
                f"{op}: a window {windows} doesn't fit into argument 'x' of shape {x.shape}, whose "
                f"space is {tuple(sizes)}, with padding {list(pads)}."
            )
        if max(low, high) >= r:
            raise ValueError(
                f"{op}: the padding must be less than the window, but got {list(pads)} for a "
                f"window {windows}: some would see nothing of x."
            )
    return windows, strides, pads, dilations


def _axes_of(op: str, x, name: str, value) -> tuple[int, ...]:
    """A size for each axis of space: of an image's two where it is one number."""
    space = len(value) if isinstance(value, (tuple, list)) else 2
    sizes = sizes_of(op, name, value, space)
    if x.ndim < space + 1 or 0 in x.shape[-1 - space : -1]:
        raise ValueError(
            f"{op}: argument 'x' has shape {x.shape}, wanted (..., *space, features) with {space} "
            f"axes of space that aren't empty, for {name}={value}."
        )
    return sizes


def _padded(x, pads: Sequence[tuple[int, int]], value: float):
    if not any(map(any, pads)):
        return x
    lead = [(0, 0)] * (x.ndim - len(pads) - 1)
    return jnp.pad(x, [*lead, *pads, (0, 0)], constant_values=value)


def _patches(x, windows, strides, dilations) -> list:
    """For each place of the window, what it meets: x[..., o·stride + place·dilation, :]."""
    first, found = x.ndim - 1 - len(windows), []
    for place in np.ndindex(*windows):
        start, stop, step = [0] * x.ndim, list(x.shape), [1] * x.ndim
        for i, at in enumerate(place):
            axis, reach = first + i, 1 + dilations[i] * (windows[i] - 1)
            count = (x.shape[axis] - reach) // strides[i] + 1
            start[axis], step[axis] = at * dilations[i], strides[i]
            stop[axis] = start[axis] + (count - 1) * strides[i] + 1
        found.append(lax.slice(x, start, stop, step))
    return found
