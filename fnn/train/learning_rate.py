"""The learning rate that an optimiser uses, where it shows one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from fnn import arguments
from fnn.train.state import State

NAME = "learning_rate"


def shown_rate(state: State) -> float | None:
    """The learning rate in an optimiser's state, as `optax.inject_hyperparams` keeps it there.

    Returns:
        The first one that is a number; None if there is none.
    """
    is_shown = lambda x: isinstance(getattr(x, "hyperparams", None), dict)
    for part in jax.tree.leaves(state.opt_state, is_leaf=is_shown):
        rate = part.hyperparams.get(NAME) if is_shown(part) else None
        if rate is not None and np.ndim(rate) == 0:
            return float(rate)
    return None


def scheduled(schedule: Callable, count: int) -> float:
    """The learning rate after a number of steps.

    Raises:
        TypeError: the schedule returns something else.
    """
    rate = schedule(count)
    try:
        if isinstance(rate, str):  # which float would read
            raise TypeError
        return float(rate)
    except TypeError:
        raise TypeError(
            "fit: schedule must return a learning rate, a real number, for a number of steps, but "
            f"returned {arguments.show(rate)}."
        ) from None


def rate_of(state: State, schedule: Callable | None) -> dict[str, float]:
    """The entry of a record: the rate of the step before, if it is known.

    Args:
        state: after that step.
        schedule: the rate as a function of the number of steps that were applied before.
    """
    if schedule is not None:
        return {NAME: scheduled(schedule, max(0, int(state.step) - 1))}
    rate = shown_rate(state)
    return {} if rate is None else {NAME: rate}
