"""Losses of regressions: how far a prediction is from its target."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.operation import compiled_rule as rule
from fnn.ops.arguments import (
    empty,
    is_floating,
    must_be_alike,
    must_be_real,
    must_not_be_complex,
)
from fnn.precision import wide


@rule
def squared_error(prediction: chex.Array, target: chex.Array) -> jax.Array:
    """Σᵢ (fᵢ − tᵢ)²: the squared distance of prediction f and target t.

    Args:
        prediction: f, floating, any shape.
        target: t, real, of the same shape.

    Returns:
        The loss, a scalar: the sum over all entries, without a factor ½.

    Local gradient: 2 (f − t) for the prediction, −2 (f − t) for a floating target. Kept:
    f − t. Smooth, no kink. It overflows, as any square, beyond the root of the dtype's largest.

    Raises:
        TypeError: the prediction isn't real floating, or the target isn't real.
        ValueError: the shapes differ.

    Source: the lecture's notes, "regression".
    """
    must_be_alike("squared_error", prediction=prediction, target=target)
    difference = wide(prediction) - wide(target.astype(prediction.dtype))
    return jnp.sum(jnp.square(difference)).astype(prediction.dtype)


@squared_error.forward
def _(prediction, target):
    difference = prediction - target.astype(prediction.dtype)
    return squared_error(prediction, target), (difference, empty(target))


@squared_error.backward
def _(residuals, g):
    difference, target = residuals
    d_prediction = (wide(g) * (2 * wide(difference))).astype(g.dtype)
    return d_prediction, (-d_prediction).astype(target.dtype) if is_floating(target) else None


@rule
def huber(prediction: chex.Array, target: chex.Array, *, delta: float = 1.0) -> jax.Array:
    """Σᵢ of ½ d² where |d| ≤ δ, of δ (|d| − ½ δ) elsewhere; d = fᵢ − tᵢ, δ = `delta`.

    A square near zero and a straight line beyond, which outliers pull at with a bounded force.

    Args:
        prediction: f, floating, any shape.
        target: t, real, of the same shape.
        delta: where the square becomes a line, positive.

    Returns:
        The loss, a scalar: the sum over all entries.

    Computed as |c| (|d| − ½ |c|) with c = d clipped to ±δ: no square of a large d. Local
    gradient: c for the prediction, −c for a floating target. Kept: c. The gradient has no
    kink; its derivative jumps from 1 to 0 at |d| = δ, and is 0 there.

    Raises:
        TypeError: the prediction isn't real floating, or the target isn't real.
        ValueError: the shapes differ, or delta isn't positive.

    Source: Huber, "Robust estimation of a location parameter", 1964.
    """
    must_be_alike("huber", prediction=prediction, target=target)
    arguments.number("huber", "delta", delta, above=0, infinite=True)
    d = prediction - target.astype(prediction.dtype)
    return _huber(d, _clip(d, delta))


@huber.forward
def _(prediction, target, *, delta):
    d = prediction - target.astype(prediction.dtype)
    c = _clip(d, delta)
    return _huber(d, c), (c, empty(target))


@huber.backward
def _(residuals, g, *, delta):
    c, target = residuals
    d_prediction = g * c
    return d_prediction, (-d_prediction).astype(target.dtype) if is_floating(target) else None


def _huber(d, c):
    """Σ |c| (|d| − ½ |c|)."""
    size, clipped = jnp.abs(wide(d)), jnp.abs(wide(c))
    return jnp.sum(clipped * (size - 0.5 * clipped)).astype(d.dtype)


def _clip(d, delta):
    """d between ±δ; a select, for its derivative at |d| = δ is 0 from either side."""
    at_ends = jnp.where(d < 0, -delta, delta)
    return jnp.where(jnp.abs(d) >= delta, at_ends.astype(d.dtype), d)


@rule
def gaussian_nll(prediction: chex.Array, target: chex.Array) -> jax.Array:
    """−log N(t; m, eˢ) = ½ Σᵢ (sᵢ + (tᵢ − mᵢ)² e^−sᵢ + log 2π): a regression that tells how
    sure it is.

    Args:
        prediction: the means m and the logarithms s of the variances, side by side along the
            last axis: floating, shape `(..., 2)`.
        target: t, real, of shape `(...)`.

    Returns:
        The loss, a scalar: the sum over all entries of the target.

    With w = (t − m) e^(−s/2), the local gradient is −w e^(−s/2) for the mean, ½ (1 − w²) for
    the log variance, and w e^(−s/2) for a floating target. Kept: w and e^(−s/2). Smooth, no
    kink; not convex in s and m together. e^(−s/2) ends at a third of the dtype's largest number,
    so that t = m gives no nan; w² overflows, as any square, beyond the root of the largest.

    Raises:
        TypeError: the prediction isn't real floating, or the target isn't real.
        ValueError: the prediction's shape isn't the target's and an axis of 2 more.

    Source: Nix, Weigend, "Estimating the mean and variance of the target probability
    distribution", 1994.
    """
    _check_means_and_variances(prediction, target)
    w, _ = _standardised(prediction, target)
    return _gaussian_nll(w, prediction)


@gaussian_nll.forward
def _(prediction, target):
    _check_means_and_variances(prediction, target)
    w, root_precision = _standardised(prediction, target)
    return _gaussian_nll(w, prediction), (w, root_precision, empty(target))


@gaussian_nll.backward
def _(residuals, g):
    w, root_precision, target = residuals
    dtype, g, w = g.dtype, wide(g), wide(w)
    d_target = g * (w * wide(root_precision))
    d_prediction = jnp.stack([-d_target, g * (0.5 * (1 - jnp.square(w)))], axis=-1).astype(dtype)
    return d_prediction, d_target.astype(target.dtype) if is_floating(target) else None


def _gaussian_nll(w, prediction):
    """½ Σ (s + w² + log 2π)."""
    each = wide(prediction[..., 1]) + jnp.square(wide(w)) + math.log(2 * math.pi)
    return (0.5 * jnp.sum(each)).astype(prediction.dtype)


def _standardised(prediction, target):
    """(t − m) / σ and 1 / σ."""
    mean, log_variance = prediction[..., 0], prediction[..., 1]
    largest = math.log(float(jnp.finfo(prediction.dtype).max)) - 1
    root_precision = jnp.exp(jnp.minimum(-0.5 * log_variance, largest))
    return (target.astype(prediction.dtype) - mean) * root_precision, root_precision


def _check_means_and_variances(prediction, target):
    must_be_real("gaussian_nll", prediction=prediction)
    must_not_be_complex("gaussian_nll", target=target)
    if prediction.shape != (*target.shape, 2):
        raise ValueError(
            f"gaussian_nll: argument 'prediction' has shape {prediction.shape}, wanted "
            f"{(*target.shape, 2)}: a mean and a log variance for each entry of 'target', along "
            "the last axis."
        )


@rule
def poisson_nll(log_rate: chex.Array, target: chex.Array, *, full: bool = False) -> jax.Array:
    """Σᵢ (e^sᵢ − tᵢ sᵢ), which is −log Poisson(t; eˢ) but for log t!: a regression of counts.

    Args:
        log_rate: s, the logarithm of the expected count, floating, any shape.
        target: t, the counts, real, of the same shape.
        full: whether log t! is added (log Γ(t + 1)), on which no gradient of s depends.

    Returns:
        The loss, a scalar: the sum over all entries.

    Local gradient: eˢ − t for the log rate; −s for a floating target, and ψ(t + 1) − s if full.
    Kept: eˢ − t; for a floating target also what its gradient is. Smooth, no kink, convex in s. eˢ
    ends at a third of the dtype's largest number.

    Raises:
        TypeError: the log rate isn't real floating, or the target isn't real.
        ValueError: the shapes differ.

    Source: Cameron, Trivedi, "Regression analysis of count data", 1998 (Poisson regression).
    """
    must_be_alike("poisson_nll", log_rate=log_rate, target=target)
    arguments.flag("poisson_nll", "full", full)
    s = wide(log_rate)
    t = target.astype(log_rate.dtype).astype(s.dtype)
    each = _rate(s, s.dtype) - t * s
    if full:
        each = each + jax.scipy.special.gammaln(t + 1)
    return jnp.sum(each).astype(log_rate.dtype)


@poisson_nll.forward
def _(log_rate, target, *, full):
    t = target.astype(log_rate.dtype)
    loss = poisson_nll(log_rate, target, full=full)
    # The rate in float32: near the count a rounded one would be all that is left.
    d = (_rate(wide(log_rate), log_rate.dtype) - wide(t)).astype(log_rate.dtype)
    if not is_floating(target):
        return loss, (d,)
    slope = jax.scipy.special.digamma(wide(t) + 1) if full else 0
    return loss, (d, (slope - wide(log_rate)).astype(target.dtype))


@poisson_nll.backward
def _(residuals, g, *, full):
    d, *d_target = residuals
    times = lambda d: (wide(g).astype(wide(d).dtype) * wide(d)).astype(d.dtype)
    return times(d), times(d_target[0]) if d_target else None


def _rate(s, dtype):
    """eˢ, at most a third of the dtype's largest number."""
    return jnp.exp(jnp.minimum(s, math.log(float(jnp.finfo(dtype).max)) - 1))


