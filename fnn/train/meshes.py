"""Meshes of devices with explicit axes (`jax.make_mesh`'s), where every array says how it lies.

There JAX refuses to guess: what a step combines must lie alike. A batch's examples lie as those
of its first sharded array, and parameters that are on no mesh are copied to all of its devices.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def dealt_alike(tree: Any) -> Any:
    """Arrays with the examples along their first axes, all dealt out as the first that is."""
    leaves, structure = jax.tree.flatten(tree)
    dealt = next((s for s in map(_explicit, leaves) if s is not None and s.spec[0]), None)
    if dealt is None:
        return tree

    def alike(x):
        own = _explicit(x)
        rest = own.spec[1:] if own is not None else (None,) * (x.ndim - 1)
        spec = PartitionSpec(dealt.spec[0], *rest)
        if own is not None and own.spec == spec:
            return x
        return jax.sharding.reshard(x, NamedSharding(dealt.mesh, spec))

    return jax.tree.unflatten(structure, [alike(x) for x in leaves])


def of_rows(x: jax.Array, count: int) -> NamedSharding | None:
    """How `count` rows of x lie: as x does, or whole if they can't be dealt out evenly.

    None where the compiler decides.
    """
    sharding = _explicit(x)
    if sharding is None:
        return None
    first, *rest = sharding.spec
    names = first if isinstance(first, tuple) else (first,) if first else ()
    if count % math.prod(sharding.mesh.shape[name] for name in names):
        first = None
    return NamedSharding(sharding.mesh, PartitionSpec(first, *rest))


def beside(state: Any, batch: Any) -> Any:
    """The state, copied to all devices of the batch's explicit mesh where it is on none."""
    meshes = [_explicit_mesh(x) for x in jax.tree.leaves((state, batch))]
    mesh = next((m for m in meshes if m is not None), None)
    if mesh is None:
        return state
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x):
        on_mesh = isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding)
        return x if on_mesh else jax.device_put(x, everywhere)

    return jax.tree.map(place, state)


def _explicit(x: Any) -> NamedSharding | None:
    """How an array lies (traced, too), if it is dealt out over explicit axes."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    return sharding if sharding is not None and any(sharding.spec) else None


def _explicit_mesh(x: Any) -> Any:
    """The devices of an array on a mesh with explicit axes."""
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        return sharding.mesh
    return None
