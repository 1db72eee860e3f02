"""The gradient of a table of which rows were looked up: an embedding's."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fnn.per_example.layout import Layout
from fnn.per_example.measured import Measured
from fnn.per_example.precision import norm_of, unit, vdot
from fnn.precision import wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a table that were looked up: index (positions,), g (1, positions, row).

    Their gradient is g, added to the table's rows at `index`; an index out of bounds counts
    for nothing.
    """

    index: Any
    g: Any
    layout: Layout = dataclasses.field(metadata={"static": True})

    why = "gradient is G added to the rows"

    def form(self):
        """The gradient, (1, table's rows, row)."""
        (_, size, _) = self.layout.sizes
        g = wide(self.g)
        return jnp.zeros((size, g.shape[-1]), g.dtype).at[self.index].add(g[0], mode="drop")[None]

    def materialize(self):
        """The gradient itself, of the parameter's shape."""
        return self.layout.to_parameter(self.form())

    def once(self) -> Rows:
        """The same with each row mentioned once: its sum stands where it came first."""
        g = wide(self.g)
        (_, size, _) = self.layout.sizes
        (p,) = self.index.shape
        if p == 1:
            valid = self.index < size
            return dataclasses.replace(self, g=jnp.where(valid[None, :, None], g, 0))
        equal = self.index[:, None] == self.index[None, :]
        first = jnp.argmax(equal, axis=1)
        g = jnp.where((self.index < size)[None, :, None], g, 0)
        g = jax.ops.segment_sum(g[0], first, num_segments=p)[None]
        is_first = first == jnp.arange(p)
        return dataclasses.replace(self, index=jnp.where(is_first, self.index, size), g=g)

    norm_by_gram = False

    @property
    def positions(self) -> int:
        return self.index.shape[-1]

    def normalised(self) -> tuple[Rows, Any]:
        """(the same over c, c) with entries near one."""
        g, scale = unit(wide(self.g))
        return dataclasses.replace(self, g=g), scale

    def measured(self) -> Measured:
        """The norm of the rows' sums."""
        once = self.once().g
        norm = norm_of(once)
        if self.positions == 1:
            return Measured(norm, norm)
        rows = norm_of(wide(self.g), (-1,))[..., None]
        return Measured(norm, norm_of(dataclasses.replace(self, g=rows).once().g))

    def dot(self, w):
        """Re⟨gradient, w⟩ for an array of the parameter's shape."""
        w = self.layout.from_parameter(w)[0]
        g = wide(self.g)
        return vdot(g[0], w.at[self.index].get(mode="fill", fill_value=0))

    def rows(self, index):
        """None: no rows of the gradient without forming it."""
        return None

    def as_one(self) -> Rows:
        """A batch, or a loop's steps, as more positions of one example."""
        n, _, p, row = self.g.shape
        return Rows(self.index.reshape(-1), self.g.reshape(1, n * p, row), self.layout)

    def real_part(self) -> Rows:
        """Of a real table in complex arithmetic."""
        return dataclasses.replace(self, g=jnp.real(self.g))

    def joined(self, other) -> Rows | None:
        """The sum with rows of another look-up in the same table, the positions of both."""
        if not isinstance(other, Rows) or self.layout != other.layout:
            return None
        if self.g.dtype != other.g.dtype:
            return None
        index = jnp.concatenate([self.index, other.index], axis=-1)
        return Rows(index, jnp.concatenate([self.g, other.g], axis=-2), self.layout)

    def kept(self) -> str:
        """What is kept of one example, in words."""
        return f"indices ({self.index.shape[-1]}), G ({self.g.shape[-2]} × {self.g.shape[-1]})"
