"""Arrays on meshes of devices: what their types say, and functions that leave layouts to JAX.

On a mesh with explicit axes (`jax.make_mesh`'s default) types hold shardings. There an operation
that could be divided over the devices in several ways is an error, unless it says how: looking up
rows by a sharded index, or joining a sharded axis with another. What fnn does with a batch is of
that kind at many places, and so may be a loss, which is written for one example. `with_auto_axes`
leaves such choices to the compiler, inside one function; what comes out has types again.

Under shard_map, types say over which devices a value varies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

EVERYWHERE = PartitionSpec()


def with_auto_axes(function: Callable, args: tuple, out_specs: Any = EVERYWHERE) -> Any:
    """function(*args), with the explicit axes of the mesh that the arguments lie on as automatic
    ones; where there are none, just that.

    Args:
        function: of trees of arrays. What it closes over must not lie on the mesh.
        args: its arguments.
        out_specs: how its results are divided: a tree of `PartitionSpec`, or one for all below;
            on all devices alike unless given.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return function(*args)
    axes = explicit_axes(mesh)
    is_spec = lambda x: isinstance(x, PartitionSpec)
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), out_specs, is_leaf=is_spec)
    try:
        return jax.sharding.auto_axes(function, axes=axes, out_sharding=shardings)(*args)
    except ValueError as error:
        if "context mesh" in str(error):
            error.add_note(
                f"A function closes over an array that lies on a mesh with explicit axes {axes}. "
                "Pass such an array in: with the parameters, the batch, or as a keyword argument."
            )
        raise


def with_auto_types(mesh: Mesh) -> Mesh:
    """The same devices, with automatic axes only."""
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def explicit_mesh(tree: Any) -> Any:
    """The mesh with explicit axes that an array of a tree lies on; None if there is none."""
    for leaf in jax.tree.leaves(tree):
        mesh = getattr(_sharding(leaf), "mesh", None)
        if mesh is not None and explicit_axes(mesh):
            return mesh
    return None


def explicit_axes(mesh: Any) -> tuple[str, ...]:
    """The names of its explicit axes."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def spec_of(array: Any) -> PartitionSpec:
    """How an array is divided over explicit axes: P() where it isn't."""
    sharding = _sharding(array)
    if sharding is None or not explicit_axes(sharding.mesh):
        return PartitionSpec()
    return sharding.spec


def specs_of(tree: Any) -> Any:
    """The same of each array of a tree."""
    return jax.tree.map(spec_of, tree)


def batch_spec(tree: Any) -> PartitionSpec:
    """How the first axes of a batch's arrays are divided: by the first that is."""
    for leaf in jax.tree.leaves(tree):
        spec = spec_of(leaf)
        if len(spec) and spec[0] is not None:
            return PartitionSpec(spec[0])
    return PartitionSpec()


def _sharding(leaf: Any) -> Any:
    try:
        return getattr(jax.typeof(leaf), "sharding", None)
    except TypeError:
        return None


def sharding_of(x) -> NamedSharding | None:
    """The sharding of an array or type on a mesh with explicit axes; elsewhere the compiler's."""
    aval: Any = x if isinstance(x, jax.core.AbstractValue) else jax.typeof(x)
    return None if aval.sharding.mesh.empty else aval.sharding


def zeros(aval) -> jax.Array:
    """Zeros of a type: sharded alike, and under shard_map varying over the same devices."""
    zero = numpy.zeros((), aval.dtype)
    return as_varying(broadcast(zero, aval, ()), aval)


def broadcast(x, like, axes: Sequence[int]):
    """x copied to the shape and sharding of `like`, of whose axes its own are `axes`."""
    return _broadcast(x, like.shape, axes, sharding_of(like))


def _broadcast(x, shape: Sequence[int], axes: Sequence[int], sharding: NamedSharding | None):
    """x copied to a shape, of whose axes its own are `axes`, and a sharding.

    On explicit axes the mesh is set: JAX 0.12 ignores the sharding of a result made from arrays
    that are on no mesh where none is set.
    """
    if sharding is None:
        return lax.broadcast_in_dim(x, shape, axes)
    mesh: Any = sharding.mesh  # that of a type is abstract
    with jax.sharding.use_abstract_mesh(mesh):
        return lax.broadcast_in_dim(x, shape, axes, out_sharding=sharding)


