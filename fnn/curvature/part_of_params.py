"""A model of which only some parameters are trained: trees with None in the others' places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from fnn import arguments

NOT_TOLD = (
    "Where only some parameters are trained, as by train_step(..., trainable=...), kfac must know "
    "of the others: kfac(..., example_params=params), with all parameters or their shapes."
)


def first_without_array(params: Any) -> str:
    """The first place of a tree where there is None, as text; "" if there is none."""
    places = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_none)
    found = (f"params{jax.tree_util.keystr(path)}" for path, leaf in places if leaf is None)
    return next(found, "")


def others_of(params: Any, every: Any, name: str) -> Any:
    """Of all parameters those that `params` has None for, with None in the places of its own.

    Args:
        params: what is trained.
        every: all parameters, or their types; None if they aren't known, then so is what returns.
        name: what `every` is called in errors.

    Raises:
        ValueError: the two are different trees.
    """
    if every is None:
        return None
    try:
        return jax.tree.map(lambda p, w: w if p is None else None, params, every, is_leaf=_is_none)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"kfac: {name} must be a tree like the parameters, {arguments.shapes(params)}, with "
            f"arrays in the places of None, but is {arguments.shapes(every)}."
        ) from error


def with_others(model: Callable, others: Any) -> Callable:
    """The model as a function of what is trained; the model itself where nothing else is known."""
    if not jax.tree.leaves(others):
        return model

    def of_trained(params, x):
        put = lambda p, w: w if p is None else p
        return model(jax.tree.map(put, params, others, is_leaf=_is_none), x)

    return of_trained


def _is_none(x: Any) -> bool:
    return x is None
