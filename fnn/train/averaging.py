"""The exponential moving average of the parameters over the steps."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from fnn.train.precision import wide


def first_average(params: Any) -> Any:
    """What the average is before the first step: the parameters, in float32 at least."""
    return jax.tree.map(lambda p: jnp.array(wide(jnp.asarray(p)), copy=True), params)


def averaged(average: Any, params: Any, decay: float, count: jax.Array) -> Any:
    """The average with the parameters after one more step in it.

        āₜ = āₜ₋₁ + wₜ (pₜ − āₜ₋₁),    wₜ = (1 − β) / (1 − βᵗ)

    It is the mean of p₁, ..., pₜ with the weights βᵗ⁻ⁱ, which is what `optax.ema(β)` returns for
    them (debiased: Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015, section 3).

    Args:
        average: āₜ₋₁, a tree like params.
        params: pₜ.
        decay: β, from 0 to below 1.
        count: t, the number of steps with this one.
    """
    weight = _weight(decay, count)
    return jax.tree.map(
        lambda mean, p: mean + weight.astype(mean.dtype) * (p.astype(mean.dtype) - mean),
        average,
        params,
    )


def _weight(decay: float, count: jax.Array) -> jax.Array:
    dtype = jnp.result_type(float)
    if decay == 0:
        return jnp.ones((), dtype)
    power = jnp.asarray(math.log(decay), dtype) * count.astype(dtype)
    return jnp.asarray(1 - decay, dtype) / -jnp.expm1(power)