def varying_axes(aval) -> frozenset:
    """The axes of the mesh over whose devices a value varies, under shard_map."""
    kind = getattr(aval, "manual_axis_type", None)
    return getattr(kind, "varying", frozenset())


def as_varying(x, aval):
    """x, marked under shard_map as varying over the devices that `aval` varies over."""
    return _vary_over(x, varying_axes(aval))


def varies_as(x, like):
    """x, marked under shard_map as varying over the devices that the array `like` varies over."""
    return as_varying(x, jax.typeof(like))


def varies_with(tree: Any, others: Any) -> Any:
    """A tree's arrays, marked under shard_map as varying wherever one of both trees' arrays does.

    What a loop over the others carries must vary from the start as it does after a step.
    """
    axes = _varying_axes_of_any(jax.tree.leaves((tree, others)))
    return jax.tree.map(lambda x: _vary_over(x, axes), tree)


def mesh_here(mesh: Any) -> Any:
    """A mesh as shard_map and sharding constraints want it: the context's, where one is set."""
    current = jax.sharding.get_abstract_mesh()
    return mesh if current.empty else current


def _varying_axes_of_any(arrays) -> frozenset:
    return frozenset().union(*[varying_axes(jax.typeof(x)) for x in arrays])


def _vary_over(x, axes: frozenset):
    """x, marked as varying over these axes of the mesh too."""
    missing = axes - varying_axes(jax.typeof(x))
    return jax.lax.pcast(x, tuple(sorted(missing, key=str)), to="varying") if missing else x


def same_varying_axes(arrays):
    """Under shard_map, mark what is equal on all devices as varying where its partners vary.

    JAX's own operations do the same. Its transpose is the sum over the devices, which is how
    a replicated weight gets the gradient of the whole batch.
    """
    axes = _varying_axes_of_any(arrays)
    return [_vary_over(x, axes) for x in arrays] if axes else arrays


def barrier(tree):
    """The arrays, none of which the compiler may use before all are there.

    Under shard_map, those that vary over the same devices are held together: JAX's barrier
    would make all of them vary.
    """
    leaves, structure = jax.tree.flatten(tree)
    kinds = [varying_axes(jax.typeof(x)) for x in leaves]
    for kind in set(kinds):
        places = [i for i, k in enumerate(kinds) if k == kind]
        held = lax.optimization_barrier([leaves[i] for i in places])
        for i, x in zip(places, held, strict=True):
            leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


# ------------------------------------------------------------------------------- training


def stacked_zeros(count: int, like: jax.ShapeDtypeStruct) -> jax.Array:
    """`count` arrays of zeros, each of the shape, dtype and sharding of `like`, on a first axis."""
    sharding: Any = like.sharding
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return _broadcast(numpy.zeros((), like.dtype), (count, *like.shape), (), sharding)


def dealt_alike(tree: Any) -> Any:
    """Arrays with the examples along their first axes, all dealt out as the first that is."""
    leaves, structure = jax.tree.flatten(tree)
    dealt = next((s for s in map(_explicit_sharding, leaves) if s is not None and s.spec[0]), None)
    if dealt is None:
        return tree

    def alike(x):
        own = _explicit_sharding(x)
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
    sharding = _explicit_sharding(x)
    if sharding is None:
        return None
    first, *rest = sharding.spec
    names = first if isinstance(first, tuple) else (first,) if first else ()
    if count % math.prod(sharding.mesh.shape[name] for name in names):
        first = None
    return NamedSharding(sharding.mesh, PartitionSpec(first, *rest))


def beside(state: Any, batch: Any) -> Any:
    """The state, copied to all devices of the batch's explicit mesh where it is on none."""
    meshes = [_mesh_of_devices(x) for x in jax.tree.leaves((state, batch))]
    mesh = next((m for m in meshes if m is not None), None)
    if mesh is None:
        return state
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x):
        on_mesh = isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding)
        return x if on_mesh else jax.device_put(x, everywhere)

    return jax.tree.map(place, state)


def _explicit_sharding(x: Any) -> NamedSharding | None:
    """How an array lies (traced, too), if it is dealt out over explicit axes."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    return sharding if sharding is not None and any(sharding.spec) else None


def _mesh_of_devices(x: Any) -> Any:
    """The mesh that an array lies on, not its type's, if it has explicit axes."""
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        return sharding.mesh
    return None
