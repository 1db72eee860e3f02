"""Sums of a batch's gradients. Here terms have the batch as first axis of all their arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from fnn.per_example.convolution import Convolution
from fnn.per_example.terms import Dense, Term
from fnn.precision import wide

AnyTerm = TypeVar("AnyTerm", bound=Term)


def weighted_sum(term: Term, weights):
    """Σₙ cₙ gradientₙ, for weights (batch,) or None for ones: one contraction."""
    if isinstance(term, Dense):
        value = wide(term.value)
        if weights is None:
            return jnp.sum(value, axis=0)
        return jnp.tensordot(weights.astype(value.dtype), value, axes=(0, 0))
    one = (term if weights is None else scaled(term, weights)).as_one()
    return one.by_pullback() if isinstance(one, Convolution) else one.materialize()


def scaled(term: AnyTerm, factors) -> AnyTerm:
    """cₙ gradientₙ, for factors c (batch,). In half precision a rounded factor might let a clipped
    gradient grow beyond its limit: the result has at least float32."""
    name = "value" if isinstance(term, Dense) else "g"
    g = wide(getattr(term, name))
    c = lax.expand_dims(factors.astype(g.dtype), range(1, g.ndim))
    changed: dict[str, Any] = {name: g * c}
    return dataclasses.replace(term, **changed)


def kept(term: Term, which):
    """The gradients of some examples, (batch,) True; zeros for the others, whatever they hold."""

    def zero_unless(x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return jnp.where(lax.expand_dims(which, range(1, x.ndim)), x, jnp.zeros((), x.dtype))

    return jax.tree.map(zero_unless, term)


def weighted_sums(terms: Sequence[Term], weights):
    """Σₙ cₙ gradientₙ of all terms together, in at least float32."""
    return functools.reduce(jnp.add, [wide(weighted_sum(t, weights)) for t in terms])
