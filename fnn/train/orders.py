"""Orders of the examples, drawn as `jax.random.permutation` draws them, sorted on the host.

JAX draws a permutation by sorting the examples by random numbers. XLA's sort on CPUs is slow: 1437
examples take 0.59 ms there with JAX 0.10.2, and 0.12 with 0.12.0.1, more than an epoch of a small
network; numpy's takes 0.008 ms.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def rounds_of(size: int) -> int:
    """How often to sort: so that equal numbers, which stay as they were, don't matter.

    As `jax.random.permutation` has it: with n³ < 2³² once, and so on.
    """
    return math.ceil(3 * math.log(max(1, size)) / math.log(2**32 - 1))


def sort_bits(key: Any, size: int) -> jax.Array:
    """The random numbers to sort by, traced: uint32, (rounds, size)."""
    found = []
    for _ in range(rounds_of(size)):
        key, own = jax.random.split(key)
        found.append(jax.random.bits(own, (size,), jnp.uint32))
    return jnp.stack(found) if found else jnp.zeros((0, size), jnp.uint32)


def sort_bits_of_epochs(key: Any, first: Any, count: int, size: int) -> jax.Array:
    """`sort_bits` of the keys of `count` epochs from number `first` on, along a first axis."""

    def of_epoch(i):
        return sort_bits(jax.random.fold_in(key, i), size)

    epochs = jnp.asarray(first, jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
    # By other generators, what is drawn from a key depends on the keys that are drawn from beside.
    alike = jax.random.key_impl(key) == "threefry2x32"
    return jax.vmap(of_epoch)(epochs) if alike else lax.map(of_epoch, epochs)


def sorted_orders(bits: Any) -> np.ndarray:
    """The orders that these numbers make.

    Args:
        bits: uint32 of shape (..., rounds, size), `sort_bits` of each key.

    Returns:
        int32 of shape (..., size): `jax.random.permutation(key, size)` of each.
    """
    bits = np.asarray(bits)
    *_, rounds, size = bits.shape
    places = np.arange(size, dtype=np.uint64)
    order = np.broadcast_to(places.astype(np.int32), (*bits.shape[:-2], size))
    for i in range(rounds):
        packed = bits[..., i, :].astype(np.uint64) << np.uint64(32) | places
        packed.sort(axis=-1)
        by = (packed & np.uint64(2**32 - 1)).astype(np.int64)
        order = np.take_along_axis(order, by, axis=-1)
    return order
