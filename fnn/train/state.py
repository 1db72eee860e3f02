"""What training carries from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import arguments
from fnn.text import size_of_tree


class State(NamedTuple):
    """All that a training step reads and writes: a pytree, to save or to shard as any other.

    Fields:
        params: the parameters, a pytree of arrays.
        opt_state: the optimiser's state, `optimizer.init(params)`'s.
        step: how many steps were applied, an int32 scalar.
        position: where `fit` stands in its data, so that it can go on from there: int32,
            `[epochs that are over, batches of the epoch under way, batches in all]`.
        model_state: the network's state, running statistics for one; {} if it has none.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    position: Any = np.zeros(3, np.int32)
    model_state: Any = {}

    def __repr__(self) -> str:
        """What there is, in a line; the numbers stay out of it."""
        shown = {"params": self.params, "opt_state": self.opt_state, "step": self.step}
        if jax.tree.leaves(self.model_state):
            shown["model_state"] = self.model_state
        parts = (f"{name}: {size_of_tree(part)}" for name, part in shown.items())
        return f"State({', '.join(parts)})"


def initial_state(params: Any, optimizer: optax.GradientTransformation, model_state: Any) -> State:
    """The state before the first step, in buffers of its own.

    A step donates its state's buffers; copies keep the caller's `params` alive.

    Raises:
        TypeError: a parameter isn't an array of real or complex numbers.
        ValueError: there are no parameters.
    """
    check_params(params)
    start = State(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    return own(start._replace(model_state=model_state))


def own(state: Any) -> Any:
    """A copy of every array, strongly typed, so that the first step's types are the last's."""
    return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.asarray(x).dtype, copy=True), state)


def check_params(params: Any) -> None:
    """Raise unless `params` is a tree of arrays that can be trained."""
    arguments.no_result("train_step", "params", params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(f"params holds no arrays to train: {params!r}.")
    for path, leaf in leaves:
        name = path_name("params", path)
        try:
            dtype = jax.typeof(leaf).dtype
        except TypeError:
            raise TypeError(
                f"{name} is {leaf!r} of type {type(leaf).__name__}, but parameters are arrays. "
                "Functions and settings belong into the loss, as a closure or a partial."
            ) from None
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{name} has dtype {dtype}, but parameters are floats (they get a gradient). "
                "Close over what isn't trained, or make it part of the examples."
            )


def path_name(root: str, path: tuple) -> str:
    """A leaf's place as Python spells it: `params['hidden']['W']`."""
    return root + jax.tree_util.keystr(path)
