"""Convolution on CPUs: by XLA's library where that is fast, by products and sums elsewhere.

    y[n, o, f] = Σ over window places k and features c of x[n, o·stride + k, c] w[k, c, f]

XLA's CPU library is fast where x is (batch, space..., features) and w (window..., in, out). Other
orders of axes it brings into this one, but inside a loop it doesn't, and runs them up to a hundred
times slower. So the axes are put in this order here. What the library is slow at goes otherwise:

* In JAX 0.10 the library shares among the cores what is in a row of y, if that is much, but never
  rows or images. So the images are put side by side, as one wide image, and it uses all cores.
* The gradient of a weight is a convolution whose "window" is a whole image and whose output has
  but few places. Of many features in and out, and of a colour image's few, it is faster as one
  product of g with the images' patches (im2col), made for a few images at a time.
  The fewer of the two, outputs or features times places, are the product's rows: of many rows and
  few columns it takes up to twice as long.
* XLA computes the gradient of a weight of groups as one of all features, of which it keeps the
  groups' own: as many times the work as there are groups. It is made place by place of the window.
* Of some groups of features, each is a convolution of its own; of many small ones, all are one
  product of patches.
* With one feature in (a grey image; a depthwise convolution) there is no product to be done:
  shifted copies of x are multiplied and added, but for many features out. The sums of the weight's
  gradient are products with ones, where the cache holds what is summed.
* To few features, each pixel is multiplied with all of the window's weights in one product, whose
  parts are then shifted and added. So it is where y is larger than x, as the gradient of the input
  is if that had no padding: the library would multiply the zeros around x. Of one pixel alone
  nothing is left to be added.
* From few features, the rows of the input that a row of the window meets stand side by side, as
  more features. To few, the rows of the window do; what each gives is then shifted and added. The
  library has a window of one row then, and more features, of which it is faster.
* The gradient of a weight of few features in: neighbours of g stand side by side, as more features,
  beside what their windows meet of x together. The product has more columns and fewer rows then. It
  does up to twice the multiplications, and takes half the time.
* From some numbers of features the library is slow: they are filled up with zeros.
* A window of one place is a product alone.
* Where there are fewer pixels than features, most of the time would go to bringing the weights into
  another order of axes: they are multiplied as they lie, with patches or with single pixels.
* A stride's gradient is a convolution of an x with zeros between its entries. Those zeros are
  left out: each of the stride's phases is a convolution with every stride-th entry of the window.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy
from jax import lax

from fnn.convolution import weights, windows
from fnn.convolution.windows import (
    Window,
    block_by_block,
    in_order_of,
    in_usual_order,
    matrix_of,
    out_space,
    padded,
    patch_at,
    patch_rows,
    patches_by_group,
    with_zeros,
)
from fnn.meshes import sharding_of

# For so few features out, the library is slower than products of single pixels, then shifted.
_NARROW = 3

# To so many features or fewer, XLA's library takes other functions than to more.
_SMALL = 16


def convolution(x, w, **params) -> jax.Array:
    """`conv_general_dilated` with JAX's parameters."""
    found = _by_formula(x, w, **params)
    if found is not None:
        return found
    axes = params["dimension_numbers"].lhs_spec[2:]
    x, padding = _cropped(x, axes, params["padding"], params["lhs_dilation"])
    return lax.conv_general_dilated_p.bind(x, w, **params | {"padding": padding})


def has_formula(x: Any, w: Any, **params: Any) -> bool:
    """Whether `convolution` computes arrays of these types by a formula of fnn's own."""
    found: list = []
    jax.eval_shape(lambda x, w: found.append(_by_formula(x, w, **params)), x, w)
    return found[0] is not None


