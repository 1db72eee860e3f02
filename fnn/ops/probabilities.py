"""From scores to probabilities: softmax, its logarithm, and the logarithm of its denominator.

All raise a TypeError where x isn't real floating or axis is no integer, and a ValueError where x
has no such axis.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.operation import compiled_rule as rule
from fnn.ops.arguments import axes_of, must_be_real
from fnn.precision import wide

Axis = int | tuple[int, ...] | None


@rule
def softmax(x: chex.Array, *, axis: Axis = -1) -> jax.Array:
    """softmax(x)ᵢ = e^xᵢ / Σⱼ e^xⱼ along `axis` (an integer, several, or None for all).

    The largest x is subtracted first, so that no exponential overflows; entries of −inf get
    probability 0. Local gradient: ∂yᵢ/∂xⱼ = yᵢ (1[i=j] − yⱼ), so that
    ∂L/∂x = y (g − Σ y g). Kept: y. Smooth, no kink.
    Source: CS231n, "Linear classification" (the softmax classifier).
    """
    must_be_real("softmax", x=x)
    axis = axes_of("softmax", x, axis)
    z = wide(x)
    e = jnp.exp(z - jnp.max(z, axis, keepdims=True, initial=-jnp.inf))
    return (e / jnp.sum(e, axis, keepdims=True)).astype(x.dtype)


@softmax.forward
def _(x, *, axis):
    y = softmax(x, axis=axis)
    return y, y


@softmax.backward
def _(y, g, *, axis):
    p, d = wide(y), wide(g)
    return ((p * (d - jnp.sum(p * d, axis, keepdims=True))).astype(y.dtype),)


@rule
def log_softmax(x: chex.Array, *, axis: Axis = -1) -> jax.Array:
    """log_softmax(x)ᵢ = xᵢ − log Σⱼ e^xⱼ along `axis` (an integer, several, or None for all).

    Local gradient: ∂yᵢ/∂xⱼ = 1[i=j] − e^yⱼ, so that ∂L/∂x = g − eʸ Σ g. Kept: the probabilities
    eʸ (from y they would cost a second exponential). Smooth, no kink. An x that lies more than
    the dtype's largest below the maximum gives −inf.
    Source: CS231n, "Linear classification" (numeric stability of the softmax).
    """
    must_be_real("log_softmax", x=x)
    axis = axes_of("log_softmax", x, axis)
    z = wide(x)
    shifted = z - jnp.max(z, axis, keepdims=True, initial=-jnp.inf)
    return (shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis, keepdims=True))).astype(x.dtype)


@log_softmax.forward
def _(x, *, axis):
    return log_softmax(x, axis=axis), softmax(x, axis=axis)


@log_softmax.backward
def _(p, g, *, axis):
    d = wide(g)
    return ((d - wide(p) * jnp.sum(d, axis, keepdims=True)).astype(g.dtype),)


@rule
def logsumexp(x: chex.Array, *, axis: Axis = None, keepdims: bool = False) -> jax.Array:
    """logsumexp(x) = log Σⱼ e^xⱼ along `axis` (an integer, several, or None, the default, for all).

    A smooth maximum. Local gradient: ∂y/∂xⱼ = e^(xⱼ − y), the softmax. Kept: e^(x − max x) and
    its sum. Smooth, no kink. Where all entries are −inf, or there are none, y is −inf and the
    gradient 0.
    Source: CS231n, "Linear classification" (numeric stability of the softmax).
    """
    must_be_real("logsumexp", x=x)
    arguments.flag("logsumexp", "keepdims", keepdims)
    axis = axes_of("logsumexp", x, axis)
    z = wide(x)
    largest = _largest(z, axis)
    y = jnp.log(jnp.sum(jnp.exp(z - largest), axis, keepdims=True)) + largest
    return (y if keepdims else jnp.squeeze(y, axis)).astype(x.dtype)


@logsumexp.forward
def _(x, *, axis, keepdims):
    y = logsumexp(x, axis=axis, keepdims=keepdims)
    return y, _exponentials(x, axes_of("logsumexp", x, axis))


@logsumexp.backward
def _(residuals, g, *, axis, keepdims):
    e, total = residuals
    if not keepdims:
        g = jnp.expand_dims(g, axes_of("logsumexp", e, axis))
    return ((wide(e) * (wide(g) / total)).astype(e.dtype),)


def _largest(x, axis):
    """The largest entries of x, to be subtracted before the exponential: finite."""
    largest = jnp.max(x, axis, keepdims=True, initial=-jnp.inf)
    return jnp.where(jnp.isfinite(largest), largest, 0)


def _exponentials(x, axis):
    """e = e^(x − max x) and its sum: e / Σ e is the softmax, and 0 where all x are −inf."""
    # The shift is held constant: it cancels in e / Σ e, and in the derivatives of that.
    z = wide(x)
    e = jnp.exp(z - jax.lax.stop_gradient(_largest(z, axis)))
    total = jnp.sum(e, axis, keepdims=True)
    return e.astype(x.dtype), jnp.where(total == 0, 1, total)
