"""What training carries from step to step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import arguments
from fnn.text import size_of_tree
from fnn.train.precision import optimizers_promotion


class State(NamedTuple):
    """All that a training step reads and writes: a pytree, to save or to shard as any other.

    Fields:
        params: the parameters, a pytree of arrays.
        opt_state: the optimiser's state, `optimizer.init(params)`'s.
        step: how many steps were applied, an int32 scalar.
        position: where `fit` stands in its data, so that it can go on from there: int32,
            `[epochs that are over, batches of the epoch under way, batches in all]`.
        model_state: the network's state, running statistics for one; {} if it has none.
        ema: the average of the parameters over the steps, a tree like them, in float32 at least;
            None if the step keeps none. `fnn.evaluate(loss, state.ema, data)` takes it.
        loss_scale: the scale of the loss, if it changes, a `LossScale`; else None.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    position: Any = np.zeros(3, np.int32)
    model_state: Any = {}
    ema: Any = None
    loss_scale: Any = None

    def __repr__(self) -> str:
        """What there is, in a line; the numbers stay out of it."""
        shown = {"params": self.params, "opt_state": self.opt_state, "step": self.step}
        for name in ("model_state", "ema"):
            if jax.tree.leaves(getattr(self, name)):
                shown[name] = getattr(self, name)
        parts = (f"{name}: {size_of_tree(part)}" for name, part in shown.items())
        return f"State({', '.join(parts)})"


def own(state: Any) -> Any:
    """A copy of every array, strongly typed, so that the first step's types are the last's."""
    return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.asarray(x).dtype, copy=True), state)


def check_state(state: Any, what: str = "the first argument of a step") -> None:
    """Raise unless it is a State.

    Args:
        what: the argument.
    """
    if not isinstance(state, State):
        hint = " Of a FitResult that is its `.state`." if hasattr(state, "state") else ""
        raise TypeError(
            f"{what} is the State of step.init(params), but got a {type(state).__name__}.{hint}"
        )


def check_not_donated(state: State) -> None:
    """Raise if a step took the state's buffers."""
    step = state.step
    if isinstance(step, jax.Array) and not isinstance(step, jax.core.Tracer) and step.is_deleted():
        raise ValueError(
            "this state was given to a step already, which donated its memory to the state "
            "that it returned: write `state, metrics = step(state, batch)` and go on from "
            "that. (jax.tree.map(jnp.copy, state) keeps one.)"
        )


def params_and_model_state(params: Any, model_state: Any) -> tuple[Any, Any]:
    """Both, where params may be a State, which has them; a model_state that is given is taken.

    Raises:
        ValueError: a step took the State's buffers.
    """
    if not isinstance(params, State):
        return params, model_state
    check_not_donated(params)
    return params.params, params.model_state if model_state is None else model_state