def _by_formula(
    x,
    w,
    *,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    feature_group_count,
    batch_group_count,
    precision,
    preferred_element_type,
    out_sharding=None,
    **others,
) -> jax.Array | None:
    """The convolution by a formula of fnn's own; None where XLA's own is left to do it."""
    is_plain = x.dtype == w.dtype and x.dtype in (jnp.float32, jnp.float64)
    if not is_plain or preferred_element_type not in (None, x.dtype) or others:
        return None
    if out_sharding is not None or any(sharding_of(a) is not None for a in (x, w)):
        return None
    _, w_spec, y_spec = dimension_numbers
    as_it_lies = w
    x, w = in_usual_order(x, w, dimension_numbers)
    window = Window(*map(tuple, (window_strides, map(tuple, padding), lhs_dilation, rhs_dilation)))
    out = out_space(x, w, window)
    if min(*x.shape, *w.shape, *out, 1) == 0:
        return None
    how = {"precision": precision}
    places, out_places = math.prod(w.shape[:-2]), math.prod(out)
    is_gradient = places > out_places and feature_group_count == 1  # of a weight
    if max(feature_group_count, batch_group_count) == 1:
        if _is_of_one_pixel(x, window):
            return in_order_of(_of_one_pixel(x, as_it_lies, w_spec, window, out, **how), y_spec)
        if is_gradient:
            y = weights.weight_as_it_lies(x, w, window, out, y_spec, **how)
            if y is not None:
                return y
        else:
            y = _with_w_as_it_lies(x, as_it_lies, w_spec, window, out, **how)
            if y is not None:
                return in_order_of(y, y_spec)
    if batch_group_count > 1:
        if is_gradient and weights.pays_for_each(x, w, window, out, batch_group_count):
            y = _for_each_group(x, 0, w, window, out, batch_group_count, **how)
        elif is_gradient or out_places <= windows.MANY or x.shape[0] == batch_group_count:
            # Many places are no matter where each group has one feature: their rows are a loop.
            y = weights.place_by_place(x, w, window, out, batch_group_count, **how)
        else:
            return None
    elif is_gradient and (number := weights.neighbours(x, w, window, out)) > 1:
        y = weights.by_neighbours(x, w, window, out, number, **how)
    elif is_gradient and (out_places == 1 or weights.pays_as_product(x, w, out)):
        y = weights.place_by_place(x, w, window, out, batch_group_count, **how)
    elif places == 1 and feature_group_count == 1 and _moves_one_way(window):
        y = _pixel_by_pixel(x, w, window, **how)
    elif any(d > 1 for d in window.between):
        y = _phase_by_phase(x, w, window, out, feature_group_count, **how)
    else:
        y = _window_by_window(x, w, window, out, feature_group_count, **how)
    return in_order_of(y, y_spec)


def _is_of_one_pixel(x, window: Window) -> bool:
    moves = (*window.strides, *window.holes)
    return (
        math.prod(x.shape[1:-1]) == 1 and set(moves) == {1} and min(map(min, window.padding)) >= 0
    )


def _of_one_pixel(x, w, w_spec, window: Window, out, **how) -> jax.Array:
    """y[o] = x w[low - o]: the product with as much of w, read backwards, as meets the pixel."""
    space = w_spec[2:]
    crops, pads = [(0, 0, 0)] * w.ndim, []
    # `before` and `after` are of w read backwards.
    for axis, (low, _), n in zip(space, window.padding, out, strict=True):
        before = low - w.shape[axis] + 1  # y's places before the first of w, or those of w before y
        after = n - w.shape[axis] - before
        crops[axis] = (min(after, 0), min(before, 0), 0)
        pads.append((max(before, 0), max(after, 0), 0))
    zero = lax.full_like(x, 0, shape=())
    w = lax.rev(lax.pad(w, zero, crops), space)
    pixels = lax.reshape(x, (x.shape[0], x.shape[-1]))
    y = lax.dot_general(pixels, w, (((1,), (w_spec[1],)), ((), ())), **how)
    places = [axis + (axis < w_spec[1]) for axis in (*space, w_spec[0])]
    return lax.pad(lax.transpose(y, (0, *places)), zero, [(0, 0, 0), *pads, (0, 0, 0)])


def _with_w_as_it_lies(x, w, w_spec, window: Window, out, **how) -> jax.Array | None:
    """Of fewer pixels than features: w's matrix with patches of x, or with pixels and then shifted.

    None where that isn't faster, or w's axes lie between one another.
    """
    outs, ins = w.shape[w_spec[0]], w.shape[w_spec[1]]
    kernel = tuple(w.shape[d] for d in w_spec[2:])
    pixels, count = x.shape[0] * math.prod(x.shape[1:-1]), math.prod(kernel)
    if w.size < windows.LARGE or count == 1:
        return None
    side, inner = matrix_of(w_spec[0], w_spec[1], w_spec[2:])
    if side is not None and x.shape[0] * math.prod(out) <= outs:
        a = patch_rows(padded(x, window), kernel, out, window.strides, window.holes, inner)
        matrix = lax.reshape(w, (outs, ins * count) if side == 0 else (ins * count, outs))
        y = lax.dot_general(a, matrix, (((1,), (1 - side,)), ((), ())), **how)
        return lax.reshape(y, (x.shape[0], *out, outs))
    side, inner = matrix_of(w_spec[1], w_spec[0], w_spec[2:])
    if side is None or pixels > ins:
        return None
    # Of usual orders of axes only an input's gradient comes here. Its w was read backwards, which
    # took longer than all else that is done with it, and is undone.
    w = lax.rev(w, w_spec[2:])
    matrix = lax.reshape(w, (ins, outs * count) if side == 0 else (outs * count, ins))
    return _pixels_then_shifts(x, matrix, side, inner, kernel, window, out, backwards=True, **how)