@rule
def pinball(prediction: chex.Array, target: chex.Array, *, quantile: float = 0.5) -> jax.Array:
    """The quantile loss: Σᵢ of τ d where d > 0, (τ − 1) d elsewhere; d = tᵢ − fᵢ, τ = `quantile`.

    Its mean is least where the prediction is the target's τ-quantile: 0.5 gives the median, half
    the absolute error; 0.9 what nine targets of ten lie below.

    Args:
        prediction: f, floating, any shape.
        target: t, real, of the same shape.
        quantile: τ, from 0 to 1. (For several, add their losses.)

    Returns:
        The loss, a scalar: the sum over all entries.

    Local gradient: −τ for the prediction where t > f, 1 − τ where t < f; the negative of it for a
    floating target. Kept: the sign of t − f, one byte an entry. At the kink t = f it is 0.

    Raises:
        TypeError: the prediction isn't real floating, or the target isn't real.
        ValueError: the shapes differ, or quantile isn't from 0 to 1.

    Source: Koenker, Bassett, "Regression quantiles", Econometrica 1978.
    """
    must_be_alike("pinball", prediction=prediction, target=target)
    arguments.number("pinball", "quantile", quantile, least=0, most=1)
    f = wide(prediction)
    d = target.astype(prediction.dtype).astype(f.dtype) - f
    return jnp.sum(jnp.where(d > 0, quantile * d, (quantile - 1) * d)).astype(prediction.dtype)


@pinball.forward
def _(prediction, target, *, quantile):
    t = target.astype(prediction.dtype)
    sign = (t > prediction).astype(jnp.int8) - (t < prediction).astype(jnp.int8)
    return pinball(prediction, target, quantile=quantile), (sign, empty(target))


@pinball.backward
def _(residuals, g, *, quantile):
    sign, target = residuals
    d = wide(g)
    slope = jnp.where(sign > 0, -quantile, jnp.where(sign < 0, 1 - quantile, 0)).astype(d.dtype)
    d_prediction = (d * slope).astype(g.dtype)
    return d_prediction, (-d_prediction).astype(target.dtype) if is_floating(target) else None
