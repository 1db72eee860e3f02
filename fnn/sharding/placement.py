"""Arrays onto a mesh of devices, of one process or of many.

Of many processes each has some of the mesh's devices, and an array on the mesh can be read by no
process whole. What is made from the host's arrays is made by each process for its own devices.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding


def is_spread(mesh: Mesh) -> bool:
    """Whether devices of the mesh belong to other processes."""
    return any(device.process_index != jax.process_index() for device in mesh.devices.flat)


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array as the sharding says; itself if it lies so. Each process has the same x.

    From an array of another mesh it goes straight from device to device, never whole to one.
    """
    if isinstance(x, jax.Array) and lies(x, sharding):
        return x
    if not is_spread(sharding.mesh):  # type: ignore[arg-type]
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(x)
    if _is_key(x):
        whole = np.asarray(jax.random.key_data(x))
        data = put(whole, NamedSharding(sharding.mesh, sharding.spec))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def put_rows(x: Any, rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """x[rows] as the sharding says. A process reads the rows of its own devices alone.

    Args:
        x: an array with the examples along its first axis, the same in each process.
        rows: the numbers of examples.
    """
    if isinstance(x, jax.Array) or not is_spread(sharding.mesh):  # type: ignore[arg-type]
        return put(x[rows], sharding)
    shape = (len(rows), *x.shape[1:])

    def of_device(index):
        return np.asarray(x[rows[index[0]]][(slice(None), *index[1:])])

    return jax.make_array_from_callback(shape, sharding, of_device)


def put_own(x: Any, sharding: NamedSharding) -> jax.Array:
    """As the sharding says: all processes' arrays, one after the other along the first axis."""
    if isinstance(x, jax.Array) and (lies(x, sharding) or not x.is_fully_addressable):
        return put(x, sharding)
    if not is_spread(sharding.mesh):  # type: ignore[arg-type]
        return put(x, sharding)
    return jax.make_array_from_process_local_data(sharding, np.asarray(x))


def lies(x: jax.Array, sharding: NamedSharding) -> bool:
    """Whether an array lies as the sharding says, on the same kind of axes."""
    own = x.sharding
    if not isinstance(own, NamedSharding) or own.mesh != sharding.mesh:
        return False
    return own.is_equivalent_to(sharding, x.ndim)


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key)
