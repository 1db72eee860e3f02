"""Clear errors for bad data: shapes (free: they are known when a step is traced) and values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.train.state import path_name


def batch_size(batch: Any, name: str = "batch") -> int:
    """How many examples a batch holds, from shapes alone.

    Raises:
        TypeError: a leaf isn't an array.
        ValueError: there are no arrays, no examples, an array without axes, or the first
            axes differ in length.
    """
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError(f"{name} holds no arrays: {batch!r}.")
    sizes = {}
    for path, leaf in leaves:
        place = path_name(name, path)
        if not hasattr(leaf, "shape"):
            raise TypeError(f"{place} is {leaf!r} of type {type(leaf).__name__}, not an array.")
        if leaf.shape == ():
            raise ValueError(
                f"{place} is a scalar, but every array of {name} has the examples along its first "
                "axis. Close over what all examples share."
            )
        sizes[place] = leaf.shape[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"the arrays of {name} differ in their number of examples (first axis): "
            + ", ".join(f"{place} has {n}" for place, n in sizes.items())
            + "."
        )
    size = next(iter(sizes.values()))
    if size == 0:
        raise ValueError(f"{name} is empty: {next(iter(sizes))} has shape {leaves[0][1].shape}.")
    return size


def check_no_nan(data: Any, name: str) -> None:
    """Look at every number of the data.

    Raises:
        ValueError: there is a nan; the message says where the first one is.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if _is_float(leaf) and _any_nan(leaf):
            where = tuple(int(i) for i in np.argwhere(np.isnan(np.asarray(leaf)))[0])
            raise ValueError(
                f"{path_name(name, path)} (shape {leaf.shape}, {leaf.dtype}) holds nan, first at "
                f"index {where}. (check=False turns this check off.)"
            )


def describe_nonfinite(data: Any, name: str = "batch") -> str:
    """Where the data holds inf or nan, in words; empty if nowhere."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if _is_float(leaf) and not getattr(leaf, "is_deleted", bool)():
            values = np.asarray(leaf)
            bad = np.argwhere(~np.isfinite(values))
            if len(bad):
                where = tuple(int(i) for i in bad[0])
                found.append(f"{path_name(name, path)} holds {values[where]} at index {where}")
    return ", ".join(found)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _any_nan(leaf: Any) -> bool:
    # The maximum carries a nan through, and needs no array of flags as large as the data.
    if leaf.size == 0:
        return False
    if isinstance(leaf, jax.Array):
        return bool(jnp.isnan(leaf).any())
    return bool(np.isnan(leaf.max()))
