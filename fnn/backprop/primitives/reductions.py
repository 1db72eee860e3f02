"""From many numbers to one, running totals, and sorting.

    y = Σ x        every entry moves the sum alike: g, copied to all          ("sum gate")
    y = max x      only the largest entry moves it: g, handed to that one     ("max gate, a router")
    y = Π x        each entry is multiplied by all the others
    y = sort x     a permutation: each gradient goes back to where its entry came from

Entries that tie for the maximum share its gradient equally, as in JAX.

A running total y₁ = x₁, yᵢ = yᵢ₋₁ ∘ xᵢ is computed in parallel as a tree: combine neighbours to
pairs, find the running totals of the (half as many) pairs, and these are every second one of the
totals wanted; the others lack one more combination (Blelloch, "Prefix Sums and Their
Applications", 1990). Its gradient is backpropagation through this tree, and needs of the
operation ∘ only its local gradients. The product of all is the tree's first half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.lax import ScatterDimensionNumbers, add, div, eq, mul, select

from fnn.backprop.local import LocalRule, each, zero
from fnn.backprop.primitives.elementwise import CHOICES
from fnn.backprop.sweep import ControlRule

# ----------------------------------------------------------------------- sum, max, product


def _spread(g, x, axes):
    """g copied along the axes that were reduced away."""
    kept = [i for i in range(x.ndim) if i not in axes]
    return lax.broadcast_in_dim(g, x.shape, kept, out_sharding=_sharding(x))


def _sum(g, y, x, *, axes, **_):
    return _spread(g, x, axes)


def _extremum(g, y, x, *, axes, **_):
    """g / n for each of the n entries that attain the extremum."""
    attains = lax.convert_element_type(eq(x, _spread(y, x, axes)), g.dtype)
    share = div(g, lax.reduce_sum(attains, axes))
    return mul(_spread(share, x, axes), attains)


def _product(g, y, x, *, axes, **_):
    """Each entry's gradient: g times the product of the others, zeros among them or not."""
    kept = [i for i in range(x.ndim) if i not in axes]
    order = [*axes, *kept]
    shape = [x.shape[i] for i in order]
    size = 1
    for n in shape[: len(axes)]:
        size *= n
    if size == 0:
        return None
    flat = lax.reshape(lax.transpose(x, order), [size, *shape[len(axes) :]])
    found = lax.reshape(_product_tree(g, flat), shape)
    return lax.transpose(found, sorted(range(x.ndim), key=lambda i: order[i]))


def _product_tree(g, x):
    """Halve x: the product of the halves, entry by entry, is a product of half as many."""
    n = x.shape[0]
    if n == 1:
        return lax.expand_dims(g, [0])
    half = (n + 1) // 2
    a, b = x[:half], x[half:]
    if n % 2:
        b = _pad_axis(b, 0, (0, 1, 0), 1)
    g = _product_tree(g, mul(a, b))
    return lax.concatenate([mul(g, b), mul(g, a)[: n - half]], 0)


# ------------------------------------------------------------------------- running totals


class Combine(NamedTuple):
    """c = a ∘ b, with its local gradients: `for_a(g, c, a, b)` and `for_b(g, c, a, b)`."""

    f: Callable
    for_a: Callable
    for_b: Callable


def _logaddexp(a, b):
    high = lax.max(a, b)
    distance = lax.neg(lax.abs(lax.sub(a, b)))
    is_number = eq(distance, distance)  # not ∞ − ∞
    return select(is_number, add(high, lax.log1p(lax.exp(distance))), add(a, b))


def _softmax_weight(a, c):
    """exp(a − c), the share of a in c = log(eᵃ + eᵇ), where a = c = ±∞ too."""
    return select(eq(a, c), lax.full_like(a, 1), lax.exp(lax.sub(a, c)))


PRODUCT = Combine(mul, lambda g, c, a, b: mul(g, b), lambda g, c, a, b: mul(g, a))
LOGSUMEXP = Combine(
    _logaddexp,
    lambda g, c, a, b: mul(g, _softmax_weight(a, c)),
    lambda g, c, a, b: mul(g, _softmax_weight(b, c)),
)


def _gate(name: str, f: Callable) -> Combine:
    """A gate whose rule stands in the table of elementwise functions."""
    pullback = CHOICES[name].pullback
    return Combine(
        f,
        lambda g, c, a, b: pullback((True, False), g, c, (a, b), {})[0],
        lambda g, c, a, b: pullback((False, True), g, c, (a, b), {})[1],
    )


def running(combine: Combine, says: str) -> LocalRule:
    def pullback(g, y, x, *, axis, reverse):
        if not reverse:
            return _running(combine, g, y, x, axis)
        g, y, x = (lax.rev(a, [axis]) for a in (g, y, x))
        return lax.rev(_running(combine, g, y, x, axis), [axis])

    return each(pullback, says=(says,))


