"""One example's gradient of one parameter, kept as the factors it is a product of.

Where a weight W meets an input in `y = W a`, its gradient is the outer product g aᵀ of the
upstream gradient g and the input a, and need not be formed: its norm is |g| |a| (Goodfellow,
"Efficient per-example gradient computations", 2015). A weight that is used at several
positions, pixels of an image or words of a text, has the sum Σₚ gₚ aₚᵀ = Gᵀ A. So a gradient is
a sum of terms, of four kinds:

    Product       Gᵀ A                    matrix products in all their forms
    Convolution   x convolved with g      convolutions: Gᵀ A too, where A has x's patches
    Rows          g added to rows         an embedding: Gᵀ A too, where A is one-hot
    Dense         itself                  all else

All here is written for one example; `jax.vmap` makes the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fnn.per_example.convolution import Convolution
from fnn.per_example.measured import Measured
from fnn.per_example.precision import norm_of, unit, vdot
from fnn.per_example.product import Product
from fnn.per_example.rows import Rows
from fnn.precision import total, wide, wide_together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """The gradient itself. why: what kept it from being factored, in words."""

    value: Any
    why: str = dataclasses.field(metadata={"static": True})

    positions = 1
    norm_by_gram = False

    def materialize(self):
        """The gradient itself, of the parameter's shape."""
        return self.value

    def normalised(self) -> tuple[Dense, Any]:
        """(the same over c, c) with entries near one."""
        value, scale = unit(wide(self.value))
        return dataclasses.replace(self, value=value), scale

    def measured(self) -> Measured:
        """The norm, with nothing that cancels."""
        norm = norm_of(self.value)
        return Measured(norm, norm)

    def dot(self, w):
        """Re⟨gradient, w⟩ for an array of the parameter's shape."""
        return vdot(*wide_together(self.value, w))

    def rows(self, index):
        """The gradient's rows at `index`; zeros out of bounds."""
        return self.value.at[index].get(mode="fill", fill_value=0)

    def joined(self, other) -> Dense | None:
        """The sum with another dense gradient; None with any other term."""
        if not isinstance(other, Dense):
            return None
        same = self.why == other.why or not other.why
        value = total([self.value, other.value])
        return Dense(value, self.why if same else f"{self.why}; {other.why}")

    def kept(self) -> str:
        """What is kept of one example, in words."""
        return "dense"


Factored = Product | Convolution | Rows
Term = Factored | Dense


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """A factored gradient: the sum of its terms. `+` is all that the reverse sweep asks of it."""

    terms: tuple[Term, ...]

    def __add__(self, other: Terms) -> Terms:
        return Terms((*self.terms, *other.terms))


def materialized(terms: Sequence[Term]):
    """The gradient that the terms add up to."""
    return functools.reduce(jnp.add, [t.materialize() for t in terms])


def as_wide(terms: Sequence[Term]) -> list[Term]:
    """Terms whose materialised gradients have at least float32."""
    return [Dense(wide(t.value), t.why) if isinstance(t, Dense) else t for t in terms]


def one_of(term: Term) -> Term:
    """The shapes of one example's term."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), term)


def merged(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Terms of one form as one term with more positions; dense ones added up."""
    found: list[Term] = []
    for term in terms:
        for i, other in enumerate(found):
            both = other.joined(term)
            if both is not None:
                found[i] = both
                break
        else:
            found.append(term)
    return tuple(found)


def no_wider(term: Term, dtype) -> Term:
    """The term with no floats wider than those of a dtype, so that it adds up with others.

    In mixed precision an input, and so a factor, may be wider than the parameter.
    """
    bits = jnp.finfo(dtype).bits
    narrow = lambda x: (
        x.astype(dtype)
        if jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits > bits
        else x
    )
    return jax.tree.map(narrow, term)


def economical(term: Term) -> Term:
    """The gradient itself in place of factors that hold more numbers than it does.

    The positions' products are summed in any case, once; and the norm of so many positions is
    cheapest by the sum.
    """
    if isinstance(term, Dense):
        return term
    kept = sum(x.size for x in jax.tree.leaves(term))
    size = math.prod(term.layout.shape)
    if kept < size or (isinstance(term, Product) and term.positions == 1):
        return term
    return Dense(term.materialize(), f"its factors hold {kept:,} numbers, the gradient {size:,}")
