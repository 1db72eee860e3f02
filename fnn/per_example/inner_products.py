"""Inner products of one example's gradient: with an array, and of two of its terms."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fnn.per_example.layout import Layout, Pad
from fnn.per_example.precision import unit, vdot
from fnn.per_example.rows import Rows
from fnn.per_example.terms import Dense, Term
from fnn.precision import wide


def dot(terms: Sequence[Term], w):
    """Re⟨gradient, w⟩ for an array of the parameter's shape; at least float32."""
    w, w_scale = unit(wide(w))
    own = [t.normalised() for t in terms]
    return functools.reduce(jnp.add, [t.dot(w) * scale * w_scale for t, scale in own])


def inner(one: Term, other: Term):
    """Re⟨one, other⟩ of two terms of one parameter, forming one of them at most."""
    for rows, t in ((one, other), (other, one)):
        if isinstance(rows, Rows) and rows.layout.owner(0) == ("out", 0):
            picked = t.rows(rows.index)
            if picked is not None:
                g = wide(rows.g)
                (_, size, _) = rows.layout.sizes
                picked = jnp.where(
                    (rows.index < size).reshape(-1, *[1] * (picked.ndim - 1)), picked, 0
                )
                row = rows.layout.without(0).to_parameter
                return vdot(jax.vmap(row)(g[0]), picked)
    if isinstance(other, Dense):
        return one.dot(wide(other.value))
    return other.dot(one.materialize())


def is_apart(one: Term, other: Term) -> bool:
    """Are both zero wherever the other isn't, as with two slices of one weight?"""
    if isinstance(one, Dense) or isinstance(other, Dense):
        return False
    filled, other_filled = _filled(one.layout), _filled(other.layout)
    return any(not set(a).intersection(b) for a, b in zip(filled, other_filled, strict=False))


def _filled(layout: Layout) -> list[range]:
    """Along each axis, where the padding in the last view left entries; [] without such a view."""
    if not layout.views or not isinstance(layout.views[-1], Pad):
        return []
    before = layout.shapes[-2]
    return [
        range(low, low + n * (interior + 1), interior + 1)
        for n, (low, _, interior) in zip(before, layout.views[-1].padding, strict=True)
    ]
