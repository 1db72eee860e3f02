"""On a mesh with explicit axes the compiler places what is computed in here, as on any other.

There a type says how an array is laid out, and a sum over examples that lie on several devices
wants to be told where its result goes. In here are many, and only one answer: a batch's curvature
is everybody's. So these functions run with the axes left to the compiler (`jax.sharding.
auto_axes`), and their results are as the caller's types want them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

EVERYWHERE = PartitionSpec()


def on_any_mesh(function: Callable, out: Any = EVERYWHERE) -> Callable:
    """The function of pytrees of arrays, whatever mesh they lie on.

    out: how its results are laid out on explicit axes, as for `auto_axes`: on all devices alike,
        unless given.
    """

    def placed(*args):
        mesh = _explicit_mesh(args)
        if mesh is None:
            return function(*args)
        automatic = jax.sharding.auto_axes(function, out_sharding=out)
        if not jax.sharding.get_abstract_mesh().empty:
            return automatic(*args)
        with jax.sharding.use_abstract_mesh(mesh):
            return automatic(*args)

    return placed


def like(tree: Any) -> Any:
    """How a tree of arrays is laid out."""
    return jax.tree.map(_spec, tree)


def like_batch(batch: Any) -> PartitionSpec:
    """How the first axis of a batch's arrays is laid out."""
    spec = _spec(jax.tree.leaves(batch)[0])
    return PartitionSpec(spec[0] if len(spec) else None)


def _spec(x) -> PartitionSpec:
    return getattr(getattr(jax.typeof(x), "sharding", None), "spec", None) or PartitionSpec()


def _explicit_mesh(args):
    for x in jax.tree.leaves(args):
        sharding = getattr(jax.typeof(x), "sharding", None)
        mesh = getattr(sharding, "mesh", None)
        if mesh is not None and not mesh.empty and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None
