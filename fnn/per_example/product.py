"""The gradient of a weight in a matrix product, Gᵀ A."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fnn.per_example.layout import Layout
from fnn.per_example.measured import Measured
from fnn.per_example.precision import (
    divided,
    largest,
    norm_of,
    power_of_two,
    root,
    vdot,
)
from fnn.precision import wide_together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """Gᵀ A: a is (stack, positions, in), g is (stack, positions, out)."""

    a: Any
    g: Any
    layout: Layout = dataclasses.field(metadata={"static": True})

    why = "gradient is Gᵀ A"

    @property
    def positions(self) -> int:
        return self.a.shape[-2]

    def form(self):
        """The product, (stack, out, in)."""
        a, g = wide_together(self.a, self.g)
        if a.shape[-2] == 1:
            return g[:, 0, :, None] * a[:, 0, None, :]
        return jnp.einsum("spo,spi->soi", g, a)

    def materialize(self):
        """The gradient itself, of the parameter's shape."""
        return self.layout.to_parameter(self.form())

    def normalised(self) -> tuple[Product, Any]:
        """(the same over c, c) with factors near one, so that no product leaves the range."""
        a, g = wide_together(self.a, self.g)
        a_sizes, g_sizes = (power_of_two(largest(x, (-1,))) for x in (a, g))
        sizes = a_sizes * g_sizes
        scale = jnp.max(sizes, initial=0.0)
        g = divided(g, g_sizes) * divided(sizes, scale).astype(g.dtype)
        return Product(divided(a, a_sizes), g, self.layout), scale

    def measured(self) -> Measured:
        """|Gᵀ A|: |g| |a| for one position, ⟨A Aᵀ, G Gᵀ⟩ or the formed product for several."""
        a, g = wide_together(self.a, self.g)
        a_norms, g_norms = norm_of(a, (-1,)), norm_of(g, (-1,))
        length = norm_of(a_norms * g_norms)
        if self.positions == 1:
            return Measured(length, length)
        if not self.norm_by_gram:
            return Measured(norm_of(self.form()), length)
        products = (_gram(a) * _gram(g)).real
        norm, length = root(jnp.sum(products)), root(jnp.sum(jnp.abs(products)))
        # A square that a row lost may count by what the other factor's row multiplied it with.
        info = jnp.finfo(norm.dtype)
        lost = math.sqrt(a.size) * norm_of(g_norms) + math.sqrt(g.size) * norm_of(a_norms)
        return Measured(norm, length, lost * (float(info.tiny) ** 0.5 / float(info.eps)))

    @property
    def norm_by_gram(self) -> bool:
        """Are the positions' inner products cheaper than the product itself?"""
        (_, out, ins), p = self.layout.sizes, self.positions
        return p > 1 and p * (out + ins) < out * ins

    def dot(self, w):
        """Re⟨gradient, w⟩ for an array of the parameter's shape."""
        a, g = wide_together(self.a, self.g)
        w = self.layout.from_parameter(w)
        (_, out, ins) = self.layout.sizes
        if ins <= out:
            return vdot(g, jnp.einsum("spi,soi->spo", a.conj(), w))
        return vdot(a, jnp.einsum("spo,soi->spi", g.conj(), w))

    def rows(self, index):
        """The gradient's rows at `index`, (n, …): of the parameter's first axis; or None."""
        owner = self.layout.owner(0)
        if owner is None or owner[0] == "stack" or len(getattr(self.layout, owner[0])) != 1:
            return None
        a, g = wide_together(self.a, self.g)
        if owner[0] == "out":
            picked = jnp.einsum("spn,spi->nsi", g[..., index], a)
        else:
            picked = jnp.einsum("spo,spn->nso", g, a[..., index])
        rest = self.layout.without(0)
        return jax.vmap(rest.to_parameter)(picked)

    def as_one(self) -> Product:
        """A batch, or a loop's steps, as more positions of one example."""
        n, s, p, _ = self.g.shape
        if s == 1:
            flat = lambda x: x.reshape(1, n * p, x.shape[-1])
        else:
            flat = lambda x: jnp.moveaxis(x, 0, 1).reshape(s, n * p, x.shape[-1])
        return Product(flat(self.a), flat(self.g), self.layout)

    def real_part(self) -> Product:
        """Of a real weight in complex products: Re(Gᵀ A) = (Re G)ᵀ Re A - (Im G)ᵀ Im A."""
        a = jnp.concatenate([jnp.real(self.a), jnp.imag(self.a)], axis=-2)
        g = jnp.concatenate([jnp.real(self.g), -jnp.imag(self.g)], axis=-2)
        return Product(a, g, self.layout)

    def joined(self, other) -> Product | None:
        """The sum with another product of the same layout, with the positions of both."""
        if not isinstance(other, Product) or self.layout != other.layout:
            return None
        if self.g.dtype != other.g.dtype or self.a.dtype != other.a.dtype:
            return None
        a = jnp.concatenate([self.a, other.a], axis=-2)
        return Product(a, jnp.concatenate([self.g, other.g], axis=-2), self.layout)

    def kept(self) -> str:
        """What is kept of one example, in words."""
        stack, p, ins = self.a.shape[-3:]
        out = self.g.shape[-1]
        times = f"{stack} × " if stack > 1 else ""
        return f"{times}A ({p} × {ins}), G ({p} × {out})"


def _gram(x):
    """(stack, positions, positions) inner products."""
    return jnp.einsum("spi,sqi->spq", x, x.conj())
