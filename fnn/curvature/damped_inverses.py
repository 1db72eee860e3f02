"""Inverses of damped Kronecker factors, of numbers of any size."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fnn.curvature.kronecker import Block, Diagonal, Kronecker


def inverse(weight, damping, f):
    """(F + λ I)⁻¹ for a block or a diagonal. For A ⊗ G, with a and g their mean eigenvalues,

        (A + π √λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹,   π² = a / g                  (section 6.3).

    Divided by a and g the two are damped alike, by r = √(λ / (a g)); so no number here is of
    the size of π, which may be any.
    """
    dtype = jax.tree.leaves(f)[0].dtype
    weight, damping = weight.astype(dtype), damping.astype(dtype)
    if isinstance(f, Diagonal):
        return Diagonal(1 / (f.diagonal / weight + damping), f.shape)
    if isinstance(f, Block):
        matrix = f.matrix / weight
        mean = _mean_eigenvalue(matrix)
        return Block(_damped_inverse(matrix, mean, mean, damping), f.shape)
    A, G = f.A / weight, f.G / weight
    a = jnp.mean(A, axis=-1) if A.ndim == 2 else jax.vmap(_mean_eigenvalue)(A)
    g = jax.vmap(_mean_eigenvalue)(G)
    size, damping = jnp.sqrt(a) * jnp.sqrt(g), jnp.broadcast_to(jnp.sqrt(damping), a.shape)
    return Kronecker(
        jax.vmap(_damped_inverse)(A, a, size, damping),
        jax.vmap(_damped_inverse)(G, g, size, damping),
        f.layout,
        f.shape,
    )


def _mean_eigenvalue(matrix):
    return jnp.trace(matrix) / matrix.shape[0]


def _damped_inverse(matrix, mean, size, damping):
    """(size · matrix / mean + damping · I)⁻¹ for a positive matrix, or a diagonal as a vector.

    It is divided by size + damping first: then it is a mean of matrix / mean and I. The second
    one's share is at least what rounding takes from the first one's eigenvalues, of which none
    is above the number n of them all.
    """
    n = matrix.shape[0]
    total = size + damping
    there = (mean > 0) & (total > 0)
    share = jnp.where(there, damping / jnp.where(there, total, 1), 1)
    share = jnp.maximum(share, n * jnp.finfo(matrix.dtype).eps)
    mixed = (1 - share) / jnp.where(there, mean, 1) * matrix
    total = jnp.where(there, total, damping)
    if matrix.ndim == 1:
        return 1 / (mixed + share) / total
    eye = jnp.eye(n, dtype=matrix.dtype)
    factor = jnp.linalg.cholesky(mixed + share * eye)
    return jax.scipy.linalg.cho_solve((factor, True), eye) / total
