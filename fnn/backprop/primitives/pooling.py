"""Windows that slide over an array: sums (average pooling) and extrema (max pooling).

A sum hands its upstream gradient to every entry of the window. A maximum hands it to the
window's largest entry alone (the first one, where several are equal), like the `max` gate of
CS231n, lecture 4: a router of gradients. Where windows overlap, an entry collects from all.
"""

from __future__ import annotations

import itertools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn.backprop.rules import LocalRule, each

# ----------------------------------------------------------------------------------- sums
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
    """∂L/∂x[i]: the sum of g over all windows that contain i."""
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
        window = _dilated(window, dilation)
        before = window - 1 - low
        after = _dilated(size, base) + window - 1 - _dilated(out, stride) - before
        spread.append((before, after, stride - 1))
    return lax.reduce_window_sum_p.bind(
        lax.pad(g, _scalar(0, g), spread),
        window_dimensions=window_dimensions,
        window_strides=base_dilation,
        padding=((0, 0),) * g.ndim,
        base_dilation=(1,) * g.ndim,
        window_dilation=window_dilation,
        **params,
    )


# -------------------------------------------------------------------------------- extrema


def _window_extremum(select_prim, worst):
    """max with (≥, -∞), min with (≤, ∞)."""

    def gradient(g, y, x, *, base_dilation, window_dilation, **window):
        if 0 in y.shape:
            return lax.full_like(x, 0)
        places = math.prod(window["window_dimensions"])
        apart = _are_apart(window_dilation=window_dilation, **window)
        # Place by place is several times as fast on a CPU and takes a tenth of the memory, but
        # the more often a large window overlaps, the more sums of zeros it adds up.
        few = 1 < places <= 25 and (apart or math.prod(window["window_strides"]) <= 6)
        if few or any(d != 1 for d in window_dilation):
            return _place_by_place(g, y, x, worst, base_dilation, window_dilation, **window)
        return _select_and_scatter(g, x, select_prim, worst, base_dilation, **window)

    return gradient


def _are_apart(*, window_dimensions, window_strides, window_dilation, **_) -> bool:
    """Does no window reach into the next one?"""
    extents = map(_dilated, window_dimensions, window_dilation)
    return all(n <= stride for n, stride in zip(extents, window_strides, strict=True))


def _select_and_scatter(g, x, select_prim, worst, base_dilation, **window):
    """JAX's way: the machine searches each window again, and adds g at the place it finds."""
    # With zeros' counterpart for comparisons between the entries, a dilated x is a plain one.
    dilated = any(d != 1 for d in base_dilation)
    if dilated:
        x = lax.pad(x, _scalar(worst, x), [(0, 0, d - 1) for d in base_dilation])
    gradient = lax.select_and_scatter_add_p.bind(g, x, select_prim=select_prim, **window)
    if dilated:
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
    """Note which place attains each window's extremum; then each place takes its gradients.

    Unlike JAX's way it also knows windows with holes.
    """
    to_padded = [(lo, hi, d - 1) for (lo, hi), d in zip(padding, base_dilation, strict=True)]
    padded = lax.pad(x, _scalar(worst, x), to_padded)
    # Where in the padded x the first window's places are; the other windows' are strides away.
    starts = [
        [i * d for i, d in zip(place, window_dilation, strict=True)]
        for place in itertools.product(*map(range, window_dimensions))
    ]
    reach = [stride * (out - 1) + 1 for stride, out in zip(window_strides, y.shape, strict=True)]
    stops = [[lo + n for lo, n in zip(start, reach, strict=True)] for start in starts]

    first = lax.full_like(y, 0, dtype=jnp.uint8 if len(starts) < 256 else jnp.int32)
    for k in reversed(range(len(starts))):
        there = lax.slice(padded, starts[k], stops[k], window_strides)
        first = lax.select(lax.eq(there, y), lax.full_like(first, k), first)
    # Without a barrier the compiler may compute both anew for each place.
    first, g = lax.optimization_barrier((first, g))

    nothing = lax.full_like(g, 0)
    if _are_apart(
        window_dimensions=window_dimensions,
        window_strides=window_strides,
        window_dilation=window_dilation,
    ):
        gradient = _tiles(g, first, starts, window_strides, padded.shape)
    else:
        gradient = None
        for k, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            chosen = lax.select(lax.eq(first, lax.full_like(first, k)), g, nothing)
            back = [
                (lo, size - hi, stride - 1)
                for lo, hi, size, stride in zip(
                    start, stop, padded.shape, window_strides, strict=True
                )
            ]
            share = lax.pad(chosen, _scalar(0, g), back)
            gradient = share if gradient is None else lax.add(gradient, share)
    unpadded = lax.pad(gradient, _scalar(0, g), [(-lo, -hi, 0) for lo, hi in padding])
    return lax.slice(unpadded, (0,) * x.ndim, unpadded.shape, base_dilation)


def _tiles(g, first, starts, strides, shape):
    """Each window's g at its place `first`, zeros elsewhere, for windows that don't overlap.

    A window and what is left free up to the next is a tile; `number` says which place of the
    window stands where in the tile.
    """
    number = np.full(strides, len(starts), first.dtype)
    for k, start in enumerate(starts):
        number[tuple(start)] = k
    cut = [n for n, stride in enumerate(strides) if stride > 1]
    tiled, of_g, of_tile = [], [], []
    for n, (size, stride) in enumerate(zip(g.shape, strides, strict=True)):
        of_g.append(len(tiled))
        tiled.append(size)
        if n in cut:
            of_tile.append(len(tiled))
            tiled.append(stride)
    spread = lambda a: lax.broadcast_in_dim(a, tiled, of_g)
    is_first = lax.eq(spread(first), lax.broadcast_in_dim(number.squeeze(), tiled, of_tile))
    spread_g = spread(g)
    chosen = lax.select(is_first, spread_g, lax.full_like(spread_g, 0))
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
    ones = (1,) * g.ndim
    return lax.select_and_gather_add_p.bind(
        g, operand, select_prim=select_prim, base_dilation=ones, window_dilation=ones, **window
    )


def _gather_source(g, y, tangents, operand, *, select_prim, **window):
    worst = -jnp.inf if select_prim is lax.ge_p else jnp.inf
    window.pop("window_dilation")  # all 1, as JAX has no gradient for others
    return _select_and_scatter(g, operand, select_prim, worst, **window)


def _scalar(value, like):
    return lax.full((), value, like.dtype)


def _dilated(size: int, dilation: int) -> int:
    """The size once `dilation - 1` holes stand between the entries."""
    return (
        size
        if dilation == 1 or (isinstance(size, int) and size == 0)
        else 1 + dilation * (size - 1)
    )


RULES: dict[str, LocalRule] = {
    "reduce_window_sum": each(_window_sum, local_gradient=("sum of g over the windows of x",)),
    "reduce_window_max": each(
        _window_extremum(lax.ge_p, -jnp.inf), local_gradient=("1 where x is its window's maximum",)
    ),
    "reduce_window_min": each(
        _window_extremum(lax.le_p, jnp.inf), local_gradient=("1 where x is its window's minimum",)
    ),
    "select_and_scatter_add": each(
        _scatter_source, None, local_gradient=("g at the selected place", "0")
    ),
    "select_and_gather_add": each(
        _gather_source, None, local_gradient=("1 at the selected place", "0")
    ),
}
