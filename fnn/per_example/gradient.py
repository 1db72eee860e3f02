"""The gradients of one parameter for each example of a batch, factored."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fnn import arguments
from fnn.eager import once
from fnn.meshes import batch_spec, with_auto_axes
from fnn.per_example import exact_norms, inner_products, moments, pairs, sums
from fnn.per_example.measured import Measured
from fnn.per_example.precision import as_dtype
from fnn.per_example.terms import Term, materialized, merged, one_of
from fnn.precision import widest


def exactly(method: Callable) -> Callable:
    """The method, of pytrees of arrays, in full float32 on accelerators too.

    Their products else round the factors; but what is found here is a bound, or may be small
    beside what it is a sum of.
    """

    @functools.wraps(method)
    def exact(*args):
        with jax.default_matmul_precision("highest"):
            return once(method)(*args)

    return exact


def _of_examples(method: Callable) -> Callable:
    """A method whose results have the batch as first axis, for batches on any mesh."""

    @functools.wraps(method)
    def on_any_mesh(self, *args):
        return with_auto_axes(method, (self, *args), batch_spec(self.terms))

    return on_any_mesh


def _of_batch(method: Callable) -> Callable:
    """A method whose results are about the whole batch, for batches on any mesh."""

    @functools.wraps(method)
    def on_any_mesh(self, *args):
        return with_auto_axes(method, (self, *args))

    return on_any_mesh


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("terms",),
    meta_fields=("path", "shape", "dtype"),
)
class FactoredGradient:
    """The gradients of one parameter, one for each example of a batch, as sums of products.

    A pytree: its arrays have the batch as their first axis. `fnn.per_example.grads` makes a
    tree of them, in the place of the parameters. The arrays are factors: to multiply gradients
    or add them up, use `scale` and `add` (or `2 * g + h`), never `jax.tree.map` over the arrays,
    which would multiply a gradient once for each of its factors.

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

    @_of_batch
    def mean(self) -> jax.Array:
        """The gradient of the mean loss, of the parameter's shape and dtype."""
        # Not the sum over the batch size: in float16 the sum may be inf where the mean isn't.
        return as_dtype(sums.weighted_sums(self.terms, None) / self.batch_size, self.dtype)

    def weighted_sum(self, weights: chex.Array | None) -> jax.Array:
        """Σₙ cₙ gₙ for weights c (batch,): one matrix product; shape and dtype the parameter's.

        Raises:
            TypeError: weights aren't real numbers.
            ValueError: they are of another shape than (batch,).
        """
        if weights is not None:
            weights = self._factors("weighted_sum", "weights", weights)
            if weights.shape != (self.batch_size,):
                raise ValueError(
                    f"weighted_sum of {self.path or 'params'}: weights has shape "
                    f"{weights.shape}, but there are {self.batch_size} examples: it must have "
                    f"shape ({self.batch_size},)."
                )
        return self._weighted_sum(weights)

    @_of_batch
    def _weighted_sum(self, weights: jax.Array | None) -> jax.Array:
        added = functools.reduce(jnp.add, [sums.weighted_sum(t, weights) for t in self.terms])
        return as_dtype(added, self.dtype)

    @_of_examples
    def norms(self) -> jax.Array:
        """|gₙ|, (batch,), real, at least float32."""
        return self.measured().norm

    def squared_norms(self) -> jax.Array:
        """|gₙ|², (batch,), real, at least float32."""
        return lax.square(self.norms())

    @exactly
    def measured(self) -> Measured:
        """The norms, and what bounds their rounding errors."""
        return exact_norms.norms(self.terms)

    def rounding(self, measured: Measured) -> jax.Array:
        """By how much |gₙ| may be larger, (batch,), in a sum of the products: rounding errors,
        where the products cancel; 0 where they don't."""
        positions = [one_of(t).positions for t in self.terms]
        return measured.rounding(sum(positions))

    def scale(self, factor: chex.Numeric) -> FactoredGradient:
        """cₙ gₙ, for a number or an array of shape (), c, or one for each example, (batch,).

        Multiplying the arrays of the tree (`jax.tree.map`) is something else: a gradient is a
        product of them, and would be multiplied several times.

        Raises:
            TypeError: factor isn't of real numbers.
            ValueError: it is neither a number nor of shape (batch,).
        """
        factor = self._factors("scale", "factor", factor)
        if factor.shape not in ((), (self.batch_size,)):
            raise ValueError(
                f"scale: factor must have shape () or ({self.batch_size},), one for each example, "
                f"but got {arguments.show(factor)}."
            )
        return self._scale(factor)

    @staticmethod
    def _factors(where: str, name: str, value: Any) -> jax.Array:
        """An array of real numbers, checked."""
        dtype = jax.typeof(arguments.array(where, name, value)).dtype
        if jnp.issubdtype(dtype, jnp.complexfloating) or not jnp.issubdtype(dtype, jnp.number):
            raise TypeError(
                f"{where}: {name} must be a real number, or one for each example, but got "
                f"{arguments.show(value)}."
            )
        return jnp.asarray(value)

    @_of_examples
    def _scale(self, factor: jax.Array) -> FactoredGradient:
        factors = jnp.broadcast_to(factor, (self.batch_size,))
        terms = [sums.scaled(t, factors) for t in self.terms]
        return FactoredGradient(terms, self.path, self.shape, self.dtype)

    @_of_examples
    def keep(self, which: chex.Array) -> FactoredGradient:
        """gₙ where (batch,) is True, and 0 elsewhere, whatever is there."""
        terms = [sums.kept(t, which) for t in self.terms]
        return FactoredGradient(terms, self.path, self.shape, self.dtype)

    def add(self, other: FactoredGradient) -> FactoredGradient:
        """gₙ + hₙ, of the same parameter and as many examples: the terms of both.

        Raises:
            TypeError: other is no factored gradient.
            ValueError: it is of another shape, or of another number of examples.
        """
        _check_factored("add", other)
        if (self.shape, self.batch_size) != (other.shape, other.batch_size):
            raise ValueError(
                f"add: {self.path or 'params'} has {self.batch_size} gradients of shape "
                f"{self.shape} in one tree and {other.batch_size} of shape {other.shape} in the "
                "other; both must be of the same parameters and of as many examples."
            )
        return self._add(other)

    @_of_examples
    def _add(self, other: FactoredGradient) -> FactoredGradient:
        dtype = widest(self.dtype, other.dtype)
        terms = jax.vmap(merged)([*self.terms, *other.terms])
        return FactoredGradient(terms, self.path, self.shape, dtype)

    def __mul__(self, factor: chex.Numeric) -> FactoredGradient:
        return self.scale(factor)

    __rmul__ = __mul__
    __add__ = add
    __array_ufunc__ = None  # numpy's arrays leave `array * gradient` to __rmul__

    def gram(self, other: FactoredGradient | None = None) -> jax.Array:
        """Re⟨gₙ, hₘ⟩ for all pairs, (batch, other batch); h = g unless given.

        Raises:
            TypeError: other is no factored gradient.
            ValueError: it is of another shape.
        """
        other = self if other is None else other
        _check_factored("gram", other)
        if self.shape != other.shape:
            raise ValueError(
                f"gram: {self.path or 'params'} has shape {self.shape} in one tree of gradients "
                f"and {other.shape} in the other; both must be gradients of the same parameters."
            )
        return self._gram(None if other is self else other)

    @_of_examples
    @exactly
    def _gram(self, other: FactoredGradient | None) -> jax.Array:
        if other is not None:
            return pairs.gram(self.terms, other.terms)
        products = pairs.gram(self.terms, self.terms)
        # So that it is never negative: a pair's product is a sum that may round below zero.
        is_diagonal = jnp.eye(self.batch_size, dtype=bool)
        return jnp.where(is_diagonal, self.squared_norms()[:, None], products)

    def dot(self, tensor: chex.Array) -> jax.Array:
        """Re⟨gₙ, tensor⟩, (batch,), for a tensor of the parameter's shape.

        Raises:
            TypeError: it is no array.
            ValueError: it is of another shape.
        """
        tensor = jnp.asarray(arguments.array("dot", "tensor", tensor))
        if tensor.shape != self.shape:
            raise ValueError(
                f"dot: the parameter {self.path or 'params'} has shape {self.shape}, but the "
                f"tensor given for it has shape {tensor.shape}."
            )
        return self._dot(tensor)

    @_of_examples
    @exactly
    def _dot(self, tensor: jax.Array) -> jax.Array:
        return jax.vmap(inner_products.dot, in_axes=(0, None))(self.terms, tensor)

    @_of_batch
    @exactly
    def second_moment(self) -> jax.Array:
        """The mean over the examples of |gₙ|², entry by entry, of the parameter's shape."""
        return moments.sum_of_squares(self.terms) / self.batch_size

    @_of_batch
    @exactly
    def variance(self) -> jax.Array:
        """The mean of |gₙ − mean|², entry by entry, of the parameter's shape.

        It is the second moment less |mean|² where no entry's variance is much smaller than both;
        else the gradients are formed, a few at a time, and their deviations squared.
        """
        variance = moments.sum_of_squared_deviations(self.terms) / self.batch_size
        return lax.max(variance, jnp.zeros_like(variance))

    @_of_examples
    def materialize(self) -> jax.Array:
        """The gradients themselves, (batch, *shape), in the parameter's dtype."""
        return as_dtype(jax.vmap(materialized)(self.terms), self.dtype)

    def explain(self) -> list[dict[str, Any]]:
        """How each term is kept, why, and how many numbers that takes: a dict for each.

        Keys: path, shape, kept, why, numbers (kept for one example), dense (of one gradient).
        """
        return [
            {
                "path": self.path or "params",
                "shape": self.shape,
                "kept": t.kept(),
                "why": t.why,
                "numbers": sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(t)),
                "dense": math.prod(self.shape),
            }
            for t in self.terms
        ]


def _check_factored(where: str, other: Any) -> None:
    if not isinstance(other, FactoredGradient):
        raise TypeError(f"{where}: a factored gradient is needed, but got {arguments.show(other)}.")
