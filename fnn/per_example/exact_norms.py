"""Norms of gradients from their terms' inner products, as exact as those of formed gradients."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from fnn.per_example.inner_products import inner, is_apart
from fnn.per_example.measured import Measured
from fnn.per_example.precision import divided, norm_of, root
from fnn.per_example.terms import Term, as_wide, materialized, one_of


def measured(terms: Sequence[Term], factors: Sequence | None = None) -> Measured:
    """|Σ factor · term|, from the terms' inner products among themselves."""
    found = [t.measured() for t in terms]
    if factors is None:
        factors = [1] * len(terms)
    else:
        found = [m.times(c) for m, c in zip(found, factors, strict=True)]
    if len(found) == 1:
        return found[0]
    total, bound = (functools.reduce(jnp.add, [lax.square(m[k]) for m in found]) for k in (0, 1))
    for i, k in itertools.combinations(range(len(terms)), 2):
        if not is_apart(terms[i], terms[k]):
            product = inner(terms[i], terms[k]) * factors[i] * factors[k]
            total = total + 2 * product
            bound = bound + 2 * found[i].length * found[k].length
    least = functools.reduce(jnp.add, [m.least for m in found])
    return Measured(root(total), root(bound), least)


def measured_in_range(terms: Sequence[Term]) -> Measured:
    """The same of terms of any size: each is brought near one, and what it was added up."""
    own, scales = zip(*[t.normalised() for t in terms], strict=True)
    largest = functools.reduce(lax.max, scales)
    return measured(own, [divided(x, largest) for x in scales]).times(largest)


def sums_products(terms: Sequence[Term]) -> bool:
    """Is the norm that of a sum of products, whose rounding error its length bounds?"""
    return len(terms) > 1 or terms[0].norm_by_gram


def norms(terms: Sequence[Term]) -> Measured:
    """|gradientₙ| of a batch, each within rounding of the formed gradient's.

    Those that can't be relied on are found with more care, one at a time; where there are none,
    nothing is.
    """
    terms = list(terms)
    found = jax.vmap(measured)(terms)
    if not sums_products([one_of(t) for t in terms]):
        return found
    doubts = ~found.is_in_range | found.cancels
    as_found = lambda terms, found, doubts: found
    return Measured(*lax.cond(jnp.any(doubts), _with_care, as_found, terms, found[:2], doubts))


def _with_care(terms, found, doubts):
    """The norms, those in doubt found again one after the other."""
    one = lambda x: lax.cond(x[2], _measured_with_care, lambda terms, found: found, *x[:2])
    return lax.map(one, (terms, found, doubts))


def _measured_with_care(terms, found):
    """With what is multiplied brought near one; where that cancels, of the formed gradient."""
    m = measured_in_range(terms)
    again = ~(m.norm >= m.least) | m.cancels
    formed = lambda terms: norm_of(materialized(as_wide(terms)))
    return lax.cond(again, formed, lambda terms: m.norm, terms), m.length
