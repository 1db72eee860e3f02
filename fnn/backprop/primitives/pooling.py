"""Pooling: windows that slide over an array, their sums (average pooling) and maxima (max pooling).

    y = Σ x over each window       g is handed to every entry of the window
    y = max x over each window     g is handed to the window's largest entry, the first one if
                                   several are equal: the `max` gate of CS231n, lecture 4

Where windows overlap, an entry collects the gradients from all windows that contain it.
"""

from __future__ import annotations

import itertools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn.backprop.primitives.convolution import dilated
from fnn.backprop.rules import LocalRule, each
from fnn.meshes import sharding_of
from fnn.precision import wide_dtype

# ------------------------------------------------------------------------ average pooling
#
#     y[o] = Σₖ x[o·stride + k]        ∂L/∂x[i] = Σ g[o] over the windows o that contain i
#
# A window sum is a convolution with a kernel of ones, and its gradient is one too: put zeros
# between the entries of g where the forward pass strode over entries, pad so that the sizes
# fit, and sum over the same windows. (A kernel of ones read backwards is itself.)


def _window_sum(
    g,
    y,
    x,
    *,
    window_dimensions,
    window_strides,
    padding,
    base_dilation,
    window_dilation,
    **params,
):
    spread = []
    for size, window, out, stride, (low, _), base, dilation in zip(
        x.shape,
        window_dimensions,
        g.shape,
        window_strides,
        padding,
        base_dilation,
        window_dilation,
        strict=True,
    ):
        window = dilated(window, dilation)
        before = window - 1 - low
        after = dilated(size, base) + window - 1 - dilated(out, stride) - before
        spread.append((before, after, stride - 1))
    wide = wide_dtype(g.dtype)  # in bfloat16, 256 + 1 is 256
    total = lax.reduce_window_sum_p.bind(
        lax.pad(lax.convert_element_type(g, wide), lax.full((), 0, wide), spread),
        window_dimensions=window_dimensions,
        window_strides=base_dilation,
        padding=((0, 0),) * g.ndim,
        base_dilation=(1,) * g.ndim,
        window_dilation=window_dilation,
        **params,
    )
    return lax.convert_element_type(total, g.dtype)


# ---------------------------------------------------------------------------- max pooling
#
#     y[o] = max over the places k of window o of x        argmax[o] = the first k that attains it
#     ∂L/∂x = zeros, with g[o] added at place argmax[o] of each window o
#
# This is computed in one of two ways. Place by place: find argmax, then for each place k add the
# g of those windows whose argmax is k. Or as JAX does it: one primitive searches each window
# again and adds g where it finds the maximum.


def _max_pool(select_prim, worst):
    """The rule of max pooling with (≥, −∞), of min pooling with (≤, ∞)."""

    def gradient(g, y, x, *, base_dilation, window_dilation, **window):
        if 0 in y.shape:
            return lax.full_like(x, 0)
        places = math.prod(window["window_dimensions"])
        apart = _are_apart(window_dilation=window_dilation, **window)
        # Place by place is several times as fast on a CPU and takes a tenth of the memory, but
        # the more often a large window overlaps, the more sums of zeros it adds up.
        few = 1 < places <= 25 and (apart or math.prod(window["window_strides"]) <= 6)
        if few or any(d != 1 for d in window_dilation):  # JAX's way knows no dilated windows
            return _place_by_place(g, y, x, worst, base_dilation, window_dilation, **window)
        return _search_and_add(g, x, select_prim, worst, base_dilation, **window)

    return gradient


def _are_apart(*, window_dimensions, window_strides, window_dilation, **_) -> bool:
    """Does no window reach into the next one?"""
    extents = map(dilated, window_dimensions, window_dilation)
    return all(n <= stride for n, stride in zip(extents, window_strides, strict=True))


def _search_and_add(g, x, select_prim, worst, base_dilation, **window):
    """JAX's way: select_and_scatter_add searches each window, and adds g at the place it finds."""
    # Where x is dilated, `worst` stands between its entries: no window selects that.
    has_gaps = any(d != 1 for d in base_dilation)
    if has_gaps:
        x = lax.pad(x, _scalar(worst, x), [(0, 0, d - 1) for d in base_dilation])
    wide = wide_dtype(g.dtype)  # an entry may be the maximum of many windows
    wide_g, wide_x = (lax.convert_element_type(a, wide) for a in (g, x))
    gradient = lax.convert_element_type(
        lax.select_and_scatter_add_p.bind(wide_g, wide_x, select_prim=select_prim, **window),
        g.dtype,
    )
    if has_gaps:
        gradient = lax.slice(gradient, (0,) * x.ndim, x.shape, base_dilation)
    return gradient


