"""Paths of parameters, the patterns that fit them, and the specs of divided arrays."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fnn import arguments

P = PartitionSpec

# -------------------------------------------------------------------------- paths and patterns


def path_of(keys: tuple) -> str:
    """A leaf's path as `fnn.params.flatten` names it: "blocks.attend.q.W"."""
    return ".".join(jax.tree_util.keystr((key,), simple=True) for key in keys)


def fits(path: str, pattern: str) -> bool:
    """Whether a pattern fits a path, or the end of one."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def fits_any(path: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns does."""
    return any(fits(path, pattern) for pattern in patterns)


def names_of(entry: Any) -> tuple[str, ...]:
    """The names of an entry of a spec, or of an argument that is one name or several."""
    return (entry,) if isinstance(entry, str) else tuple(entry)


def checked_names(field: str, value: Any) -> tuple[str, ...]:
    """The names that a field of a layout has: one, or several.

    Raises:
        TypeError: it isn't a name, nor a collection of names.
    """
    is_collection = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    names = tuple(value) if is_collection else (value,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"Layout: {field} must be a name or a tuple of names, but got {arguments.show(value)}."
        )
    return names


# --------------------------------------------------------------------------------------- specs


def is_spec(x: Any) -> bool:
    """Whether it is a `PartitionSpec`, a leaf of a tree of them."""
    return isinstance(x, PartitionSpec)


def short(entries: Iterable[Any]) -> PartitionSpec:
    """The spec without the axes at the end that aren't divided."""
    entries = list(entries)
    while entries and entries[-1] is None:
        entries.pop()
    one = lambda entry: entry[0] if isinstance(entry, tuple) and len(entry) == 1 else entry
    return P(*map(one, entries))


def sharded(
    entries: list[Any], shape: tuple[int, ...], shard: tuple[str, ...], mesh: Mesh
) -> PartitionSpec:
    """A spec with the axes `shard` of the mesh on the longest axis of an array that they divide.

    Args:
        entries: what divides the array's axes already.
        shape: the array's.
        shard: axes of the mesh; those that divide it already are left out.
        mesh: of devices.
    """
    used = {name for entry in entries if entry is not None for name in names_of(entry)}
    axes = tuple(name for name in shard if name not in used)
    count = devices_along(mesh, axes)
    if axes and count > 1:
        free = [
            (size, i)
            for i, (size, entry) in enumerate(zip(shape, entries, strict=True))
            if entry is None and size and size % count == 0
        ]
        if free:
            entries[max(free)[1]] = axes
    return short(entries)


def devices_along(mesh: Mesh, axes: Any) -> int:
    """How many devices there are along one or several axes of a mesh together."""
    return math.prod(mesh.shape[name] for name in names_of(axes))


def with_shapes(tree: Any) -> Any:
    """A tree whose leaves all have shapes: its arrays and types as they are, numbers as arrays."""
    of = lambda x: x if hasattr(x, "dtype") else np.asarray(x)
    return jax.tree.map(of, tree)


# -------------------------------------------------------------------------------------- checks


def checked_axes(mesh: Mesh, field: str, value: Any) -> tuple[str, ...]:
    """The names of axes of the mesh.

    Raises:
        TypeError: they are no names.
        ValueError: the mesh has no such axis.
    """
    names = checked_names(field, value)
    for name in names:
        if name not in mesh.shape:
            raise ValueError(
                f"Layout: {field} names the axis {name!r}, but the mesh's axes are "
                f"{tuple(mesh.shape)}."
            )
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ValueError(f"Layout: {field} names the axis {twice[0]!r} twice.")
    return names


def checked_rules(mesh: Mesh, rules: Any) -> tuple[tuple[str, PartitionSpec], ...]:
    """Pairs of a pattern and a spec of the mesh, from pairs or a dict.

    Raises:
        TypeError, ValueError: they aren't such.
    """
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes)):
        raise TypeError(
            "Layout: rules must be pairs of a pattern of paths and a jax.sharding.PartitionSpec, "
            f"but got {arguments.show(rules)}."
        )
    found = []
    for rule in pairs:
        if not isinstance(rule, (tuple, list)) or len(rule) != 2:
            raise TypeError(
                "Layout: rules must be pairs of a pattern of paths and a "
                f"jax.sharding.PartitionSpec, but one is {arguments.show(rule)}."
            )
        found.append(_checked_rule(mesh, *rule))
    return tuple(found)


def _checked_rule(mesh: Mesh, pattern: Any, spec: Any) -> tuple[str, PartitionSpec]:
    if not isinstance(pattern, str) or not is_spec(spec):
        raise TypeError(
            "Layout: a rule is a pair of a pattern of paths and a jax.sharding.PartitionSpec, "
            f"but got {arguments.show(pattern)} and {arguments.show(spec)}."
        )
    checked_axes(
        mesh,
        f"the rule {pattern!r}",
        [name for entry in spec if entry is not None for name in names_of(entry)],
    )
    return pattern, spec
