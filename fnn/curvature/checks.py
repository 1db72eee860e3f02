"""What all functions here ask of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.batch import batch_size
from fnn.per_example.inputs import parameters


def check_model(where: str, model: Any) -> Callable:
    return arguments.function(where, "model", model, "a function model(params, input)")


def check_loss(where: str, loss: Any) -> Callable:
    return arguments.function(where, "loss", loss, "a function loss(outputs, target)")


def check_samples(where: str, key: Any, samples: Any) -> None:
    """How many labels are drawn, and the key for them."""
    arguments.integer(where, "samples", samples, least=0)
    if key is not None:
        arguments.key(where, "key", key)
    elif samples:
        raise ValueError(f"{where}: samples is {samples}, so labels are drawn: pass key=... too.")


def check_part(where: str, part: Any) -> str:
    return arguments.choice(where, "part", part, ("positive", "all"))


def checked(where: str, params: Any, batch: Any) -> tuple[Any, Any, Any, int]:
    """`(params, inputs, targets, number of examples)`, the parameters as arrays."""
    inputs, targets = pair(where, batch)
    return checked_params(where, params), inputs, targets, batch_size(batch)


def checked_params(where: str, params: Any) -> Any:
    """A tree of real arrays; JAX's own, whatever they were before."""
    arguments.no_result(where, "params", params)
    if not jax.tree.leaves(params):
        raise ValueError(f"{where}: params is a tree without arrays: {arguments.show(params)}.")
    paths, leaves, tree = parameters(params)
    for path, leaf in zip(paths, leaves, strict=True):
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{where}: the parameter {path or 'params'} has dtype {leaf.dtype}, but curvature "
                "is with respect to real parameters: pass its real and imaginary parts as two."
            )
    return jax.tree.unflatten(tree, leaves)


def pair(where: str, batch: Any, name: str = "batch") -> tuple[Any, Any]:
    """A batch as `(inputs, targets)`; targets may be None, for a loss that asks for none."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(
            f"{where}: {name} must be a pair (inputs, targets) for a model(params, input) and a "
            f"loss(outputs, target), but is {arguments.show(batch)}"
            + (f", of {len(batch)}." if isinstance(batch, (tuple, list)) else ".")
        )
    return batch[0], batch[1]


def check_like(where: str, what: str, tree: Any, params: Any) -> Any:
    """A tree of real arrays of the parameters' structure, shapes and dtypes."""
    wanted = dict(jax.tree_util.tree_leaves_with_path(params))
    got = dict(jax.tree_util.tree_leaves_with_path(tree))
    show = lambda path: f"params{jax.tree_util.keystr(path)}"
    for path in [*wanted, *got]:
        if path not in got or path not in wanted:
            problem = "has nothing for" if path in wanted else "has an array too many, at"
            raise ValueError(
                f"{where}: {what} must be a tree like the parameters, but {problem} {show(path)}."
            )
    like: Any = jax.tree.structure(params)
    if jax.tree.structure(tree) != like:
        raise ValueError(
            f"{where}: {what} must be a tree like the parameters, {like}, but is "
            f"{jax.tree.structure(tree)}."
        )
    found = []
    for path, x in got.items():
        p = jax.typeof(wanted[path])
        arguments.array(where, f"{what} at {show(path)}", x)
        x = jnp.asarray(x)
        if x.shape != p.shape:
            raise ValueError(
                f"{where}: {what} has shape {x.shape} at {show(path)}, where the parameter has "
                f"shape {p.shape}."
            )
        if x.dtype != p.dtype and not jax.typeof(x).weak_type:
            raise TypeError(
                f"{where}: {what} has dtype {x.dtype} at {show(path)}, where the parameter has "
                f"dtype {p.dtype}: convert it with astype."
            )
        found.append(x.astype(p.dtype))
    return jax.tree.unflatten(like, found)
