"""The Hessians of fnn's losses with respect to the network's outputs z, in closed form.

    squared_error                 2 I
    softmax_cross_entropy         (diag(p) − p pᵀ) Σq,  p = softmax(z), Σq = 1 for an integer label
    sigmoid_binary_cross_entropy  diag(p (1 − p)),      p = σ(z)
    poisson_nll                   diag(eᶻ)
    multiclass_hinge, pinball     0
    huber                         diag(|z − t| < δ); it is no −log of a known distribution

All of these are the Fisher matrix too, the mean of ∇ℓ ∇ℓᵀ over labels drawn from the distribution
whose −log the loss is; but for huber, pinball and the hinge, which are of none that is used. For
gaussian_nll, with mean m, log variance s and r = t − m, Hessian and Fisher matrix differ:

    H = e⁻ˢ (1  r      )        Fisher = (e⁻ˢ  0)
            (r  r² / 2 )                 (0    ½)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy

from fnn import ops


class Known(NamedTuple):
    """What is known of an operation of fnn's at its outputs u and target t, in float32 at least.

    product: `(u, t, v) -> H v`.
    root: `(u, t) -> S`, the columns along the first axis, (columns, *u.shape); none: H = 0.
    sample: `(u, key) -> s`, a random column with E[s sᵀ] = Fisher, drawn as KFAC does: the
        gradient of the loss at a label drawn from the network's own distribution; None if it
        has none.
    signs: `u.shape -> ±1 for each column of the root`, H = S diag(signs) Sᵀ; None for ones.
    positive, fisher, fisher_root: the products `(u, t, v)` with H₊ and with the Fisher matrix,
        and the latter's root; None where they are H's.
    """

    product: Callable[[Any, Any, Any], Any]
    root: Callable[[Any, Any], Any]
    sample: Callable[[Any, Any], Any] | None
    signs: Callable[[tuple[int, ...]], numpy.ndarray] | None = None
    positive: Callable[[Any, Any, Any], Any] | None = None
    fisher: Callable[[Any, Any, Any], Any] | None = None
    fisher_root: Callable[[Any, Any], Any] | None = None


def _squared_error() -> Known:
    return Known(
        lambda z, t, v: 2 * v,
        lambda z, t: math.sqrt(2) * identity(z),
        # exp(−(z − t)²) is a normal distribution of t, of variance ½.
        lambda z, key: math.sqrt(2) * jax.random.normal(key, z.shape, z.dtype),
    )


def _softmax_cross_entropy() -> Known:
    # Where one class has nearly all, its 1 − p would be lost in p's rounding errors: both forms
    # are from the other classes' side.
    def product(z, t, v):
        p = jax.nn.softmax(z)
        v = v - v[jnp.argmax(z)]  # H takes equal numbers to zero
        return p * v - p * jnp.sum(p * v)

    def root(z, t):
        # With q = √p of unit length, diag(p) − p pᵀ = D (I − q qᵀ) D, D = diag(q). Householder's
        # reflection that takes one axis to −q takes the others to a basis of what is orthogonal
        # to q: one column less than there are classes.
        top = jnp.argmax(z)
        q = jnp.sqrt(jax.nn.softmax(z))
        v = q.at[top].add(1)
        others = (top + jnp.arange(1, z.size)) % z.size
        eye = jax.nn.one_hot(others, z.size, dtype=z.dtype)
        return (eye - v[others, None] * v[None] / (1 + q[top])) * q[None]

    def sample(z, key):
        drawn = jax.random.categorical(key, z)
        return jax.nn.softmax(z) - jax.nn.one_hot(drawn, z.size, dtype=z.dtype)

    return Known(product, root, sample)


def _sigmoid_binary_cross_entropy() -> Known:
    variance = lambda z: jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)

    def sample(z, key):
        drawn = jax.random.bernoulli(key, jax.nn.sigmoid(z))
        return jax.nn.sigmoid(z) - drawn.astype(z.dtype)

    root = lambda z, t: _diagonal(jnp.sqrt(variance(z)))
    return Known(lambda z, t, v: variance(z) * v, root, sample)


def _poisson_nll() -> Known:
    def sample(z, key):
        return jnp.exp(z) - jax.random.poisson(key, jnp.exp(z)).astype(z.dtype)

    root = lambda z, t: _diagonal(jnp.exp(z / 2))
    return Known(lambda z, t, v: jnp.exp(z) * v, root, sample)


def _linear_in_pieces() -> Known:
    return Known(
        lambda z, t, v: jnp.zeros_like(v), lambda z, t: jnp.zeros((0, *z.shape), z.dtype), None
    )


def _huber(delta: float = 1.0) -> Known:
    inside = lambda z, t: (jnp.abs(z - t.astype(z.dtype)) < delta).astype(z.dtype)
    return Known(lambda z, t, v: inside(z, t) * v, lambda z, t: _diagonal(inside(z, t)), None)


def _gaussian_nll() -> Known:
    def entries(z, t):
        r = t.astype(z.dtype) - z[..., 0]
        precision = jnp.exp(-z[..., 1])
        return precision, precision * r, 0.5 * precision * r * r

    def product(z, t, v):
        a, b, d = entries(z, t)
        return jnp.stack([a * v[..., 0] + b * v[..., 1], b * v[..., 0] + d * v[..., 1]], -1)

    def eigen(z, t):
        """The positive eigenvalue, the other one's size, and the first's eigenvector."""
        a, b, d = entries(z, t)
        larger = 0.5 * (a + d) + jnp.hypot(0.5 * (a - d), b)
        angle = 0.5 * jnp.arctan2(2 * b, a - d)
        # The product of both is a d − b² = −b²/2.
        smaller = 0.5 * b * jnp.where(larger > 0, b / jnp.where(larger > 0, larger, 1), 0)
        return larger, smaller, jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)

    def root(z, t):
        larger, smaller, axis = eigen(z, t)
        other = jnp.stack([-axis[..., 1], axis[..., 0]], -1)
        first = _blocks(jnp.sqrt(larger)[..., None] * axis)
        return jnp.concatenate([first, _blocks(jnp.sqrt(smaller)[..., None] * other)])

    def positive(z, t, v):
        larger, _, axis = eigen(z, t)
        return (larger * jnp.sum(axis * v, -1))[..., None] * axis

    variances = lambda z: jnp.stack([jnp.exp(-z[..., 1]), jnp.full_like(z[..., 1], 0.5)], -1)

    def sample(z, key):
        # With w = (t − m) / σ, normal: the loss's gradient at t.
        w = jax.random.normal(key, z.shape[:-1], z.dtype)
        return jnp.stack([-w * jnp.exp(-0.5 * z[..., 1]), 0.5 * (1 - w * w)], -1)

    return Known(
        product,
        root,
        sample,
        signs=lambda shape: numpy.repeat([1, -1], math.prod(shape[:-1])),
        positive=positive,
        fisher=lambda z, t, v: variances(z) * v,
        fisher_root=lambda z, t: _diagonal(jnp.sqrt(variances(z))),
    )


def identity(z):
    return jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)


def _diagonal(x):
    """Columns of a diagonal matrix, x of any shape."""
    return identity(x) * x[None]


def _blocks(x):
    """x (..., 2) as columns, each with one pair of x and zeros elsewhere."""
    count = math.prod(x.shape[:-1])
    eye = jnp.eye(count, dtype=x.dtype).reshape(count, *x.shape[:-1], 1)
    return eye * x[None]


KNOWN: dict[Any, Callable[..., Known]] = {
    ops.squared_error.rule: _squared_error,
    ops.softmax_cross_entropy.rule: lambda label_smoothing: _softmax_cross_entropy(),
    ops.sigmoid_binary_cross_entropy.rule: _sigmoid_binary_cross_entropy,
    ops.multiclass_hinge.rule: lambda margin: _linear_in_pieces(),
    ops.huber.rule: _huber,
    ops.gaussian_nll.rule: _gaussian_nll,
    ops.pinball.rule: lambda quantile: _linear_in_pieces(),
    ops.poisson_nll.rule: lambda full: _poisson_nll(),
}
# These losses give a number for each position (..., classes); the others add up all entries.
BY_POSITION = (ops.softmax_cross_entropy.rule, ops.multiclass_hinge.rule)
