"""Whether a step's program fits into the device's memory: told before it runs, and explained."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from fnn.backprop.trace import traced
from fnn.batch import batch_size
from fnn.footprint import Residuals, check_fits, residuals
from fnn.train.state import State


def foresee(
    where: str,
    step: Any,
    program: Any,
    args: tuple[Any, ...],
    state: State,
    batch: Any,
    key: Any,
) -> None:
    """Compile a step's program, and look whether it fits. (It isn't compiled again to be called.)

    Args:
        where: the public function.
        step: the `TrainStep` whose program it is.
        program, args: a jitted function, and what it will be called with.
        state: the training state.
        batch, key: what a step is given; of a batch the types will do.

    Raises:
        MemoryError: it can't fit; the message tells what takes so much, and what would help.

    Warns:
        RuntimeWarning: it doesn't fit beside what is there now.
    """
    leaf = jax.tree.leaves(state.params)[0]
    device = next(iter(leaf.devices())) if isinstance(leaf, jax.Array) else None
    kept = functools.partial(_kept, step, state, batch, key)
    compiled = program.lower(*args).compile()
    check_fits(where, compiled, kept, _advice(step), device)


def _kept(step: Any, state: State, batch: Any, key: Any) -> Residuals:
    """What the backward pass of a step keeps at a time."""
    trained, whole = step.traced.trainable.split(state)
    objective = dataclasses.replace(step.traced.objective, microbatches=1)
    rows = -(-batch_size(batch) // step.traced.objective.microbatches)

    def loss(params, model_state, batch):
        params = whole(trained._replace(params=params)).params
        return objective.value(params, batch, key, model_state)

    part = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    given = (trained.params, trained.model_state, part)
    found = traced("train_step", loss, given, {})
    needed = [label.split("[")[0].split(".")[0] == "params" for label in found.input_labels]
    return residuals(found.jaxpr, found.input_labels, needed)


def _advice(step: Any) -> list[str]:
    parts = 2 * step.traced.objective.microbatches
    advice = [
        "a smaller batch",
        f"accumulate={parts}: the same numbers, a part of the batch at once",
    ]
    if step.traced.objective.compute is None:
        advice.append("compute=jax.numpy.bfloat16: half the bytes")
    advice.append(
        "jax.checkpoint around the parts that keep most, or fnn.layers.repeat(block, n, "
        "remat=True), which compute their insides again in the backward pass"
    )
    return advice
