"""The gradient of a convolution's weight on CPUs.

It is a convolution whose "window" is a whole image, and whose output has but few places: `w` has
more places here than `out`. Elsewhere x is (batch, space..., features); here the batch is what the
weight has for features in, and the features are the images, over which it sums.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy
from jax import lax

from fnn.convolution import windows
from fnn.convolution.windows import (
    Window,
    matrix_of,
    padded,
    patch_at,
    patch_rows,
    patches_by_group,
    repeated,
    sum_of_blocks,
    with_zeros,
)

# Of fewer features than these, patches are made row by row, not pixel by pixel; and products pay
# for colour images only.
_MANY = 16

# Neighbours stand side by side of so many features in or fewer, up to so many features out, where
# there are so many multiplications.
_FEW_IN, _SIDE_BY_SIDE, _WORTH = 4, 128, 2**22


def weight_as_it_lies(x, w, window: Window, out, y_spec, **how) -> jax.Array | None:
    """A weight's gradient of fewer pixels than features, made in the order of its axes.

    As `place_by_place`; None where that isn't faster, or the axes lie between one another.
    """
    features, outs, pixels = x.shape[0], w.shape[-1], math.prod(w.shape[:-1])
    side, inner = matrix_of(y_spec[1], y_spec[0], y_spec[2:])
    count = math.prod(out)
    if side is None or pixels > outs or count == 1 or features * outs * count < windows.LARGE:
        return None
    x, g = _as_images(x, w)
    sizes = g.shape[1:-1]
    a = patch_rows(padded(x, window), out, sizes, window.holes, window.strides, inner)
    g = lax.reshape(g, (pixels, outs))
    pair = (g, a) if side == 0 else (a, g)
    y = lax.dot_general(*pair, (((0,), (0,)), ((), ())), **how)
    rest = (features, *out) if inner == 0 else (*out, features)
    return lax.reshape(y, (outs, *rest) if side == 0 else (*rest, outs))


def neighbours(x, w, window: Window, out) -> int:
    """How many places of g, side by side, are features of one place; 1 where that isn't faster.

    As measured, of few features in. Of three axes of space the library is slow at all of them.
    """
    features, outs, length, wide = x.shape[0], w.shape[-1], w.shape[-3], out[-1]
    stride, hole = window.holes[-1], window.strides[-1]
    work = features * math.prod(out) * math.prod(w.shape[:-1]) * outs
    if features > _FEW_IN or math.prod(out) == 1 or work < _WORTH:
        return 1
    most = min(4 if outs > 6 else 8, _SIDE_BY_SIDE // outs)
    fits = lambda n: length % n == 0 and _span(n, window, out) <= 2 * wide
    number = next(filter(fits, range(most, 1, -1)), 1)
    columns, is_even = number * outs, stride == 1
    if len(out) > 2:
        pays = outs <= 24 or (is_even and hole == 1)
    elif hole > 1:
        pays = False
    elif features == 1:
        pays = is_even and columns >= 24
    else:
        pays = outs > 24 or (outs > 16 and is_even and wide <= 5)
        pays = pays and work >= 2 * _WORTH and columns >= 64
    return number if pays else 1


def _span(number: int, window: Window, out) -> int:
    """How many places of x so many neighbours' windows meet, along the last axis of space."""
    return (number - 1) * window.holes[-1] + (out[-1] - 1) * window.strides[-1] + 1


