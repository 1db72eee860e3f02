"""A batch: a tree of arrays with the examples along their first axis."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp


def batch_size(batch: chex.ArrayTree, name: str = "batch") -> int:
    """How many examples a batch holds, from shapes alone.

    Args:
        batch: a tree of arrays, the examples along the first axis of each.
        name: what it is called in errors.

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
        place = name + jax.tree_util.keystr(path)
        if not hasattr(leaf, "shape"):
            raise TypeError(f"{place} is {leaf!r} of type {type(leaf).__name__}, not an array.")
        if leaf.shape == ():
            raise ValueError(
                f"{place} is a scalar, but every array of {name} has the examples along its first "
                "axis. Close over what all examples share, or pass it as a keyword argument where "
                "that is possible."
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


def example_types(batch: chex.ArrayTree) -> Any:
    """The shapes and dtypes of one example of a batch, as JAX will see them.

    Returns:
        A tree like the batch of `jax.ShapeDtypeStruct`.
    """

    def of(x):
        dtype = jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True)
        return jax.ShapeDtypeStruct(x.shape[1:], dtype)

    return jax.tree.map(of, batch)


def types_of(tree: chex.ArrayTree) -> tuple:
    """A tree's structure with its arrays' shapes and dtypes: equal where they are, to be looked up.

    Args:
        tree: of arrays, of their types or of numbers.
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure, *((jnp.shape(x), jnp.result_type(x)) for x in leaves)
