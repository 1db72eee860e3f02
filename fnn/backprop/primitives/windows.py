"""Windows that slide over an array: sums (average pooling) and extrema (max pooling).

A sum hands its upstream gradient to every entry of the window. A maximum hands it to the
window's largest entry alone (the first one, where several are equal), like the `max` gate of
CS231n, lecture 4: a router of gradients. Where windows overlap, an entry collects from all.
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp
from jax import lax

from fnn.backprop.local import LocalRule, each

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


def _window_extremum(compare, worst):
    """max with (≥, -∞), min with (≤, ∞)."""

    def gradient(g, y, x, *, base_dilation, window_dilation, **window):
        if any(d != 1 for d in window_dilation):
            return _route_by_comparison(g, y, x, worst, base_dilation, window_dilation, **window)
        # With zeros' counterpart for comparisons between the entries, a dilated x is a plain one.
        dilated = any(d != 1 for d in base_dilation)
        if dilated:
            x = lax.pad(x, _scalar(worst, x), [(0, 0, d - 1) for d in base_dilation])
        gradient = lax.select_and_scatter_add_p.bind(g, x, select_prim=compare, **window)
        if dilated:
            gradient = lax.slice(gradient, (0,) * x.ndim, x.shape, base_dilation)
        return gradient

    return gradient


def _route_by_comparison(
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
    """The same for windows with holes, for which JAX has no gradient.

    Go through the window's places. A place of x that equals its window's extremum, where no
    earlier place did, takes that window's gradient.
    """
    to_padded = [(lo, hi, d - 1) for (lo, hi), d in zip(padding, base_dilation, strict=True)]
    padded = lax.pad(x, _scalar(worst, x), to_padded)
    gradient = lax.full_like(padded, 0)
    routed = lax.full_like(y, False, dtype=bool)
    for place in itertools.product(*map(range, window_dimensions)):
        start = [i * d for i, d in zip(place, window_dilation, strict=True)]
        stop = [
            lo + stride * (out - 1) + 1
            for lo, stride, out in zip(start, window_strides, y.shape, strict=True)
        ]
        chosen = lax.eq(lax.slice(padded, start, stop, window_strides), y) & ~routed
        routed = routed | chosen
        back = [
            (lo, size - hi, stride - 1)
            for lo, hi, size, stride in zip(start, stop, padded.shape, window_strides, strict=True)
        ]
        share = lax.select(chosen, g, lax.full_like(g, 0))
        gradient = lax.add(gradient, lax.pad(share, _scalar(0, g), back))
    unpadded = lax.pad(gradient, _scalar(0, g), [(-lo, -hi, 0) for lo, hi in padding])
    return lax.slice(unpadded, (0,) * x.ndim, unpadded.shape, base_dilation)


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
    return _window_extremum(select_prim, worst)(g, y, operand, **window)


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
    "reduce_window_sum": each(_window_sum, says=("sum of g over the windows of x",)),
    "reduce_window_max": each(
        _window_extremum(lax.ge_p, -jnp.inf), says=("1 where x is its window's maximum",)
    ),
    "reduce_window_min": each(
        _window_extremum(lax.le_p, jnp.inf), says=("1 where x is its window's minimum",)
    ),
    "select_and_scatter_add": each(_scatter_source, None, says=("g at the selected place", "0")),
    "select_and_gather_add": each(_gather_source, None, says=("1 at the selected place", "0")),
}
