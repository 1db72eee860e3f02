"""The quadratic model of the loss along one or two directions, and how far to go."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Quadratic(NamedTuple):
    """slopeᵀx + ½ xᵀ matrix x, of one or two numbers x.

    root: of the matrix's diagonal; slopes: by x · root; cosine: the matrix's other entry over
        both roots.
    """

    root: jax.Array
    slopes: jax.Array
    cosine: jax.Array

    @staticmethod
    def of(slope, matrix) -> Quadratic:
        root = jnp.sqrt(jnp.diagonal(matrix))
        inverse = _inverse_or_zero(root)
        return Quadratic(root, slope * inverse, matrix[0, -1] * inverse[0] * inverse[-1])

    def minimum(self):
        inverse = _inverse_or_zero(self.root)
        if self.slopes.shape[0] == 1:
            return -self.slopes * inverse
        # The last step may be zero, or parallel to the direction: then it counts for nothing.
        (h, k), c = self.slopes, self.cosine
        det = 1 - c * c
        is_sound = det > 1e-6
        both = jnp.stack([c * k - h, c * h - k]) / jnp.where(is_sound, det, 1)
        return jnp.where(is_sound, both, jnp.stack([-h, jnp.zeros_like(h)])) * inverse

    def square(self, x):
        """xᵀ matrix x."""
        y = x * self.root
        cross = 2 * self.cosine * y[0] * y[-1] if len(y) == 2 else 0
        return jnp.sum(y * y) + cross


def _inverse_or_zero(x):
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def share_of(change: Callable, slope, before):
    """The largest of 1, ½, ¼, … of a step at which the loss falls by half of the model's ½ slope.

    Changes are known to the rounding of the loss.
    """
    rounding = 4 * jnp.finfo(slope.dtype).eps * jnp.abs(before)

    def is_too_long(share):
        return ~(change(share) <= share * slope / 4 + rounding) & (share > 2.0**-100)

    return lax.while_loop(is_too_long, lambda share: share / 2, jnp.ones((), slope.dtype))
