"""Mixed precision: parameters in float32, the forward and the backward pass in 16 bits."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.precision import wide_dtype

# What a step computes in.
DTYPES = ("bfloat16", "float16", "float32", "float64")


def check_compute(where: str, compute: Any) -> Any:
    """The dtype that `compute` names; None for None.

    Raises:
        TypeError: it is no dtype of real floats.
        ValueError: it is float64, and JAX computes in 32 bits.
    """
    if compute is None:
        return None
    try:
        dtype = jnp.dtype(compute)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise TypeError(
            f"{where}: compute must be a dtype of real floats, {', '.join(DTYPES[:-1])} or "
            f"{DTYPES[-1]}, but got {arguments.show(compute)}."
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{where}: compute is {dtype}, but JAX computes in 32 bits.")
    return dtype


def cast(tree: Any, dtype: Any) -> Any:
    """The tree with its arrays of real floats in this dtype; for None as it is."""
    if dtype is None:
        return tree
    real = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if real(x) else x, tree)


def optimizers_promotion() -> contextlib.AbstractContextManager:
    """Within it, an optimiser's dtypes promote as usual, where JAX is set to be strict, too.

    Those of optax rely on it: Adam raises a float to the power of an integer. What they return is
    cast to the types of the state.
    """
    return jax.numpy_dtype_promotion("standard")


def wide(tree: Any) -> Any:
    """The tree with its floats in float32 at least."""

    def of(x):
        return x.astype(wide_dtype(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(of, tree)
