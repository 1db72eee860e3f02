"""Whether the examples of a batch know of each other: then it can't be filled up with others."""

from __future__ import annotations

from typing import Any

import jax

from fnn.jaxpr import Program, all_equations, program, trace
from fnn.layers.mode import training
from fnn.train.loss import AXIS, Loss, call, extras
from fnn.train.precision import optimizers_promotion
from fnn.train.state import State
from fnn.train.step import TrainStep


def is_coupled(step: TrainStep, state: State, example: Any, key: Any) -> bool:
    """Whether a step's loss sums over the batch's axis, or its optimiser reads the batch itself.

    Args:
        step: as from `train_step`.
        state: from its `init`.
        example: the types of one example.
        key: for the loss, or None.
    """
    found = extras(step.loss)
    if found.mode is not None and _sums_over_batch(step.loss, state, example, key):
        return True
    trained, _ = step.traced.trainable.split(state)
    frozen = () if step.traced.trainable.is_all else state.params
    return _reads_batch(step.optimizer, trained, frozen, example)


def _sums_over_batch(loss: Loss, state: State, example: Any, key: Any) -> bool:
    leaves, tree = jax.tree.flatten((state.params, state.model_state, example))

    def of_example(key, *leaves):
        params, model_state, example = jax.tree.unflatten(tree, leaves)
        value, metrics, new = call(loss, params, example, key, training(key, AXIS), model_state)
        return [value, *jax.tree.leaves((metrics, new))]

    closed = jax.make_jaxpr(of_example, axis_env=[(AXIS, 2)])(key, *leaves)
    return _names_axis(program(closed))


def _names_axis(flat: Program) -> bool:
    def is_named(params: dict) -> bool:
        names = [params.get(name, ()) for name in ("axes", "axis_name")]
        return any(AXIS in (n if isinstance(n, (tuple, list, frozenset)) else (n,)) for n in names)

    return any(is_named(equation.params) for equation, _ in all_equations(flat))


def _reads_batch(optimizer: Any, state: State, every: Any, example: Any) -> bool:
    """Does the update depend on the argument `batch`, other than by way of the loss?

    Args:
        state: of what is trained.
        every: all parameters, where some are frozen; else ().
    """
    leaves, tree = jax.tree.flatten(example)
    batch = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in leaves]
    value = jax.ShapeDtypeStruct((), jax.numpy.result_type(float))

    def update(opt_state, params, every, value, *batch):
        more = {"all_params": every} if jax.tree.leaves(every) else {}
        updates, new = optimizer.update(
            params,
            opt_state,
            params,
            value=value,
            grad=params,
            value_fn=lambda params, batch=None, all_params=None: value,
            batch=jax.tree.unflatten(tree, batch),
            **more,
        )
        return jax.tree.leaves((updates, new))

    with optimizers_promotion():
        flat = program(trace(update, (state.opt_state, state.params, every, value, *batch)))
    reached = flat.dependents(flat.inputs[-len(batch) :])
    return not reached.isdisjoint(flat.outputs)
