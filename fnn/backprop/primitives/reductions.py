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
operation ∘ only its local gradients. A product of all is such a tree too. These rules, and
that of `sort`, take part in the forward pass, so that nothing is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import ScatterDimensionNumbers, add, div, eq, mul, select

from fnn.backprop.primitives.elementwise import CHOICES, in_dtype_of, is_complex, number
from fnn.backprop.rules import ControlRule, LocalRule, each, zero
from fnn.eager import apply
from fnn.meshes import as_varying, broadcast, sharding_of
from fnn.precision import wide_dtype

# ----------------------------------------------------------------------- sum, max, product


def _spread(g, x, axes):
    """g copied along the axes that were reduced away."""
    return broadcast(g, x, [i for i in range(x.ndim) if i not in axes])


def _sum(g, y, x, *, axes, **_):
    """y = Σ x: ∂L/∂x[i] = g."""
    return _spread(g, x, axes)


def _extremum(g, y, x, *, axes, **_):
    """g / n for each of the n entries that attain the extremum."""
    attains = eq(x, _spread(y, x, axes))
    wide = wide_dtype(g.dtype)  # in float16, a count of 65,520 is infinite
    count = lax.reduce_sum(lax.convert_element_type(attains, wide), axes)
    share = in_dtype_of(g, div(lax.convert_element_type(g, wide), count))
    return mul(_spread(share, x, axes), lax.convert_element_type(attains, g.dtype))


def _product_forward(equation, needed, ins, opaque):
    """Halve x and multiply the halves, entry by entry, until one entry is left."""
    (x,), axes = ins, equation.params["axes"]
    order, shape = _reduced_first(x, axes)
    size = math.prod(shape[: len(axes)])
    if size == 0:
        return apply(equation, ins), (x, [])
    y = lax.reshape(lax.transpose(x, order), [size, *shape[len(axes) :]])
    halvings = []
    while (n := y.shape[0]) > 1:
        half = (n + 1) // 2
        a, b = lax.slice_in_dim(y, 0, half), lax.slice_in_dim(y, half, n)
        b = _pad_axis(b, 0, (0, n % 2, 0), 1)
        halvings.append((a, b, n))
        y = mul(a, b)
    return [lax.squeeze(y, [0])], (x, halvings)


def _product_backward(equation, needed, saved, cotangents, opaque):
    """Each entry's gradient: g times the product of the others, zeros among them or not."""
    (x, halvings), axes = saved, equation.params["axes"]
    order, shape = _reduced_first(x, axes)
    if x.size == 0:
        return [None]
    g = lax.expand_dims(cotangents[0], [0])
    for a, b, n in reversed(halvings):
        g_b = lax.slice_in_dim(mul(g, a), 0, n - a.shape[0])
        g = lax.concatenate([mul(g, b), g_b], 0)
    return [lax.transpose(lax.reshape(g, shape), sorted(range(x.ndim), key=lambda i: order[i]))]


def _reduced_first(x, axes) -> tuple[list[int], list[int]]:
    """The order of axes with the reduced ones first, and the shape in that order."""
    order = [*axes, *(i for i in range(x.ndim) if i not in axes)]
    return order, [x.shape[i] for i in order]


# ------------------------------------------------------------------------- running totals


class Combine(NamedTuple):
    """c = a ∘ b, with its local gradients: `for_a(g, c, a, b)` and `for_b(g, c, a, b)`."""

    f: Callable
    for_a: Callable
    for_b: Callable


def _logaddexp(a, b):
    """log(eᵃ + eᵇ) = max + log(1 + e^−|a − b|)."""
    high, distance = lax.max(a, b), lax.sub(a, b)
    if is_complex(a):
        distance = lax.sub(add(a, b), mul(high, number(2, high)))
    else:
        distance = lax.neg(lax.abs(distance))
    is_number = eq(distance, distance)  # not ∞ − ∞
    return select(is_number, add(high, lax.log1p(lax.exp(distance))), add(a, b))


def _softmax_weight(a, c):
    """exp(a − c), the share of a in c = log(eᵃ + eᵇ); 0 where all of them are −∞."""
    if not is_complex(c):
        c = lax.max(c, number(jnp.finfo(c.dtype).min, c))
    return lax.exp(lax.sub(a, c))


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


def running(combine: Combine, *, local_gradient: str) -> ControlRule:
    """The running totals of ∘, along an axis and from either end."""

    def forward(equation, needed, ins, opaque):
        (x,), axis = ins, equation.params["axis"]
        turned = lax.rev if equation.params["reverse"] else lambda a, axes: a
        y, levels = _climb(combine, turned(x, [axis]), axis)
        return [turned(y, [axis])], levels

    def backward(equation, needed, levels, cotangents, opaque):
        (g,), axis = cotangents, equation.params["axis"]
        turned = lax.rev if equation.params["reverse"] else lambda a, axes: a
        return [turned(_descend(combine, turned(g, [axis]), levels, axis), [axis])]

    return ControlRule(forward, backward, (local_gradient,))


class Level(NamedTuple):
    """One level of the tree: the combinations that were made there, to go back through.

    pairs = left ∘ right, of x's neighbours; after = before ∘ single, the even totals.
    """

    left: Any
    right: Any
    pairs: Any
    before: Any
    single: Any
    after: Any