def by_neighbours(x, w, window: Window, out, number: int, **how) -> jax.Array:
    """A weight's gradient, as `place_by_place`: of so many neighbours in g, as more features.

    What all their windows meet together is multiplied with all of them, in one product of more
    columns and fewer rows. Of its entries those are summed in which the window's place is the same.
    """
    x, g = _as_images(x, w)
    sizes, outs, features = g.shape[1:-1], g.shape[-1], x.shape[-1]
    span, stride, hole = _span(number, window, out), window.holes[-1], window.strides[-1]
    count, rows = sizes[-1] // number, out[:-1]
    step = number * stride
    pieces = -(-span // step)

    def of_some(x, g):
        x = padded(x, window)
        length = (count + pieces - 1) * step
        x = with_zeros(x, x.ndim - 2, 0, length - x.shape[-2])
        x = lax.reshape(x, (*x.shape[:-2], length // step, step * features))
        met, axis = [], x.ndim - 1
        for piece in range(pieces):
            part = lax.slice_in_dim(x, piece, piece + count, axis=axis - 1)
            most = min(step, span - piece * step) * features
            met.append(lax.slice_in_dim(part, 0, most, axis=axis))
        x = lax.concatenate(met, axis)
        found = []
        for place in numpy.ndindex(*rows):
            one = (*sizes[:-1], count), (*window.holes[:-1], 1), (*window.strides[:-1], 1)
            found.append(patch_at(x, (*place, 0), *one))
        a = lax.concatenate(found, axis)
        pixels = a.size // a.shape[-1]
        pair = lax.reshape(a, (pixels, a.shape[-1])), lax.reshape(g, (pixels, number * outs))
        return lax.dot_general(*pair, (((0,), (0,)), ((), ())), **how)

    entries = max(math.prod(rows) * span * features, number * outs)
    bytes_each = math.prod(sizes[:-1]) * count * entries * x.dtype.itemsize
    # In a loop g lies in memory. Else what computes g is compiled for its new shape, and is slow.
    most = max(1, min(windows.FOR_PIXELS // bytes_each, x.shape[0] // 2))
    total = sum_of_blocks(of_some, x, g, most)
    total = lax.reshape(total, (*rows, span, features, number, outs))
    terms = []
    for i in range(number):
        own = lax.index_in_dim(total, i, total.ndim - 2, keepdims=False)
        own = lax.slice_in_dim(
            own, i * stride, i * stride + (out[-1] - 1) * hole + 1, hole, len(rows)
        )
        terms.append(own)
    y = functools.reduce(lax.add, terms)
    last = y.ndim - 2
    return lax.transpose(y, (last, *range(last), last + 1))


def pays_as_product(x, w, out) -> bool:
    """Whether a weight's gradient is faster as a product of patches than by the library.

    As measured. To 16 features out or fewer the library takes all cores; to some more it is slow,
    the slower the more pixels there are. Patches are slow where one image's outgrow the cache.

    Args:
        x, w: as for `place_by_place`.
        out: how many places the weight's window has, by axis.
    """
    features, outs = x.shape[0], w.shape[-1]
    size = math.prod(w.shape[:-2])
    if features < _MANY:
        return 1 < features <= 8 and outs >= 32 and size > windows.FEW
    bytes_each = size * math.prod(out) * features * x.dtype.itemsize
    if outs >= 48:
        return features >= 64 or bytes_each <= 2 * windows.FOR_ALL_CORES
    least, most = 2**16, windows.CACHED
    if windows.ROWS_ON_ONE_CORE:
        least, most = 2**13, 2 * windows.FOR_ALL_CORES
    return outs > 16 and size * w.shape[-2] >= least and bytes_each <= most


def pays_for_each(x, w, window: Window, out, groups: int) -> bool:
    """Whether a weight's gradient is faster as a convolution for each group of features.

    As measured. The images are its features in: of few the library is slow, and of three axes.
    """
    features, each, images = x.shape[0] // groups, w.shape[-1] // groups, w.shape[-2]
    is_plain = math.prod(out) > 1 and all(d == 1 for d in window.between)
    if not is_plain or groups > 32 or features == 1 or x.ndim > 4:
        return False
    is_same = w.shape[:-2] == x.shape[1:-1]
    to_few = windows.ROWS_ON_ONE_CORE or each <= 32
    return features <= _MANY or (images >= 8 and is_same and to_few)


def place_by_place(x, w, window: Window, out, groups: int, **how) -> jax.Array:
    """A weight's gradient: (features, space..., images) with (space..., images, outs).

    As a product of patches of some images with the images of w, summed over the images.
    """
    x, g = _as_images(x, w)
    sizes, outs, features = g.shape[1:-1], g.shape[-1], x.shape[-1]
    ins, each = features // groups, outs // groups
    x, g = lax.optimization_barrier((x, g))
    strides, holes = window.holes, window.strides
    pixel_by_pixel = groups == 1 and features >= _MANY and math.prod(out) > 1
    # A product of few rows and many columns is faster than of many and few.
    outs_first = pixel_by_pixel and outs <= math.prod(out) * features

    def sums_of(x, g, places):
        found = []
        for place in numpy.ndindex(*places):
            patch = repeated(patch_at(x, place, sizes, strides, holes), each)
            terms = lax.mul(patch, g)
            by_product = each > 1 or terms.size * x.dtype.itemsize <= windows.CACHED // 4
            total = _sum_by_feature(terms, by_product, **how)
            found.append(lax.reshape(total, (groups, 1, each)))
        return lax.concatenate(found, 1)

    def of_some(x, g):
        x = padded(x, window)
        if ins == 1 and groups > 1:  # one feature in: sums, and no patches
            if math.prod(out) <= windows.MANY:
                return sums_of(x, g, out)
            length = (sizes[0] - 1) * strides[0] + 1

            def row(_, i):
                met = lax.dynamic_slice_in_dim(x, i * holes[0], length, axis=1)
                return None, sums_of(met, g, (1, *out[1:]))

            rows = lax.scan(row, None, jnp.arange(out[0], dtype=jnp.int32))[1]
            rows = lax.transpose(rows, (1, 0, 2, 3))
            return lax.reshape(rows, (groups, math.prod(out), each))
        if groups > 1:
            a = patches_by_group(x, out, sizes, strides, holes, groups)
            b = lax.reshape(g, (a.shape[0], groups, each))
            return lax.dot_general(a, b, (((0,), (0,)), ((1,), (1,))), **how)
        b = lax.reshape(g, (math.prod(g.shape[:-1]), outs))
        if pixel_by_pixel:
            a = patch_rows(x, out, sizes, strides, holes, inner=1)
            pair = (b, a) if outs_first else (a, b)
            return lax.dot_general(*pair, (((0,), (0,)), ((), ())), **how)
        # (places · features, images · sizes): whole rows of x are copied.
        x = lax.transpose(x, (x.ndim - 1, *range(x.ndim - 1)))
        found = []
        for place in numpy.ndindex(*out):
            patch = patch_at(x, place, sizes, strides, holes, first=2)
            found.append(lax.reshape(patch, (features, b.shape[0])))
        a = lax.concatenate(found, 0) if len(found) > 1 else found[0]
        return lax.dot_general(a, b, (((1,), (0,)), ((), ())), **how)

    if math.prod(out) == 1:  # there are no patches to be made
        total = of_some(x, g)
    else:
        bytes_each = math.prod(sizes) * math.prod(out) * features * x.dtype.itemsize
        most = windows.FOR_ALL_CORES if groups == 1 else windows.CACHED
        total = sum_of_blocks(of_some, x, g, max(1, most // bytes_each))
    if outs_first:
        total = lax.transpose(total, (1, 0))
    # (groups, places..., ins, each) -> (ins, places..., groups, each)
    y = lax.reshape(total, (groups, *out, ins, each))
    last = y.ndim - 1
    y = lax.transpose(y, (last - 1, *range(1, last - 1), 0, last))
    return lax.reshape(y, (ins, *out, outs))


def _as_images(x, w) -> tuple[jax.Array, jax.Array]:
    """What is multiplied: (images, space..., features) and (images, space..., outs)."""
    x = lax.transpose(x, (x.ndim - 1, *range(1, x.ndim - 1), 0))
    return x, lax.transpose(w, (w.ndim - 2, *range(w.ndim - 2), w.ndim - 1))


def _sum_by_feature(terms, by_product: bool, **how) -> jax.Array:
    """Over all axes but the last.

    by_product: with ones, which is faster of what the cache holds, and of repeated features.
    """
    if not by_product:
        return lax.reduce_sum(terms, range(terms.ndim - 1))
    terms = lax.reshape(terms, (math.prod(terms.shape[:-1]), terms.shape[-1]))
    ones = lax.full_like(terms, 1, shape=(1, terms.shape[0]))
    return lax.dot_general(ones, terms, (((1,), (0,)), ((), ())), **how)
