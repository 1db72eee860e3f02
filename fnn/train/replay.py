"""Where the inf or nan of a bad step was born: the step is made again, operation by operation.

Only then: good steps pay nothing for it, and nothing is kept for it but the batch, which waits
with the step's report anyway.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn.backprop.trace import Traced, traced
from fnn.birth import Birth, birth_of
from fnn.footprint import free_memory
from fnn.jaxpr import Program
from fnn.train.state import State

# All values of the step may be kept, if all of them are nan.
_SHARE_OF_MEMORY = 0.5


def birth_in_step(step: Any, state: State, batch: Any, key: Any) -> Birth | None:
    """The birth of the inf or nan that makes a step bad: in the loss, the gradient or the update.

    Args:
        step: the `TrainStep` whose step it is.
        state: the one that it began with.
        batch, key: what it was given.

    Returns:
        None if all is finite when it is computed operation by operation.

    Raises:
        MemoryError: so computed, the step may need more memory than there is.
        ValueError: arrays lie in other processes, too.
    """
    state, batch, key = jax.tree.map(_on_one_device, (state, batch, key))
    trained, whole = step.traced.trainable.split(state)
    every = lambda params: whole(trained._replace(params=params)).params
    scale = step.traced.loss_scale if step.traced.scaling is None else trained.loss_scale.scale

    def loss(params, model_state, batch):
        return step.traced.objective.value(every(params), batch, key, model_state)

    def gradient(params, model_state, batch):
        found = step.traced.objective.found(params, every, batch, key, model_state, scale=scale)
        return found.gradient

    def update(params, opt_state, model_state, batch):
        before = whole(
            trained._replace(params=params, opt_state=opt_state, model_state=model_state)
        )
        new = step.traced(before, batch, key, look=False)[0]
        # As where the step looks: inf that the optimiser's state held before isn't to blame.
        kept = jax.tree.map(lambda x, fine: x if fine else None, _besides_params(new), were_fine)
        return {"params": new.params, **kept}

    were_fine = jax.tree.map(_is_fine, _besides_params(state))
    args = (trained.params, trained.model_state, batch)
    parts: list[tuple[Callable, tuple]] = [(loss, args), (gradient, args)]
    parts.append((update, (args[0], trained.opt_state, *args[1:])))
    for part, given in parts:
        birth = _searched(traced("train_step", part, given, {}))
        if birth is not None:
            return birth
    return None


def _besides_params(state: State) -> dict[str, Any]:
    """What else of a state a step must keep finite."""
    return {"opt_state": state.opt_state, "model_state": state.model_state, "ema": state.ema}


def _is_fine(x: Any) -> bool:
    """Whether it is an array of floats, all of them finite."""
    return jnp.issubdtype(x.dtype, jnp.inexact) and bool(jnp.isfinite(x).all())


def _on_one_device(x: Any) -> Any:
    """The search reads numbers, operation by operation: on one device that is simplest."""
    if not isinstance(x, jax.Array) or len(x.devices()) == 1:
        return x
    if not x.is_fully_addressable:
        raise ValueError("arrays of the step lie in other processes, too")
    return jax.device_put(x, jax.local_devices()[0])


def in_words(birth: Birth) -> str:
    """The sentences that an error says of it."""
    found = f"{birth.in_a_sentence()}."
    if birth.cause is not None:
        found += f" {birth.cause.in_a_sentence()}: of that it was made."
    return f"{found} (The error's attribute `birth` tells all that is known.)"


def _searched(found: Traced) -> Birth | None:
    free = free_memory()
    if free is not None and _size(found.program) > _SHARE_OF_MEMORY * free:
        raise MemoryError("to look for the birth would take more memory than there is")
    birth = birth_of(found, [])
    if birth is None or found.name == "loss":
        return birth and dataclasses.replace(birth, output="the loss")
    path = birth.output.removeprefix(found.name)
    if found.name == "update":
        part, path = path.removeprefix("['").split("']", 1)
    else:
        part = "params"
    return dataclasses.replace(birth, output=f"the {found.name} of {part}{path}")


def _size(flat: Program) -> int:
    """The bytes of all values of a program."""
    sizes = [
        math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 4)
        for aval in flat.avals
        if not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)
    ]
    return sum(sizes)