def _place_by_place(
    g,
    y,
    x,
    worst,
    base_dilation,
    window_dilation,
    *,
    window_dimensions,
    window_strides,
    padding,
):
    """argmax[o] = the first place of window o where x = y[o]; then g[o] is added there."""
    to_padded = [(lo, hi, d - 1) for (lo, hi), d in zip(padding, base_dilation, strict=True)]
    padded = lax.pad(x, _scalar(worst, x), to_padded)
    # Where the places of the first window are; those of the other windows are strides away.
    starts = [
        [i * d for i, d in zip(place, window_dilation, strict=True)]
        for place in itertools.product(*map(range, window_dimensions))
    ]
    argmax = _argmax(padded, y, starts, window_strides)
    # Without a barrier the compiler may compute both anew for each place.
    argmax, g = lax.optimization_barrier((argmax, g))
    apart = _are_apart(
        window_dimensions=window_dimensions,
        window_strides=window_strides,
        window_dilation=window_dilation,
    )
    # On a mesh with explicit axes JAX joins none, as tiles are.
    add = _add_in_tiles if apart and sharding_of(g) is None else _add_for_each_place
    gradient = add(g, argmax, starts, window_strides, padded.shape)
    unpadded = lax.pad(gradient, _scalar(0, g), [(-lo, -hi, 0) for lo, hi in padding])
    return lax.slice(unpadded, (0,) * x.ndim, unpadded.shape, base_dilation)


def _argmax(padded, y, starts, strides):
    """For each window, the number of the first place whose entry equals the window's extremum y."""
    argmax = lax.full_like(y, 0, dtype=jnp.uint8 if len(starts) < 256 else jnp.int32)
    for k in reversed(range(len(starts))):
        at_place = lax.slice(padded, starts[k], _stops(starts[k], y.shape, strides), strides)
        argmax = lax.select(lax.eq(at_place, y), lax.full_like(argmax, k), argmax)
    return argmax


def _add_for_each_place(g, argmax, starts, strides, shape):
    """Σₖ (g where argmax = k, else 0), each term moved to where place k of the windows is."""
    nothing, gradient = lax.full_like(g, 0), None
    for k, start in enumerate(starts):
        chosen = lax.select(lax.eq(argmax, lax.full_like(argmax, k)), g, nothing)
        stop = _stops(start, g.shape, strides)
        around = [
            (lo, size - hi, stride - 1)
            for lo, hi, size, stride in zip(start, stop, shape, strides, strict=True)
        ]
        share = lax.pad(chosen, _scalar(0, g), around)
        gradient = share if gradient is None else lax.add(gradient, share)
    return gradient


def _stops(start, sizes, strides):
    """Where the windows' entries end that begin at `start`, `sizes` of them, strides apart."""
    return [lo + stride * (n - 1) + 1 for lo, n, stride in zip(start, sizes, strides, strict=True)]


def _add_in_tiles(g, argmax, starts, strides, shape):
    """The same for windows that don't overlap: no sums, each entry belongs to one window at most.

    A window and what is left free up to the next is a tile. `number` holds, for each entry of
    the tile, which place of the window it is. Then gradient = g where number = argmax, else 0.
    """
    number = np.full(strides, len(starts), argmax.dtype)
    for k, start in enumerate(starts):
        number[tuple(start)] = k
    # As an array of tiles, the gradient has two axes for each of x: tiles, and entries of a tile.
    tiles = [n for pair in zip(g.shape, strides, strict=True) for n in pair]
    in_tile = lambda a: lax.broadcast_in_dim(a, tiles, range(0, 2 * g.ndim, 2))
    number = lax.broadcast_in_dim(number, tiles, range(1, 2 * g.ndim, 2))
    g_in_tile = in_tile(g)
    chosen = lax.select(lax.eq(in_tile(argmax), number), g_in_tile, lax.full_like(g_in_tile, 0))
    gradient = lax.reshape(chosen, [n * stride for n, stride in zip(g.shape, strides, strict=True)])
    rest = [(0, n - m, 0) for n, m in zip(shape, gradient.shape, strict=True)]
    return lax.pad(gradient, _scalar(0, g), rest)


# --------------------------------------------- what max pooling's own gradient is made of
#
# Backward of max pooling is select_and_scatter_add(g, x): each window's g goes to the place
# where x is largest. It is linear in g, and its transpose, select_and_gather_add(t, x), picks
# out of t the place where x is largest. Each is the other's gradient, so that second
# derivatives exist. Neither changes smoothly with x.


def _scatter_source(g, y, source, operand, *, select_prim, **window):
    """∂L/∂source[o] = g at the place of window o that select_and_scatter_add selects."""
    ones = (1,) * g.ndim
    return lax.select_and_gather_add_p.bind(
        g, operand, select_prim=select_prim, base_dilation=ones, window_dilation=ones, **window
    )


def _gather_source(g, y, tangents, operand, *, select_prim, **window):
    """∂L/∂tangents = zeros, with g[o] added at the place of window o that was selected."""
    worst = -jnp.inf if select_prim is lax.ge_p else jnp.inf
    window.pop("window_dilation")  # all 1, as JAX has no gradient for others
    return _search_and_add(g, operand, select_prim, worst, **window)


def _scalar(value, like):
    return lax.full((), value, like.dtype)


RULES: dict[str, LocalRule] = {
    "reduce_window_sum": each(_window_sum, local_gradient=("sum of g over the windows of x",)),
    "reduce_window_max": each(
        _max_pool(lax.ge_p, -jnp.inf), local_gradient=("1 where x is its window's maximum",)
    ),
    "reduce_window_min": each(
        _max_pool(lax.le_p, jnp.inf), local_gradient=("1 where x is its window's minimum",)
    ),
    "select_and_scatter_add": each(
        _scatter_source, None, local_gradient=("g at the selected place", "0")
    ),
    "select_and_gather_add": each(
        _gather_source, None, local_gradient=("1 at the selected place", "0")
    ),
}
