"""The gradients of one parameter for each example of a batch, factored."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnn.per_example import terms as algebra
from fnn.per_example.terms import Convolution, Dense, Product, Rows, Term


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("terms",),
    meta_fields=("path", "shape", "dtype"),
)
class FactoredGradient:
    """The gradients of one parameter, one for each example of a batch, as sums of products.

    A pytree: its arrays have the batch as their first axis. `fnn.per_example.grads` makes a
    tree of them, in the place of the parameters.

    Attributes:
        path: where the parameter stands in its tree, as "['hidden']['W']".
        shape, dtype: the parameter's.
        terms: what is kept; see `fnn/per_example/terms.py`.
    """

    def __init__(self, terms: Sequence[Term], path: str, shape: tuple[int, ...], dtype: Any):
        self.terms = tuple(terms)
        self.path, self.shape, self.dtype = path, tuple(shape), dtype

    def __repr__(self) -> str:
        kinds = " + ".join(type(t).__name__ for t in self.terms) or "zero"
        return f"FactoredGradient({self.path or 'params'}: {self.dtype}{list(self.shape)}, {kinds})"

    @property
    def batch_size(self) -> int:
        """How many examples there are."""
        return jax.tree.leaves(self.terms)[0].shape[0]

    def sum(self) -> jax.Array:
        """Σₙ gₙ: the gradient of the sum of the losses, of the parameter's shape and dtype."""
        return self.weighted_sum(None)

    def mean(self) -> jax.Array:
        """The gradient of the mean loss, of the parameter's shape and dtype."""
        return self.sum() / self.batch_size

    def weighted_sum(self, weights: jax.Array | None) -> jax.Array:
        """Σₙ cₙ gₙ for weights c (batch,): one matrix product; shape and dtype the parameter's."""
        if weights is not None:
            weights = jnp.asarray(weights)
            if weights.shape != (self.batch_size,):
                raise ValueError(
                    f"weighted_sum of {self.path or 'params'}: weights has shape "
                    f"{weights.shape}, but there are {self.batch_size} examples: it must have "
                    f"shape ({self.batch_size},)."
                )
        return self._added(lambda t: algebra.weighted_sum(t, weights))

    def norms(self) -> jax.Array:
        """|gₙ|, (batch,), real, at least float32."""
        return jnp.sqrt(self.squared_norms())

    def squared_norms(self) -> jax.Array:
        """|gₙ|², (batch,), real, at least float32."""
        squares = jax.vmap(algebra.squared_norm)(self.terms)
        # A sum of terms with products between them may round to a little less than zero.
        return squares if len(self.terms) == 1 else lax.max(squares, jnp.zeros_like(squares))

    def gram(self, other: FactoredGradient | None = None) -> jax.Array:
        """Re⟨gₙ, hₘ⟩ for all pairs, (batch, other batch); h = g unless given."""
        other = self if other is None else other
        if self.shape != other.shape:
            raise ValueError(
                f"gram: {self.path or 'params'} has shape {self.shape} in one tree of gradients "
                f"and {other.shape} in the other; both must be gradients of the same parameters."
            )
        return algebra.gram(self.terms, other.terms)

    def dot(self, tensor: jax.Array) -> jax.Array:
        """Re⟨gₙ, tensor⟩, (batch,), for a tensor of the parameter's shape."""
        tensor = jnp.asarray(tensor)
        if tensor.shape != self.shape:
            raise ValueError(
                f"dot: the parameter {self.path or 'params'} has shape {self.shape}, but the "
                f"tensor given for it has shape {tensor.shape}."
            )
        return functools.reduce(jnp.add, [jax.vmap(lambda x: x.dot(tensor))(t) for t in self.terms])

    def second_moment(self) -> jax.Array:
        """The mean over the examples of |gₙ|², entry by entry, of the parameter's shape."""
        return self._sum_of_squares() / self.batch_size

    def variance(self) -> jax.Array:
        """The mean of |gₙ − mean|², entry by entry: second moment − |mean|²."""
        (mean,) = algebra._wide(self.mean())
        variance = self.second_moment() - algebra._square(mean)
        return lax.max(variance, jnp.zeros_like(variance))

    def materialize(self) -> jax.Array:
        """The gradients themselves, (batch, *shape), in the parameter's dtype."""
        return _as(jax.vmap(algebra.materialized)(self.terms), self.dtype)

    def explain(self) -> list[dict[str, Any]]:
        """How each term is kept, why, and how many numbers that takes: a dict for each.

        Keys: path, shape, kept, why, numbers (kept for one example), dense (of one gradient).
        """
        return [
            {
                "path": self.path or "params",
                "shape": self.shape,
                "kept": _kept(t),
                "why": _why(t),
                "numbers": sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(t)),
                "dense": math.prod(self.shape),
            }
            for t in self.terms
        ]

    def _sum_of_squares(self) -> jax.Array:
        if len(self.terms) == 1:
            return algebra.sum_of_squares(self.terms[0])
        size = math.prod(self.shape)
        whole = jax.vmap(algebra.materialized)
        return algebra._accumulate(
            lambda ts: jnp.sum(algebra._square(algebra._wide(whole(ts))[0]), axis=0),
            self.terms,
            self.batch_size,
            size,
        )

    def _added(self, function) -> jax.Array:
        return _as(functools.reduce(jnp.add, [function(t) for t in self.terms]), self.dtype)


def _as(x, dtype):
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        x = x.real
    return x.astype(dtype)


def _kept(term: Term) -> str:
    if isinstance(term, Product):
        stack, p, ins = term.a.shape[-3:]
        out = term.g.shape[-1]
        times = f"{stack} × " if stack > 1 else ""
        return f"{times}A ({p} × {ins}), G ({p} × {out})"
    if isinstance(term, Convolution):
        return f"x {list(term.x.shape[1:])}, G {list(term.g.shape[1:])}"
    if isinstance(term, Rows):
        return f"indices ({term.index.shape[-1]}), G ({term.g.shape[-2]} × {term.g.shape[-1]})"
    return "dense"


def _why(term: Term) -> str:
    if isinstance(term, Product):
        return "gradient is Gᵀ A"
    if isinstance(term, Convolution):
        return "gradient is x convolved with G"
    if isinstance(term, Rows):
        return "gradient is G added to the rows"
    return term.why if isinstance(term, Dense) else ""
