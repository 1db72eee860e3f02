"""Arrays on a mesh with explicit axes (`jax.make_mesh`'s default), where types hold shardings.

There an operation that could be divided over the devices in several ways is an error, unless it
says how: looking up rows by a sharded index, or joining a sharded axis with another. What fnn
does with a batch is of that kind at many places, and so may be a loss, which is written for one
example. `with_auto_axes` leaves such choices to the compiler, inside one function; what comes out
has types again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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