def _climb(combine: Combine, x, axis: int) -> tuple[Any, list[Level]]:
    """The running totals of x, and what the way back needs.

    odd totals     y₁, y₃, ... are the running totals of the pairs x₀∘x₁, x₂∘x₃, ...
    even totals    y₀ = x₀, and y₂ₖ = y₂ₖ₋₁ ∘ x₂ₖ
    """
    n = x.shape[axis]
    if n < 2:
        return x, []
    left, right = _every_second(x, 0, n - n % 2, axis), _every_second(x, 1, n, axis)
    pairs = combine.f(left, right)
    odd, levels = _climb(combine, pairs, axis)
    before = lax.slice_in_dim(odd, 0, (n - 1) // 2, 1, axis)
    single = _every_second(x, 2, n, axis) if n > 2 else before
    after = combine.f(before, single)
    even = lax.concatenate([lax.slice_in_dim(x, 0, 1, 1, axis), after], axis)
    return _interleave(even, odd, axis), [Level(left, right, pairs, before, single, after), *levels]


def _descend(combine: Combine, g, levels: list[Level], axis: int):
    """The gradient of x, from that of the totals."""
    n = g.shape[axis]
    if n < 2:
        return g
    (left, right, pairs, before, single, after), *above = levels
    g_odd, g_even = _every_second(g, 1, n, axis), _every_second(g, 0, n, axis)
    g_after = lax.slice_in_dim(g_even, 1, g_even.shape[axis], 1, axis)
    g_before = combine.for_a(g_after, after, before, single)
    g_single = combine.for_b(g_after, after, before, single)
    g_odd = add(g_odd, _pad_axis(g_before, axis, (0, 1 - n % 2, 0)))
    g_pairs = _descend(combine, g_odd, above, axis)
    g_left = combine.for_a(g_pairs, pairs, left, right)
    g_right = combine.for_b(g_pairs, pairs, left, right)
    g_first = lax.slice_in_dim(g_even, 0, 1, 1, axis)
    g_even = lax.concatenate([g_first, g_single], axis)
    g_even = add(g_even, _pad_axis(g_left, axis, (0, n % 2, 0)))
    return _interleave(g_even, g_right, axis)


def _every_second(x, start: int, stop: int, axis: int):
    return lax.slice_in_dim(x, start, stop, 2, axis)


def _interleave(even, odd, axis: int):
    """Spread the even entries, leaving gaps, and add the odd ones in the gaps."""
    longer = even.shape[axis] - odd.shape[axis]  # 0 or 1
    return add(
        _pad_axis(even, axis, (0, 1 - longer, 1)),
        _pad_axis(odd, axis, (1, longer, 1)),
    )


def _pad_axis(x, axis: int, config: tuple[int, int, int], value: float = 0):
    if config == (0, 0, 0):
        return x
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = config
    return lax.pad(x, number(value, x), padding)


# -------------------------------------------------------------------------------- sorting
#
# Sorting a copy of 0, 1, 2, ... along with the rest tells where each entry came from.


def _sort_forward(equation, needed, ins, opaque):
    """y[i] = x[place[i]]; the places are kept."""
    params = equation.params
    axis = params["dimension"]
    places = lax.broadcasted_iota(jnp.int32, ins[0].shape, axis, out_sharding=sharding_of(ins[0]))
    for x in ins:
        places = as_varying(places, jax.typeof(x))
    # lax.sort would give all results the same type under shard_map, which JAX's own sort doesn't.
    *outs, places = equation.primitive.bind(*ins, places, **params)
    return outs, (places, ins)


def _sort_backward(equation, needed, saved, cotangents, opaque):
    """∂L/∂x[place[i]] = g[i]."""
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
    """y = the k largest entries of x and their places: zeros, with g at the places."""
    return _put_back(g[0], y[1], x, axis)


def _approx_top_k(g, y, x, *, reduction_dimension, **_):
    return _put_back(g[0], y[1], x, reduction_dimension % x.ndim)


RULES: dict[str, LocalRule | ControlRule] = {
    "reduce_sum": each(_sum, local_gradient=("1",)),
    "reduce_max": each(_extremum, local_gradient=("x = y",)),
    "reduce_min": each(_extremum, local_gradient=("x = y",)),
    "reduce_prod": ControlRule(
        _product_forward, _product_backward, local_gradient=("Π of the others",)
    ),
    "cumsum": each(
        lambda g, y, x, *, axis, reverse: lax.cumsum(g, axis=axis, reverse=not reverse),
        local_gradient=("Σ of what comes after",),
    ),
    "cumprod": running(PRODUCT, local_gradient="Π of the others, in the totals from x on"),
    "cummax": running(
        _gate("max", lax.max), local_gradient="1 in each total where x is the maximum"
    ),
    "cummin": running(
        _gate("min", lax.min), local_gradient="1 in each total where x is the minimum"
    ),
    "cumlogsumexp": running(LOGSUMEXP, local_gradient="exp(x − y), in the totals from x on"),
    "sort": ControlRule(_sort_forward, _sort_backward, local_gradient=("g back at its place",)),
    "top_k": each(_top_k, local_gradient=("g at its place",)),
    "approx_top_k": each(_approx_top_k, local_gradient=("g at its place",)),
    # Whole numbers and truth values
    "argmax": zero,
    "argmin": zero,
    "reduce_and": zero,
    "reduce_or": zero,
    "reduce_xor": zero,
}
