"""Dtypes for sums and for numbers of several dtypes together, however strict JAX's promotion is.

`jnp.promote_types` refuses two dtypes with `jax_numpy_dtype_promotion="strict"`, which is there to
find what was joined without a thought. What is joined by these functions is meant to be.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def widest(*dtypes: Any) -> Any:
    """The dtype that numbers of all of these are converted to, by JAX's standard promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def wide_dtype(dtype: Any) -> Any:
    """The dtype to sum in: at least float32; 65,505 ones are inf in float16, and 257 are 256 in
    bfloat16. Numbers that aren't floats are summed in float32."""
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32
    return dtype if is_wide else jnp.dtype(jnp.float32)


def wide(x: Any) -> jax.Array:
    """x in the dtype to sum in.

    Where a value is a sum, or is divided by one, 16-bit floats are summed in float32 and the
    result rounded once.
    """
    return x.astype(wide_dtype(x.dtype))


def wide_together(*arrays: Any) -> tuple[jax.Array, ...]:
    """The arrays in one dtype of at least float32."""
    dtype = widest(*[wide_dtype(x.dtype) for x in arrays])
    return tuple(x.astype(dtype) for x in arrays)


def product(numbers: str, a: Any, b: Any, out_sharding: Any = None) -> jax.Array:
    """`jnp.einsum(numbers, a, b)`, summed in at least float32.

    What was computed in float32 is rounded to the other factor's 16 bits first.
    """
    narrow = min(a.dtype, b.dtype, key=lambda d: jnp.finfo(d).bits)
    options: dict[str, Any] = {} if out_sharding is None else {"out_sharding": out_sharding}
    options["preferred_element_type"] = wide_dtype(a.dtype)
    return jnp.einsum(numbers, a.astype(narrow), b.astype(narrow), **options)


def signed(integers: Any) -> jax.Array:
    """Labels or positions as signed integers of 32 bits at least.

    An int8 ends at 127, where there may be more classes; differences of unsigned ones would wrap.
    """
    return jnp.asarray(integers, jnp.int64 if integers.dtype.itemsize == 8 else jnp.int32)


def total(arrays: Sequence[Any]) -> jax.Array:
    """The sum of arrays of one shape, entry by entry, in the widest of their dtypes."""
    dtype = widest(*[x.dtype for x in arrays])
    return functools.reduce(jnp.add, [x.astype(dtype) for x in arrays])
