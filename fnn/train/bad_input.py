"""Clear errors for bad data: shapes (free: they are known when a step is traced) and values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.train.state import path_name


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