def check_params(params: Any, are_trained: Callable[[Any], Sequence[bool]] | None = None) -> None:
    """Raise unless `params` is a tree of arrays that can be trained.

    Args:
        params: a tree.
        are_trained: of it, for each leaf, whether it is to be trained; all are unless given. What
            isn't need not be floats.
    """
    arguments.no_result("train_step", "params", params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(f"params holds no arrays to train: {params!r}.")
    for path, leaf in leaves:
        try:
            jax.typeof(leaf)
        except TypeError:
            raise TypeError(
                f"{path_name('params', path)} is {leaf!r} of type {type(leaf).__name__}, but "
                "parameters are arrays. Functions and settings belong into the loss, as a closure "
                "or a partial."
            ) from None
    flags = [True] * len(leaves) if are_trained is None else are_trained(params)
    for (path, leaf), flag in zip(leaves, flags, strict=True):
        dtype = jax.typeof(leaf).dtype
        if flag and not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{path_name('params', path)} has dtype {dtype}, but parameters are floats (they "
                "get a gradient). Close over what isn't trained, make it part of the examples, or "
                "let trainable=... leave it out."
            )


def floats_among(where: str, params: Any, use: str) -> list[bool]:
    """For each leaf whether it holds floats, where integers may be among them and stay as they are.

    Args:
        where: the public function.
        params: a tree.
        use: what is done with the floats: "to train".

    Raises:
        TypeError: it is no tree of arrays, or none of them holds floats.
        ValueError: it holds no arrays.
    """
    check_params(params, lambda params: [False] * len(jax.tree.leaves(params)))
    found = [jnp.issubdtype(jax.typeof(x).dtype, jnp.inexact) for x in jax.tree.leaves(params)]
    if not any(found):
        raise TypeError(f"{where}: params holds no floats {use}: {arguments.shapes(params)}.")
    return found


def check_optimizer(where: str, optimizer: Any) -> None:
    """Raise a TypeError unless it is an optax transformation."""
    parts = [getattr(optimizer, name, None) for name in ("init", "update")]
    if isinstance(optimizer, type) or not all(map(callable, parts)):
        hint = " Call it: that makes the transformation." if callable(optimizer) else ""
        raise TypeError(
            f"{where}: optimizer must be an optax transformation such as optax.sgd(0.1), but got "
            f"{arguments.show(optimizer)}.{hint}"
        )


def with_extra_args(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """The optimiser, which may be given more keywords than its update takes.

    Those of optax take all, or none. `optax.contrib.sam` takes one, and refuses others.
    """
    taking = optax.with_extra_args_support(optimizer)
    kinds = inspect.signature(taking.update).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in kinds.values()):
        return taking

    def update(updates, state, params=None, **extra):
        own = {name: value for name, value in extra.items() if name in kinds}
        return taking.update(updates, state, params, **own)

    return optax.GradientTransformationExtraArgs(taking.init, update)


def check_opt_state(optimizer: optax.GradientTransformation, params: Any, opt_state: Any) -> None:
    """Raise a ValueError unless it is the optimiser's state for the parameters that are trained."""
    with optimizers_promotion():
        wanted = jax.eval_shape(lambda params: optimizer.init(params), params)
    if _form(wanted) != _form(opt_state):
        raise ValueError(
            "state.opt_state isn't this optimiser's state for state.params: their structures or "
            "shapes differ. Start again with step.init(params), which makes both.\n"
            f"  wanted: {arguments.shapes(wanted)}\n  got:    {arguments.shapes(opt_state)}"
        )


def check_average(state: State, wanted: bool) -> None:
    """Raise a ValueError unless the state has an average, `ema`, just if one is wanted."""
    if wanted and state.ema is None:
        raise ValueError(
            "the step keeps an average of the parameters, ema=..., but state.ema is None. Begin it "
            "here: state._replace(ema=jax.tree.map(jnp.copy, state.params))."
        )
    if wanted and _form(state.ema) != _form(state.params):
        raise ValueError(
            "state.ema must be a tree like state.params, but it is "
            f"{arguments.shapes(state.ema)}, and they are {arguments.shapes(state.params)}."
        )
    if not wanted and state.ema is not None:
        raise ValueError(
            "state.ema is an average of the parameters, which this step doesn't keep up: give it "
            "ema=... too, or drop the average: state._replace(ema=None)."
        )


def check_scale(state: State, wanted: bool) -> None:
    """Raise a ValueError unless the state has a `loss_scale`, just if one is wanted."""
    if wanted != (state.loss_scale is not None):
        raise ValueError(
            "the step's loss_scale is dynamic, but state.loss_scale is None. Begin it here: "
            "state._replace(loss_scale=fnn.DynamicLossScale().first())."
            if wanted
            else "state.loss_scale is the scale of a step whose loss_scale is dynamic; this one's "
            "isn't: state._replace(loss_scale=None)."
        )


def checked_model_state(new: Any, old: Any) -> Any:
    """The network's new state, which must be built as the old one was; the old one for None."""
    if new is None:
        return old
    if _form(new) != _form(old):
        raise ValueError(
            "the loss must return a state of the structure and the shapes of the one that it gets, "
            f"{arguments.shapes(old)}, but it returned {arguments.shapes(new)}."
        )
    return jax.tree.map(jnp.asarray, new)


def typed_like(new: Any, old: Any) -> Any:
    """The new state in the old one's dtypes, so that the next step needs no new program."""

    def cast(new, old):
        same = new.dtype == old.dtype and not getattr(new, "weak_type", False)
        return new if same else jax.lax.convert_element_type(new, old.dtype)

    return jax.tree.map(cast, new, old)


def _form(tree: Any) -> tuple[Any, list]:
    """How a tree is built: its structure, and its arrays' shapes."""
    return jax.tree.structure(tree), list(map(jnp.shape, jax.tree.leaves(tree)))


def path_name(root: str, path: tuple) -> str:
    """A leaf's place as Python spells it: `params['hidden']['W']`."""
    return root + jax.tree_util.keystr(path)
