"""A norm found from inner products, and how far it can be relied on.

A norm from the positions' inner products, |Gᵀ A|² = ⟨A Aᵀ, G Gᵀ⟩, is a sum of numbers that may
be far larger than it is, where the positions' products cancel; so is that of several terms. What
they add up to without their signs bounds the rounding error: each norm comes with its *length*,
and where the length is more than LONGEST norms, the gradient itself is formed (see
`exact_norms.py`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

# A norm found from products is wrong by about eps · (length / norm)², relatively: from here on
# it is found from the gradient itself.
LONGEST = 6.0


class Measured(NamedTuple):
    """A norm, and what tells whether it can be relied on; real numbers of at least float32.

    length: √Σ |products|, where `norm` is the root of a sum of products; the norm of the
        positions' own norms, √Σₚ |gₚ|² |aₚ|², where it is that of the formed gradient; of a
        convolution that is formed an estimate of this, which may be smaller. The rounding error of
        norm² is about eps length², that of a formed gradient eps length.
    least: of smaller norms, squares that were lost below the smallest number may count.
    """

    norm: Any
    length: Any
    least: Any = 0.0

    def times(self, factor) -> Measured:
        return Measured(*[x * factor for x in self])

    @property
    def is_in_range(self):
        """Not where squares over- or underflowed, nor for nan."""
        info = jnp.finfo(self.norm.dtype)
        smallest = (float(info.tiny) / float(info.eps)) ** 0.5
        largest = float(info.max) ** 0.5
        return (self.norm >= self.least) & (self.length > smallest) & (self.length < largest)

    @property
    def cancels(self):
        return self.length > LONGEST * self.norm

    def rounding(self, positions: int):
        """Where it cancels, a bound of the rounding errors of a sum of the formed products."""
        eps = float(jnp.finfo(self.norm.dtype).eps)
        bound = self.length * (4 * eps * math.sqrt(positions))
        return jnp.where(self.cancels, bound, jnp.zeros_like(bound))
