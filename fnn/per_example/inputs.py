"""What a loss is given, checked: parameters, keys, keyword arguments; and what it returns."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.jaxpr import is_inexact


def parameters(params: chex.ArrayTree) -> tuple[list[str], list[jax.Array], Any]:
    """The paths and arrays of a tree of parameters, checked."""
    arguments.no_result("fnn.per_example and fnn.curvature", "params", params)
    with_paths, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path) for path, _ in with_paths]
    if not paths:
        raise ValueError(
            f"params must be a tree with at least one array, but is {arguments.show(params)}."
        )
    leaves = []
    for path, (_, leaf) in zip(paths, with_paths, strict=True):
        where = path or "params"
        try:
            aval = jax.typeof(leaf)
        except TypeError:
            raise TypeError(
                f"the parameter {where} is no array but {type(leaf).__name__}; separate what "
                "isn't an array from the parameters (equinox.partition, nnx.split)."
            ) from None
        if not is_inexact(aval):
            raise TypeError(
                f"the parameter {where} has dtype {aval.dtype}, but gradients are with respect to "
                "real or complex parameters; pass integers with the batch or close over them."
            )
        leaves.append(leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf))
    return paths, leaves, tree


def split_static(static: dict) -> tuple[list, tuple]:
    """Keyword arguments as their arrays, and all that they hold else."""
    leaves, tree = jax.tree.flatten(static)
    is_array = [isinstance(x, jax.Array) for x in leaves]
    rest = [None if yes else x for x, yes in zip(leaves, is_array, strict=True)]
    return [x for x, yes in zip(leaves, is_array, strict=True) if yes], (tree, is_array, rest)


def join_static(arrays: list, rest: tuple) -> dict:
    """The keyword arguments again."""
    tree, is_array, others = rest
    given = iter(arrays)
    leaves = [next(given) if yes else x for x, yes in zip(others, is_array, strict=True)]
    return jax.tree.unflatten(tree, leaves)


def keys_of(key: chex.PRNGKey | None, size: int) -> tuple:
    """`()` without a key, else one key for each example."""
    if key is None:
        return ()
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and dtype != jnp.uint32:
        raise TypeError(
            "key must be a key, such as jax.random.key(0), or one for each example, but got "
            f"{arguments.show(key)}."
        )
    axes = jnp.ndim(key) - (0 if typed else 1)
    if axes == 0:
        return (jax.random.split(key, size),)
    if axes != 1 or key.shape[0] != size:
        raise ValueError(
            f"key must be one key, or one for each of the {size} examples, but has shape "
            f"{key.shape}."
        )
    return (key,)


def value_and_aux(out, has_aux):
    if not has_aux:
        return out, None
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            f"with has_aux=True the loss must return a pair (loss, auxiliary data), not {out!r}."
        )
    return out


def real_scalar(value):
    try:
        aval = jax.typeof(value)
    except TypeError:
        raise TypeError(
            f"the loss must return a real scalar, but returned {type(value).__name__}; return "
            "(loss, aux) and pass has_aux=True for more."
        ) from None
    if aval.shape != () or not jnp.issubdtype(aval.dtype, jnp.floating):
        raise TypeError(
            f"the loss of one example must be a real scalar, but has shape {aval.shape} and dtype "
            f"{aval.dtype}. It is given one example, without the batch's axis."
        )
    return value