def _pixels_then_shifts(
    x, matrix, side: int, inner: int, kernel, window: Window, out, backwards: bool = False, **how
) -> jax.Array:
    """Σₖ (x w[k]) at o·stride + k: one product of each pixel with all of w, and then sums.

    Args:
        matrix, side, inner: all of w, with the features of x on that side; see `matrix_of`.
        backwards: whether w's last place comes first.
    """
    pixels = lax.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
    found = lax.dot_general(pixels, matrix, (((1,), (side,)), ((), ())), **how)
    count = math.prod(kernel)
    outs = found.shape[1] // count
    found = lax.reshape(found, (*x.shape[:-1], *((outs, count) if inner == 0 else (count, outs))))
    total: Any = None
    for k, place in enumerate(numpy.ndindex(*kernel)):
        k = count - 1 - k if backwards else k
        term = lax.index_in_dim(found, k, found.ndim - (1 if inner == 0 else 2), False)
        term = patch_at(padded(term, window), place, out, window.strides, window.holes)
        total = term if total is None else lax.add(total, term)
    return total


def _window_by_window(x, w, window: Window, out, groups: int, **how) -> jax.Array:
    few = math.prod(w.shape[:-2]) <= windows.FEW
    if w.shape[-2] == 1 and _to_many(x, w, window, out, groups):
        if groups == 1:
            return _library(x, w, window, out, **how)
        return _for_each_group(x, x.ndim - 1, w, window, out, groups, **how)
    if w.shape[-2] == 1 and (few or groups > 1):
        return _multiply_and_add(x, w, window, out, groups)
    if 1 < groups <= 16 and _pays_for_each(w, groups):
        return _for_each_group(x, x.ndim - 1, w, window, out, groups, **how)
    if groups > 1:
        return _in_groups(x, w, window, out, groups, **how)
    if _stays(window) and few:
        if _few_in(x, w):
            return _rows_as_features(x, w, window, out, **how)
        if _grows_by_rows(x, w, out):
            return _rows_of_window(x, w, window, out, **how)
        if _grows(x, w, out):
            return _pixel_products(x, w, window, out, windows.FOR_PIXELS, **how)
        if _pays_by_rows(x, w, out):
            return _rows_of_window(x, w, window, out, **how)
        if w.shape[-1] <= _NARROW:
            return _pixel_products(x, w, window, out, windows.CACHED // 4, **how)
    ins = _filled(w.shape[-2], w.shape[-1], window)
    x, w = _with_features(x, x.ndim - 1, ins), _with_features(w, w.ndim - 2, ins)
    return _library(x, w, window, out, **how)


def _to_many(x, w, window: Window, out, groups: int) -> bool:
    """Whether the library is faster than sums, from one feature to so many; as measured."""
    is_flat = w.ndim == 4 and x.dtype == jnp.float32  # of others the library is slow
    if not is_flat or groups > 16 or w.shape[-1] < 24 * groups:
        return False
    least = 25
    if windows.ROWS_ON_ONE_CORE:
        least = 4 if groups == 1 else 16
    # Of other paddings than "same" and "valid" it is slow, and where y is large.
    usual = all(
        pads == (0, 0) or n == -(-size // stride)
        for pads, n, size, stride in zip(
            window.padding, out, x.shape[1:-1], window.strides, strict=True
        )
    )
    entries, places = x.shape[0] * math.prod(out) * w.shape[-1], math.prod(w.shape[:-2])
    is_large = entries * x.dtype.itemsize > 2 * windows.FOR_PIXELS
    is_worth = groups == 1 or entries * places >= 2**19 * groups
    return usual and not is_large and is_worth and places >= least


def _pays_for_each(w, groups: int) -> bool:
    """Whether a convolution for each group is faster than one product, as measured."""
    ins, outs = w.shape[-2], w.shape[-1] // groups
    is_flat = w.ndim <= 4 and math.prod(w.shape[:-2]) > 1  # of three axes the library is slow
    to_few = is_flat and (ins >= 8 or (ins >= 4 and outs == 1))
    return to_few or min(ins, outs) >= 8


def _stays(window: Window) -> bool:
    return all(n == 1 for n in (*window.strides, *window.between))


def _grows(x, w, out) -> bool:
    """Whether y has so many more pixels than x that products of x's alone are less work."""
    ins, outs = w.shape[-2:]
    before, after = math.prod(x.shape[1:-1]), math.prod(out)
    if ins < 12 or 2 * ins < outs or after < 1.6 * before:
        return False
    whole = x.shape[0] * before * math.prod(w.shape[:-2]) * outs * x.dtype.itemsize
    if after < 3 * before and whole > windows.FOR_PIXELS:  # in a loop the sums take one core
        return False
    # What is saved of products must be worth the sums.
    return math.prod(w.shape[:-2]) <= 9 or outs <= _SMALL or ins * (1 - before / after) >= 26


def _grows_by_rows(x, w, out) -> bool:
    """Whether y has so many more rows than x that products of x's alone are less work."""
    rows, (ins, outs) = w.shape[0], w.shape[-2:]
    is_wide = 12 <= ins < 128 and 4 <= outs <= 64
    return w.ndim > 3 and rows >= 4 and 4 * out[0] >= 5 * x.shape[1] and is_wide


def _pixel_products(x, w, window: Window, out, most: int, **how) -> jax.Array:
    """All places' products with a pixel side by side, and then sums.

    Args:
        most: for so many images at a time that their products have as many bytes as this.
    """
    *kernel, ins, outs = w.shape
    count, inner = math.prod(kernel), int(outs > _NARROW)
    order = (*range(len(kernel)), w.ndim - 1) if inner else (w.ndim - 1, *range(len(kernel)))
    matrix = lax.reshape(lax.transpose(w, (w.ndim - 2, *order)), (ins, outs * count))
    x = lax.optimization_barrier(x)
    of_some = lambda x: _pixels_then_shifts(x, matrix, 0, inner, kernel, window, out, **how)
    bytes_each = math.prod(x.shape[1:-1]) * outs * count * x.dtype.itemsize
    return block_by_block(of_some, x, max(1, most // bytes_each))


def _few_in(x, w) -> bool:
    """Whether rows side by side, as features, are faster than these few features."""
    return (
        w.ndim > 3
        and 1 < w.shape[0] <= x.shape[1]
        and 1 < w.shape[-2] <= 4 <= w.shape[-1] <= _SMALL
    )


def _rows_as_features(x, w, window: Window, out, **how) -> jax.Array:
    """What each row of the window meets of x, side by side, for a window of one row."""
    rows, *rest, ins, outs = w.shape
    w = lax.transpose(w, (*range(1, w.ndim - 2), 0, w.ndim - 2, w.ndim - 1))
    w = lax.reshape(w, (1, *rest, rows * ins, outs))
    count = rows * ins
    count += -count % 8 if count % 8 in (6, 7) else 0
    w = _with_features(w, w.ndim - 2, count)

    def of_some(x):
        met = lax.concatenate(_met_by_rows(x, rows, window, out[0]), x.ndim - 1)
        x = _with_features(met, x.ndim - 1, count)
        return _library(x, w, _of_one_row(window), out, **how)

    bytes_each = out[0] * math.prod(x.shape[2:-1]) * count * x.dtype.itemsize
    return block_by_block(of_some, x, max(1, windows.FOR_PIXELS // bytes_each))


def _pays_by_rows(x, w, out) -> bool:
    """Whether a window's rows side by side, as features, are faster than one by one.

    Each is multiplied with all rows of x: these must not be many more than those of y. The other
    bounds were found by measuring.
    """
    if w.ndim <= 3 or not 1 < w.shape[0] <= x.shape[1] or 5 * x.shape[1] > 6 * out[0]:
        return False
    rows, (ins, outs) = w.shape[0], w.shape[-2:]
    if ins <= 4 or (rows == 2 and ins <= 8):
        return False
    if out[0] > x.shape[1]:
        return (_NARROW if rows < 5 else 2) < outs <= (8 if rows >= 5 else 7)
    if rows >= 5 and ins <= 24:
        return _NARROW <= outs <= (8 if rows >= 7 else 7)
    return 5 <= outs <= (7 if rows >= 5 else 6) or (4 <= outs <= 7 and ins <= 16)


def _rows_of_window(x, w, window: Window, out, **how) -> jax.Array:
    """x with each row of the window, side by side as features; then shifted and added."""
    rows, *rest, ins, outs = w.shape
    w = lax.transpose(w, (*range(1, w.ndim - 1), 0, w.ndim - 1))
    w = lax.reshape(w, (1, *rest, ins, rows * outs))
    places = [x.shape[1], *out[1:]]

    def of_some(x):
        y = _library(x, w, _of_one_row(window), places, **how)
        y = lax.reshape(y, (*y.shape[:-1], rows, outs))
        met = _met_by_rows(y, rows, window, out[0])
        terms = [lax.index_in_dim(m, i, m.ndim - 2, False) for i, m in enumerate(met)]
        return functools.reduce(lax.add, terms)

    bytes_each = math.prod(places) * rows * outs * x.dtype.itemsize
    return block_by_block(of_some, x, max(1, windows.FOR_PIXELS // bytes_each))


def _met_by_rows(x, rows: int, window: Window, count: int) -> list[jax.Array]:
    """What each of the window's rows meets of x: so many rows, zeros around included."""
    x, hole = with_zeros(x, 1, *window.padding[0]), window.holes[0]
    return [lax.slice_in_dim(x, i * hole, i * hole + count, axis=1) for i in range(rows)]


def _of_one_row(window: Window) -> Window:
    """The window when its rows and their zeros are taken care of."""
    return window._replace(padding=((0, 0), *window.padding[1:]), holes=(1, *window.holes[1:]))


def _filled(ins: int, outs: int, window: Window) -> int:
    """With how many features, some of them zeros, the library is fastest."""
    if 4 < ins < 8 and outs <= _SMALL and _stays(window):
        return 8
    if windows.ROWS_ON_ONE_CORE and ins > 1 and ins % 2 and _SMALL < outs <= 32:
        return -(-ins // 4) * 4
    return ins


def _with_features(x, axis: int, count: int) -> jax.Array:
    """Zeros after what there is along this axis, so that there are so many."""
    return with_zeros(x, axis, 0, count - x.shape[axis])


def _moves_one_way(window: Window) -> bool:
    """Is there no stride, or are there no zeros between the entries of x?"""
    return all(s == 1 for s in window.strides) or all(d == 1 for d in window.between)


def _pixel_by_pixel(x, w, window: Window, **how) -> jax.Array:
    """A window of one place: the product of some pixels with w, or of all, and zeros between."""
    w = lax.reshape(w, w.shape[-2:])
    product = lambda x: lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), **how)
    if any(s > 1 for s in window.strides):
        x = padded(x, window)
        return product(lax.slice(x, (0,) * x.ndim, x.shape, (1, *window.strides, 1)))
    return padded(product(x), window)


def _library(x, w, window: Window, out, **how) -> jax.Array:
    """XLA's library, the axes in the order that it wants."""
    if out and _is_on_one_core(x, w, window, out[-1]):
        return _side_by_side(x, w, window, out[-1], **how)
    return _plain(x, w, window, **how)


def _plain(x, w, window: Window, **how) -> jax.Array:
    """The batch as it is."""
    n = x.ndim
    numbers = lax.ConvDimensionNumbers(
        (0, n - 1, *range(1, n - 1)), (n - 1, n - 2, *range(n - 2)), (0, n - 1, *range(1, n - 1))
    )
    strides, padding, between, holes = window
    x, padding = _cropped(x, range(1, n - 1), padding, between)
    return lax.conv_general_dilated(x, w, strides, padding, between, holes, numbers, **how)


def _cropped(x, axes, padding, between) -> tuple[jax.Array, tuple]:
    """x padded where its first entries are left out and zeros follow the last, and what remains.

    There XLA's library reads beyond x instead (https://github.com/openxla/xla/issues/48713).
    """
    pads, remaining = [(0, 0, 0)] * x.ndim, list(map(tuple, padding))
    for i, (axis, (low, high), d) in enumerate(zip(axes, padding, between, strict=True)):
        if low < 0 < high and d == 1:
            pads[axis], remaining[i] = (low, high, 0), (0, 0)
    if any(map(any, pads)):
        x = lax.pad(x, lax.full_like(x, 0, shape=()), pads)
    return x, tuple(remaining)


def _is_on_one_core(x, w, window: Window, places: int) -> bool:
    """Whether the library would leave all cores but one idle, and others have enough to do.

    Of few weights, to bring the images side by side takes longer than the other cores save.

    places: how many entries an output row has. The bounds were found by measuring.
    """
    count, outs, weights = x.shape[0], w.shape[-1], math.prod(w.shape[:-1])
    size = math.prod(w.shape[:-2])
    shares_features = outs >= 128 and (weights >= 1152 or places * outs > 4096)
    is_small = weights < (112 if size >= 9 and max(window.strides) == 1 else 240)
    return (
        windows.ROWS_ON_ONE_CORE
        and x.dtype == jnp.float32
        and count >= 8
        and outs > _SMALL  # to fewer, the library's other functions use all cores
        and size <= windows.FEW
        and not is_small
        and not shares_features
    )


def _side_by_side(x, w, window: Window, places: int, **how) -> jax.Array:
    """The images side by side, as one with long rows; the zeros between two are those of both.

    places: how many entries a row of one output has.
    """
    count, *front, width, features = x.shape
    last = x.ndim - 2
    stride, (low, high), hole = window.strides[-1], window.padding[-1], window.holes[-1]
    x = lax.slice_in_dim(x, max(0, -low), width + min(0, high), axis=last)
    low, high, width = max(low, 0), max(high, 0), x.shape[last]
    pitch = -(-(width + max(low, high)) // stride) * stride
    pads = [(0, 0, 0)] * last + [(0, pitch - width, 0), (0, 0, 0)]
    x = lax.pad(x, lax.full_like(x, 0, shape=()), pads)
    x = lax.transpose(x, (*range(1, last), 0, last, last + 1))
    x = lax.reshape(x, (1, *front, count * pitch, features))
    beyond = max(0, hole * (w.shape[-3] - 1) + 1 - stride - low)  # of the last window
    wide = window._replace(padding=(*window.padding[:-1], (low, beyond)))
    y = _plain(x, w, wide, **how)
    each = pitch // stride
    y = lax.slice_in_dim(y, 0, count * each, axis=last)
    y = lax.reshape(y, (*y.shape[1:last], count, each, y.shape[-1]))
    y = lax.slice_in_dim(y, 0, places, axis=last)
    return lax.transpose(y, (last - 1, *range(last - 1), last, last + 1))


def _multiply_and_add(x, w, window: Window, out, groups: int) -> jax.Array:
    """Σₖ x[o·stride + k] ∘ w[k], where each output feature comes of one input feature.

    For some images at a time, in a loop: what uses y can't be fused into it, which would compute
    it again for each use. The rows of a large window are a loop, too: XLA compiles sums of many
    terms to slow programs.
    """
    outs = w.shape[-1]
    each = outs // groups  # the output features of each input feature
    places = math.prod(w.shape[:-2])

    def summed(x, w):
        total: Any = None
        for place in numpy.ndindex(*w.shape[:-2]):
            patch = lax.expand_dims(
                patch_at(x, place, out, window.strides, window.holes), (x.ndim,)
            )
            weight = lax.broadcast_in_dim(
                lax.reshape(w[place], (groups, each)),
                (*patch.shape[:-1], each),
                (x.ndim - 1, x.ndim),
            )
            term = lax.mul(lax.broadcast_in_dim(patch, weight.shape, range(weight.ndim)), weight)
            total = term if total is None else lax.add(total, term)
        return lax.reshape(total, (x.shape[0], *out, outs))

    def of_some(x):
        x = padded(x, window)
        if places <= windows.MANY:
            return summed(x, w)
        length = (out[0] - 1) * window.strides[0] + 1

        def with_row(total, i):
            met = lax.dynamic_slice_in_dim(x, i * window.holes[0], length, axis=1)
            return lax.add(total, summed(met, lax.dynamic_index_in_dim(w, i, 0))), None

        start = windows.zeros_to_sum_in((x.shape[0], *out, outs), x, w)
        return lax.scan(with_row, start, jnp.arange(w.shape[0], dtype=jnp.int32))[0]

    bytes_each = math.prod(out) * outs * x.dtype.itemsize
    return block_by_block(of_some, x, max(1, windows.CACHED // 8 // bytes_each))


def _for_each_group(x, axis: int, w, window: Window, out, groups: int, **how) -> jax.Array:
    """A convolution for each group: of a part of this axis of x, and of w's output features."""
    xs = lax.split(x, (x.shape[axis] // groups,) * groups, axis)
    ws = lax.split(w, (w.shape[-1] // groups,) * groups, w.ndim - 1)
    found = [_window_by_window(*pair, window, out, 1, **how) for pair in zip(xs, ws, strict=True)]
    return lax.concatenate(found, x.ndim - 1)


def _in_groups(x, w, window: Window, out, groups: int, **how) -> jax.Array:
    """A product of patches for each group of features, for some images at a time."""
    *kernel, ins, outs = w.shape
    count, rows = math.prod(kernel), math.prod(out)
    # (window..., in, groups · out of a group) -> (groups, window · in, out of a group)
    w = lax.reshape(w, (count * ins, groups, outs // groups))
    w = lax.transpose(w, (1, 0, 2))
    # Behind a barrier: else what makes x may be computed anew for each place.
    x = lax.optimization_barrier(x)

    def of_some(x):
        a = patches_by_group(padded(x, window), kernel, out, window.strides, window.holes, groups)
        y = lax.dot_general(a, w, (((2,), (1,)), ((1,), (0,))), **how)
        return lax.reshape(lax.transpose(y, (1, 0, 2)), (x.shape[0], *out, outs))

    size = max(1, windows.CACHED // (rows * count * x.shape[-1] * x.dtype.itemsize))
    return block_by_block(of_some, x, size)


def _phase_by_phase(x, w, window: Window, out, groups: int, **how) -> jax.Array:
    """With `between − 1` zeros between the entries of x: y's phases, and then interleaved.

    y[o] = Σₖ x̂[o·stride + k·hole − low], where x̂[i·between] = x[i] and else 0. Of a phase
    o = o'·step + r, only every so-many-th k meets an entry of x.
    """
    strides, padding, between, holes = window
    # o moves through the phases with `steps`; within one, x moves by `moves` for each o'.
    common = [math.gcd(s, b) for s, b in zip(strides, between, strict=True)]
    steps = [b // c for b, c in zip(between, common, strict=True)]
    moves = [s // c for s, c in zip(strides, common, strict=True)]
    sizes = [-(-n // step) for n, step in zip(out, steps, strict=True)]
    phases = []
    for phase in numpy.ndindex(*steps):
        places, starts = [], []
        for r, s, (low, _), b, d, n in zip(
            phase, strides, padding, between, holes, w.shape, strict=False
        ):
            meets = [k for k in range(n) if (r * s + k * d - low) % b == 0]
            places.append(meets)
            starts.append([(r * s + k * d - low) // b for k in meets])
        if not all(places):
            phases.append(jnp.zeros((x.shape[0], *sizes, w.shape[-1]), x.dtype))
            continue
        taken, inner = w, []
        for axis, (meets, at) in enumerate(zip(places, starts, strict=True)):
            step = meets[1] - meets[0] if len(meets) > 1 else 1
            taken = lax.slice_in_dim(taken, meets[0], meets[-1] + 1, step, axis)
            hole = at[1] - at[0] if len(at) > 1 else 1
            reach = (sizes[axis] - 1) * moves[axis] + at[-1] + 1
            inner.append(((-at[0], reach - x.shape[axis + 1]), hole))
        pads, inner_holes = zip(*inner, strict=True)
        part = Window(tuple(moves), pads, (1,) * len(steps), inner_holes)
        phases.append(_window_by_window(x, taken, part, sizes, groups, **how))
    # (phases..., batch, sizes..., features) -> (batch, size, phase, size, phase, ..., features)
    count = len(steps)
    y = lax.reshape(
        lax.concatenate([lax.expand_dims(p, (0,)) for p in phases], 0), (*steps, *phases[0].shape)
    )
    pairs = [d for i in range(count) for d in (count + 1 + i, i)]
    y = lax.transpose(y, (count, *pairs, y.ndim - 1))
    whole = [n * step for n, step in zip(sizes, steps, strict=True)]
    y = lax.reshape(y, (x.shape[0], *whole, w.shape[-1]))
    return lax.slice(y, (0,) * y.ndim, (x.shape[0], *out, w.shape[-1]))
