"""Second moments and variances, entry by entry. Here terms have the batch as first axis."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from fnn.per_example.measured import LONGEST
from fnn.per_example.precision import divided, largest, nonzero, power_of_two, square
from fnn.per_example.product import Product
from fnn.per_example.rows import Rows
from fnn.per_example.sums import weighted_sums
from fnn.per_example.terms import Term, as_wide, materialized, one_of
from fnn.precision import wide_together


def sum_of_squares(terms: Sequence[Term]):
    """Σₙ |gradientₙ|² entry by entry: (G²)ᵀ A² where there is one position."""
    one = terms[0]
    if len(terms) > 1 or _formed_for_squares(one):
        return _sum_over_formed(square, terms)
    if isinstance(one, Product):
        one = _balanced(one)
        return Product(square(one.a), square(one.g), one.layout).as_one().materialize()
    assert isinstance(one, Rows)
    once = jax.vmap(Rows.once)(one)
    return dataclasses.replace(once, g=square(once.g)).as_one().materialize()


def sum_of_squared_deviations(terms: Sequence[Term]):
    """Σₙ |gradientₙ − mean|² entry by entry.

    The sum of the squares less n |mean|² where that cancels in no entry; else, and where the
    squares are found from the formed gradients anyway, from the deviations themselves.
    """
    terms = list(terms)
    n = jax.tree.leaves(terms)[0].shape[0]
    mean = weighted_sums(terms, None) / n
    if len(terms) > 1 or _formed_for_squares(terms[0]):
        return _deviations_formed(terms, mean, 2**24)
    squares = sum_of_squares(terms)
    found = squares - n * square(mean)
    cancels = ~(found >= squares / LONGEST**2)
    return lax.cond(jnp.any(cancels), _deviations_formed, lambda terms, mean: found, terms, mean)


def _deviations_formed(terms, mean, at_once: int = 2**18):
    """Σ |d|² − |Σ d|² / n of the deviations d from a mean that was rounded (Chan et al. 1983)."""
    n = jax.tree.leaves(terms)[0].shape[0]
    both = lambda d: jnp.stack(
        [square(d), lax.real(d), lax.imag(d)] if jnp.iscomplexobj(d) else [square(d), d]
    )
    squares, *sums = _sum_over_formed(lambda g: both(g - mean), terms, at_once)
    return squares - functools.reduce(jnp.add, map(lax.square, sums)) / n


def _formed_for_squares(term: Term) -> bool:
    """Has it no sum of squares from its factors?"""
    return not isinstance(term, Rows) and not (isinstance(term, Product) and term.positions == 1)


def _sum_over_formed(function, terms: Sequence[Term], at_once: int = 2**24):
    """Σₙ function(gradientₙ), in at least float32; few gradients are formed at a time."""
    one = lambda ts: function(materialized(as_wide(ts)))
    n = jax.tree.leaves(terms)[0].shape[0]
    size = math.prod(jax.eval_shape(one, [one_of(t) for t in terms]).shape)
    return sum_over_parts(
        lambda ts: jnp.sum(jax.vmap(one)(ts), axis=0), list(terms), n, size, at_once
    )


def _balanced(term: Product) -> Product:
    """The same with factors of about equal size, whose squares are in range where that of their
    product is."""
    a, g = wide_together(term.a, term.g)
    roots = [jnp.sqrt(power_of_two(largest(x, (-1,)))) for x in (a, g)]
    factor = power_of_two(divided(roots[1], roots[0]))
    return Product(a * nonzero(factor).astype(a.dtype), divided(g, factor), term.layout)


def sum_over_parts(function, batch, n: int, size: int, at_once: int = 2**24):
    """Σ function(part) over parts of a batch of n, each of about `at_once` numbers.

    size: how many numbers are formed for one example.
    """
    part = max(1, min(n, at_once // max(size, 1)))
    if part >= n:
        return function(batch)
    whole = n // part * part
    parts = jax.tree.map(lambda x: x[:whole].reshape(-1, part, *x.shape[1:]), batch)
    first = function(jax.tree.map(lambda x: x[0], parts))
    rest = jax.tree.map(lambda x: x[1:], parts)
    total, _ = lax.scan(lambda s, p: (s + function(p), None), first, rest)
    if whole < n:
        total = total + function(jax.tree.map(lambda x: x[whole:], batch))
    return total