def _running(combine: Combine, g, y, x, axis: int):
    """Back through the tree. The totals of the pairs are at hand: y's entries 1, 3, 5, ...

    even totals    y₂ₖ = y₂ₖ₋₁ ∘ x₂ₖ      (and y₀ = x₀)
    odd totals     y₂ₖ₊₁ = totals of the pairs x₂ₖ ∘ x₂ₖ₊₁
    """
    n = x.shape[axis]
    if n < 2:
        return g
    take = lambda a, start, stop=None: lax.slice_in_dim(a, start, stop, 2, axis)
    odd, last = n // 2, n - (n % 2)
    left, right = take(x, 0, last), take(x, 1)
    pairs, totals, g_totals = combine.f(left, right), take(y, 1), take(g, 1)
    g_even = take(g, 0)
    if n > 2:
        before = totals if n % 2 else lax.slice_in_dim(totals, 0, odd - 1, 1, axis)
        g_rest, after, single = take(g, 2), take(y, 2), take(x, 2)
        g_before = combine.for_a(g_rest, after, before, single)
        g_single = combine.for_b(g_rest, after, before, single)
        missing = odd - g_before.shape[axis]
        g_totals = add(g_totals, _pad_axis(g_before, axis, (0, missing, 0)))
        g_even = lax.concatenate([lax.slice_in_dim(g_even, 0, 1, 1, axis), g_single], axis)
    g_pairs = _running(combine, g_totals, totals, pairs, axis)
    g_left = combine.for_a(g_pairs, pairs, left, right)
    g_right = combine.for_b(g_pairs, pairs, left, right)
    g_even = add(g_even, _pad_axis(g_left, axis, (0, n % 2, 0)))
    # Interleave: the even entries with a gap after each, and the odd ones in the gaps.
    return add(
        _pad_axis(g_even, axis, (0, 1 - n % 2, 1)),
        _pad_axis(g_right, axis, (1, n % 2, 1)),
    )


def _pad_axis(x, axis: int, config: tuple[int, int, int], value: float = 0):
    if config == (0, 0, 0):
        return x
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = config
    return lax.pad(x, x.dtype.type(value), padding)


# -------------------------------------------------------------------------------- sorting
#
# Sorting a copy of 0, 1, 2, ... along with the rest tells where each entry came from.


def _sort_forward(equation, needed, ins, opaque):
    params = equation.params
    axis = params["dimension"]
    places = lax.broadcasted_iota(jnp.int32, ins[0].shape, axis, out_sharding=_sharding(ins[0]))
    *outs, places = lax.sort((*ins, places), **params)
    return outs, (places, ins)


def _sort_backward(equation, needed, saved, cotangents, opaque):
    places, ins = saved
    axis = equation.params["dimension"]
    return [
        _put_back(g, places, x, axis) if wanted and g is not None else None
        for wanted, g, x in zip(needed, cotangents, ins, strict=True)
    ]


def _put_back(g, places, x, axis: int):
    """Zeros like x, with each entry of g at its place along the axis."""
    others = tuple(i for i in range(x.ndim) if i != axis)
    numbers = ScatterDimensionNumbers(
        update_window_dims=(),
        inserted_window_dims=(axis,),
        scatter_dims_to_operand_dims=(axis,),
        operand_batching_dims=others,
        scatter_indices_batching_dims=others,
    )
    return lax.scatter_add(
        lax.full_like(x, 0),
        lax.expand_dims(places, [x.ndim]),
        g,
        numbers,
        unique_indices=True,
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def _top_k(g, y, x, *, axis, **_):
    return _put_back(g[0], y[1], x, axis)


def _approx_top_k(g, y, x, *, reduction_dimension, **_):
    return _put_back(g[0], y[1], x, reduction_dimension % x.ndim)


def _sharding(x):
    return x.aval.sharding if hasattr(x, "aval") else None


RULES: dict[str, LocalRule | ControlRule] = {
    "reduce_sum": each(_sum, says=("1",)),
    "reduce_max": each(_extremum, says=("x = y",)),
    "reduce_min": each(_extremum, says=("x = y",)),
    "reduce_prod": each(_product, says=("Π of the others",)),
    "cumsum": each(
        lambda g, y, x, *, axis, reverse: lax.cumsum(g, axis=axis, reverse=not reverse),
        says=("Σ of what comes after",),
    ),
    "cumprod": running(PRODUCT, "Σ over later totals of Π of the others"),
    "cummax": running(_gate("max", lax.max), "Σ over the totals that it is"),
    "cummin": running(_gate("min", lax.min), "Σ over the totals that it is"),
    "cumlogsumexp": running(LOGSUMEXP, "Σ over later totals of exp(x − y)"),
    "sort": ControlRule(_sort_forward, _sort_backward),
    "top_k": each(_top_k, says=("g at its place",)),
    "approx_top_k": each(_approx_top_k, says=("g at its place",)),
    # Whole numbers and truth values
    "argmax": zero,
    "argmin": zero,
    "reduce_and": zero,
    "reduce_or": zero,
    "reduce_xor": zero,
}
