"""Which parameters are trained: those that `trainable` chooses. The others are frozen.

A step takes the state apart into what is trained and what is frozen. The gradient, the optimiser
and the look at new numbers get the first: a tree like the parameters with None in the place of
what is frozen, which JAX and optax read as nothing. The frozen arrays go round all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from fnn.params import Where, check_where, choose, flatten
from fnn.train.state import State


class Trainable:
    """The choice of what is trained.

    Args:
        where: as for `fnn.params.choose`, or None for everything. A function is called with the
            path and the type of each parameter, `jax.ShapeDtypeStruct`.
        op: the public function, for errors.
    """

    def __init__(self, where: Where | None, op: str):
        if where is not None:
            check_where(where, op, "trainable")
        self._where = where
        self._op = op

    @property
    def is_all(self) -> bool:
        """Whether all is trained, because nothing was chosen."""
        return self._where is None

    def flags(self, params: Any) -> list[bool]:
        """For each leaf, in the order of `jax.tree.leaves`, whether it is trained.

        Raises:
            ValueError: nothing is trained.
        """
        if self._where is None:
            return [True] * len(jax.tree.leaves(params))
        types = jax.eval_shape(lambda params: params, params)
        chosen = set(choose(self._where, types, self._op, "trainable"))
        return [path in chosen for path in flatten(types)]

    def part(self, params: Any) -> Any:
        """The parameters with None in the place of what is frozen."""
        return params if self._where is None else _with_none(params, self.flags(params))

    def split(self, state: State) -> tuple[State, Callable[[State], State]]:
        """The state of what is trained alone, and a function that puts the frozen part back."""
        if self._where is None:
            return state, lambda trained: trained
        flags = self.flags(state.params)
        trained = {name: _with_none(tree, flags) for name, tree in _like_params(state)}

        def whole(new: State) -> State:
            old = dict(_like_params(state))
            put = {name: join(getattr(new, name), tree, flags) for name, tree in old.items()}
            return new._replace(**put)

        return state._replace(**trained), whole


def join(trained: Any, whole: Any, flags: Sequence[bool]) -> Any:
    """The tree `whole` with the leaves of `trained` in their places; its own where it is frozen."""
    leaves, structure = jax.tree.flatten(whole)
    new: Iterator[Any] = iter(jax.tree.leaves(trained))
    return jax.tree.unflatten(
        structure, [next(new) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
    )


def _with_none(tree: Any, flags: Sequence[bool]) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        structure, [leaf if flag else None for leaf, flag in zip(leaves, flags, strict=True)]
    )


def _like_params(state: State) -> Iterator[tuple[str, Any]]:
    """The state's fields that are trees like the parameters."""
    yield "params", state.params
    if state.ema is not None:
        yield "ema", state.ema
