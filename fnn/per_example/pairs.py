"""Inner products of all pairs of examples. Here terms have the batch as first axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from fnn.per_example.exact_norms import norms
from fnn.per_example.inner_products import dot
from fnn.per_example.precision import unit
from fnn.per_example.product import Product
from fnn.per_example.terms import Term, as_wide, materialized
from fnn.precision import wide


def gram(terms: Sequence[Term], others: Sequence[Term]):
    """Re⟨gradientₙ, gradientₘ⟩ for all pairs of two batches: (batch, other batch)."""
    terms, others = list(terms), list(others)
    one, other = terms[0], others[0]
    single = len(terms) == len(others) == 1
    if not single or not isinstance(one, Product) or not isinstance(other, Product):
        return _gram_formed(terms, others)
    if one.layout != other.layout or not _pairs_by_positions(one, other):
        return _gram_formed(terms, others)
    products = _gram_by_positions(one, other)
    if one.positions == other.positions == 1:
        return products
    cancels = [jnp.any(m.cancels) for m in (norms(terms), norms(others))]
    return lax.cond(cancels[0] | cancels[1], _gram_formed, lambda *ts: products, terms, others)


def _gram_formed(terms, others):
    form = jax.vmap(lambda ts: materialized(as_wide(ts)))
    shapes = [jax.eval_shape(form, ts).shape for ts in (terms, others)]
    if max(map(math.prod, shapes)) <= 2**26:
        return _gram_of_dense(form(terms), form(others))
    if shapes[0][0] > shapes[1][0]:
        return _gram_by_rows(others, terms).T
    return _gram_by_rows(terms, others)


def _gram_by_rows(terms, others):
    """One row of the matrix at a time: one gradient formed, and its inner product with all."""

    def row(t):
        formed, scale = unit(materialized(as_wide(t)))
        return scale * jax.vmap(lambda o: dot(o, formed))(others)

    return lax.map(row, terms)


def _gram_of_dense(x, y):
    (x, x_scales), (y, y_scales) = (jax.vmap(unit)(wide(z.reshape(z.shape[0], -1))) for z in (x, y))
    return jnp.dot(x, y.conj().T).real * x_scales[:, None] * y_scales[None]


def _pairs_by_positions(one: Product, other: Product) -> bool:
    """Is it cheaper to compare positions with positions than to form all gradients?"""
    n, m, p, q = one.g.shape[0], other.g.shape[0], one.positions, other.positions
    (_, out, ins) = one.layout.sizes
    if p == q == 1:
        return True
    by_positions = n * m * p * q * (out + ins)
    return by_positions < (n * p + m * q + n * m) * out * ins and n * m * p * q <= 2**26


def _gram_by_positions(one: Product, other: Product):
    (one, scales), (other, other_scales) = (jax.vmap(Product.normalised)(t) for t in (one, other))
    a = jnp.einsum("nspi,msqi->snpmq", one.a, other.a.conj())
    g = jnp.einsum("nspo,msqo->snpmq", one.g, other.g.conj())
    return jnp.sum((a * g).real, axis=(0, 2, 4)) * scales[:, None] * other_scales[None]
