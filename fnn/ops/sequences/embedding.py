"""`embedding`: the rows of a table, one for each index."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments
from fnn.ops.arguments import is_integer, must_be_real, one_or_nan
from fnn.precision import signed


def embedding(E: chex.Array, index: chex.Array) -> jax.Array:
    """E[index]: a row of the table for each index.

    Args:
        E: the table, floating, shape `(vocabulary, features)`.
        index: integers of shape `(...)`, from 0 to vocabulary − 1. Negative ones don't count from
            the end.

    Returns:
        Shape `(..., features)`, of E's dtype. In compiled code, which can't raise, an index out of
        range gives NaN.

    Gradient: g is added to the rows that were looked up. No rule of its own: JAX keeps the indices
    alone.

    Raises:
        TypeError: E isn't real floating, or the index not integers.
        ValueError: E isn't a table, or, where it is known, an index is out of range.
    """
    must_be_real("embedding", E=E)
    arguments.array("embedding", "index", index)
    E, index = jnp.asarray(E), jnp.asarray(index)
    if E.ndim != 2:
        raise ValueError(
            f"embedding: argument 'E' has shape {E.shape}, wanted (vocabulary, features)."
        )
    if not is_integer(index):
        raise TypeError(
            f"embedding: argument 'index' of shape {index.shape} has dtype {index.dtype}, wanted "
            "integers."
        )
    rows = E.shape[0]
    if arguments.is_known(index) and index.size:
        known = np.asarray(index)
        low, high = known.min(), known.max()
        if low < 0 or high >= rows:
            raise ValueError(
                f"embedding: index holds {low if low < 0 else high}, but E has {rows} rows: "
                f"indices are 0, ..., {rows - 1}."
            )
    index = signed(index)
    is_row = (index >= 0) & (index < rows)
    place = E.at[jnp.where(is_row, index, 0)]
    found = place.get(mode="promise_in_bounds", wrap_negative_indices=False)
    return jnp.where(is_row[..., None], found, one_or_nan(is_row[..., None], E.dtype))
