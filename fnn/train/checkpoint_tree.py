"""A tree of arrays as a flat list of numpy's, with what is needed to check it, and back.

Files know numbers. What a tree is made of (integer keys, tuples, namedtuples, None, empty dicts)
stays in the program that reads it: leaves are told apart by their paths, as Python spells them
(`params[1]` and `params['1']` are two), and go into a tree that the caller has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from fnn.sharding.placement import put
from fnn.train.checkpoint_parts import are_intact, checksum, checksums, is_divided
from fnn.train.state import path_name

# What numpy has of its own; all else (bfloat16, float8, int4) is written as its bits.
_PLAIN = frozenset("?bhilqBHILQefdFD")


class Leaf(NamedTuple):
    """An array of a tree, as it is told of in a checkpoint.

    Fields:
        path: its place in the tree.
        dtype: its name: "float32"; of PRNG keys "key<fry>".
        shape: its shape; of keys that of the array of keys.
        checksum: the CRC-32 of its bytes; None if no process has all of them.
        name: what it is called in the files; "" if it isn't there, as it has no entries.
        parts: of one that is divided among processes, its parts with their checksums.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    checksum: int | None = None
    name: str = ""
    parts: tuple[tuple[Any, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def described(tree: Any, root: str) -> list[Leaf]:
    """The leaves of a tree, in its order, without checksums and names.

    Args:
        tree: a pytree of arrays or of `jax.ShapeDtypeStruct`s.
        root: what the tree is called.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [Leaf(path_name(root, path), *_type(leaf)) for path, leaf in leaves]


def taken_apart(tree: Any, root: str) -> tuple[list[Leaf], dict[str, Any]]:
    """The leaves of a tree, and their numbers in memory of their own, for files.

    All processes that have a part of the tree must call it.

    Args:
        tree: a pytree of arrays.
        root: what the tree is called.

    Returns:
        The leaves; and a numpy array for each name, but a `jax.Array` where this process has only
        a part of it.
    """
    leaves: list[Leaf] = []
    arrays: dict[str, Any] = {}
    divided: dict[int, jax.Array] = {}
    values = jax.tree.leaves(tree)
    for i, (leaf, value) in enumerate(zip(described(tree, root), values, strict=True)):
        if is_key(value):
            value = jax.random.key_data(value)
        if is_divided(value):
            value = divided[i] = jnp.copy(value)
        else:
            value = np.array(value, order="C", copy=True)
            leaf = leaf._replace(checksum=checksum(value))
            value = _plain(value)
        if math.prod(value.shape):  # tensorstore has no arrays without entries
            leaf = leaf._replace(name=f"{root}-{i:05d}")
            arrays[leaf.name] = value
        leaves.append(leaf)
    for i, parts in zip(divided, checksums(list(divided.values())), strict=True):
        leaves[i] = leaves[i]._replace(parts=tuple(parts))
    return leaves, arrays


def put_together(like: Any, leaves: Sequence[Leaf], arrays: dict[str, Any]) -> Any:
    """The tree that `taken_apart` took apart.

    Args:
        like: a tree of the same leaves, of arrays or `jax.ShapeDtypeStruct`s, whose devices (and
            parts of them) the arrays go to.
        leaves: what the checkpoint tells of them.
        arrays: what was read.
    """
    wanted, structure = jax.tree.flatten(like)
    pairs = zip(wanted, leaves, strict=True)
    return jax.tree.unflatten(structure, [_value(t, leaf, arrays) for t, leaf in pairs])


def _value(target: Any, leaf: Leaf, arrays: dict[str, Any]) -> Any:
    value = arrays.get(leaf.name)
    if is_key(target):
        if value is None:
            return _placed(jnp.zeros(leaf.shape, target.dtype), target)
        value = jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(target))
    elif not isinstance(value, jax.Array):
        value = as_numpy(leaf, arrays)
    return _placed(value, target)


def as_numpy(leaf: Leaf, arrays: dict[str, Any]) -> np.ndarray:
    """A leaf that isn't a key as a numpy array of its dtype."""
    value = arrays.get(leaf.name)
    if value is None:
        return np.zeros(leaf.shape, np.dtype(jnp.dtype(leaf.dtype)))
    return of_its_dtype(leaf, value)


def of_its_dtype(leaf: Leaf, numbers: np.ndarray) -> np.ndarray:
    """Numbers of a leaf, or of a part of it, that were written as bits where numpy has no dtype."""
    dtype = np.dtype(jnp.dtype(leaf.dtype))
    return numbers if numbers.dtype == dtype else numbers.view(dtype)


def differences(wanted: Sequence[Leaf], got: Sequence[Leaf], most: int = 8) -> list[str]:
    """What is different about two trees, a line each; empty if one can be read as the other.

    Args:
        wanted: the leaves of the tree that is wanted.
        got: those of the checkpoint.
        most: how many lines at most.
    """
    here, there = ({leaf.path: leaf for leaf in leaves} for leaves in (wanted, got))
    lines = [
        f"{path} is {there[path]} in the checkpoint, {leaf} here"
        for path, leaf in here.items()
        if path in there and there[path][1:3] != leaf[1:3]
    ]
    lines += [f"{path} is only here, not in the checkpoint" for path in here if path not in there]
    lines += [f"{path} is only in the checkpoint, not here" for path in there if path not in here]
    if not lines and list(here) != list(there):
        lines = ["the order of the leaves is another"]
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return lines[:most] + more


def damaged(leaves: Sequence[Leaf], arrays: dict[str, Any]) -> list[str]:
    """The paths of the leaves whose numbers aren't those that were written."""

    def is_intact(leaf):
        value = arrays.get(leaf.name)
        if value is None:
            return not leaf.name
        if not isinstance(value, np.ndarray):  # checked as it was read
            return True
        if leaf.checksum is None:
            return are_intact(value, leaf.parts)
        return checksum(value) == leaf.checksum

    return [leaf.path for leaf in leaves if not is_intact(leaf)]


def is_key(leaf: Any) -> bool:
    """Is it an array of PRNG keys (`jax.random.key`), or the type of one?"""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _type(leaf: Any) -> tuple[str, tuple[int, ...]]:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return str(dtype), tuple(map(int, np.shape(leaf)))


def _plain(array: np.ndarray) -> np.ndarray:
    """The same bytes in a dtype that numpy has of its own."""
    if array.dtype.char in _PLAIN:
        return array
    return array.view(f"uint{8 * array.dtype.itemsize}")


def _placed(value: Any, target: Any) -> Any:
    """An array on the devices of another; without any of its own, where JAX puts new ones."""
    sharding = getattr(target, "sharding", None)
    is_type = isinstance(target, jax.ShapeDtypeStruct)
    if sharding is None or not (is_type or getattr(target, "committed", False)):
        return jnp.asarray(value)
    if isinstance(sharding, NamedSharding):
        return put(value, sharding)
    return jax.device_put(value, sharding)
