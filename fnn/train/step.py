"""`train_step`: one compiled step of gradient descent on a batch."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from fnn import arguments
from fnn.backprop import value_and_grad
from fnn.train.bad_input import batch_size, describe_nonfinite
from fnn.train.batch_checks import BatchChecks, example_types
from fnn.train.batch_loss import Loss, check_loss, mean_loss, mean_metrics, takes_key
from fnn.train.conversion import as_arrays
from fnn.train.labels import describe_bad_labels, find_labels
from fnn.train.nonfinite import (
    NonFiniteError,
    Reports,
    explain,
    parameter_names,
    report,
    square_norms,
)
from fnn.train.state import State, check_params, initial_state

NonFinite = Literal["raise", "skip", "ignore"]


def train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    nonfinite: NonFinite = "raise",
    check: bool = True,
) -> TrainStep:
    """A training step: gradient of the mean loss over a batch, then the optimiser's update.

        step = fnn.train_step(loss, optax.adam(1e-3))
        state = step.init(params)
        for batch in batches:
            state, metrics = step(state, batch)

    It is one compiled program; it is compiled once for each shape of batch. The state that
    goes in is donated (its memory becomes that of the state that comes out): don't use it
    again. `step.init` copies, so `params` stay yours.

    Args:
        loss: for ONE example: `loss(params, example)`, or `loss(params, example, key)` for a
            loss that draws random numbers. It returns a scalar, or a pair of a scalar and a
            dict of metrics. The step maps it over the batch.
        optimizer: any optax transformation. Those that want more than the gradient
            (`optax.lbfgs`, `polyak_sgd`, `reduce_on_plateau`, ...) get `value`, `grad` and
            `value_fn` of the batch's mean loss, and `batch` (for `fnn.curvature.kfac`). Complex
            parameters move along the conjugate of JAX's gradient, the direction of steepest
            descent.
        nonfinite: what to do about a step whose loss or gradient holds inf or nan (or is so
            large that its norm overflows). "raise": the step isn't applied and a
            NonFiniteError that names the parameters is raised. "skip": the step isn't
            applied; the metric `skipped` is 1. "ignore": apply it; nothing is looked at.
        check: look at the values of batches too: nan, and labels out of range. See `TrainStep`.

    Returns:
        A `TrainStep`.

    The metrics are scalars on the device: `loss`, `grad_norm` (the Euclidean norm of the
    whole gradient, before the optimiser) and the means of the loss's own.
    """
    return TrainStep(loss, optimizer, nonfinite=nonfinite, check=check)


class TrainStep:
    """What `train_step` returns: `init`, the step itself, and `finish`.

    Checks. Shapes are checked when a new shape of batch is traced, before it is compiled.
    With `check`, the values of the first batch of each shape are looked at too (nan, and
    labels out of range where the loss uses an fnn operation on labels), and the labels of
    every batch of numpy arrays. Nothing else costs time at each step.

    Non-finite numbers. The device notices; the host reads a step's notice when it is there,
    and never waits for it. So a NonFiniteError comes from a later call of the step, or from
    `finish`, which waits. As a bad step isn't applied, the state in hand is then a good one.
    """

    def __init__(
        self,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        *,
        nonfinite: NonFinite = "raise",
        check: bool = True,
    ):
        where = "train_step"
        check_loss(where, loss)
        check_optimizer(where, optimizer)
        arguments.choice(where, "nonfinite", nonfinite, ("raise", "skip", "ignore"))
        arguments.flag(where, "check", check)
        self.loss = loss
        self.optimizer = optax.with_extra_args_support(optimizer)
        self._nonfinite = nonfinite
        self._takes_key = takes_key(loss)
        self._reports = Reports()
        self._checks = BatchChecks(functools.partial(find_labels, loss, trained=True), check)
        self._compiled = jax.jit(self._step, donate_argnums=0)

    def init(self, params: Any) -> State:
        """The state to start from: a copy of `params`, the optimiser's state, step 0.

        Raises:
            TypeError: a parameter isn't an array of floats; the message names it.
            ValueError: there are no parameters.
        """
        return initial_state(as_arrays(params, "params", only_arrays=True), self.optimizer)

    def __call__(self, state: State, batch: Any, key: Any = None) -> tuple[State, dict]:
        """One step.

        Args:
            state: from `init` or from the step before. It is donated.
            batch: a tree of arrays; the first axis of each runs over the examples. Those of
                other libraries, and lists of numbers, are converted as by `fit`.
            key: for a loss that takes one; split into one for each example. Pass a new one
                at each step.

        Returns:
            `(state, metrics)`, both on the device.

        Raises:
            TypeError, ValueError: the state or the batch isn't one, or doesn't fit.
            NonFiniteError: a step before this one met inf or nan (with nonfinite="raise").
        """
        self._reports.read()
        batch = as_arrays(batch, "batch")
        self._look_at(state, batch, key)
        state, metrics, report = self._compiled(state, batch, key)
        if report is not None and not _is_traced(report):
            self._reports.add(report, functools.partial(self._explain, state.params, batch, key))
        return state, metrics

    def finish(self) -> None:
        """Wait for the steps under way.

        Raises:
            NonFiniteError: one of them met inf or nan (with nonfinite="raise").
        """
        self._reports.read(wait=True)

    # ---------------------------------------------------------------- the step, on the device

    def _step(self, state: State, batch: Any, key: Any):
        # Python comes by here only to trace a new program: to check shapes here costs no time.
        check_params(state.params)
        _check_opt_state(self.optimizer, state)
        size = batch_size(batch)

        def mean(params):
            return mean_loss(self.loss, params, batch, size, key)

        (value, (losses, metrics)), gradient = value_and_grad(mean, has_aux=True)(state.params)
        gradient = jax.tree.map(_steepest, gradient)
        squares = square_norms(gradient)
        total = jnp.sum(squares)
        metrics = {
            "loss": value,
            "grad_norm": jnp.sqrt(total),
            **mean_metrics(metrics),
        }

        def value_of(params, batch=batch):  # a line search passes on what else update was given
            return mean_loss(self.loss, params, batch, size, key)[0]

        def apply():
            updates, opt_state = self.optimizer.update(
                gradient,
                state.opt_state,
                state.params,
                value=value,
                grad=gradient,
                value_fn=value_of,
                batch=batch,
            )
            params = optax.apply_updates(state.params, updates)
            return _typed_like(State(params, opt_state, state.step + 1), state)

        if self._nonfinite == "ignore":
            return apply(), metrics, None
        # The choice between new and old is part of the loop that makes the new: it costs nothing.
        # One number, made once: the barrier keeps the compiler from making it at each entry.
        good = jax.lax.optimization_barrier(jnp.isfinite(value) & jnp.isfinite(total))
        new = jax.tree.map(lambda new, old: jnp.where(good, new, old), apply(), state)
        # What explains a bad step is computed only if there is one; the state is then the old.
        quiet = jax.eval_shape(report, state, losses, squares)
        told = jax.lax.cond(
            good,
            lambda: jnp.zeros(quiet.shape, quiet.dtype),
            lambda: report(new, losses, squares),
        )
        if self._nonfinite == "skip":
            return new, metrics | {"skipped": (~good).astype(jnp.float32)}, None
        return new, metrics, told

    # ------------------------------------------------------------------ checks, on the host

    def _look_at(self, state: State, batch: Any, key: Any) -> None:
        """Check what goes in: quickly, as it is done at every step, but new shapes thoroughly."""
        if not isinstance(state, State):
            hint = " Of a FitResult that is its `.state`." if hasattr(state, "state") else ""
            raise TypeError(
                f"the first argument of a step is the State of step.init(params), but got a "
                f"{type(state).__name__}.{hint}"
            )
        if _is_donated(state):
            raise ValueError(
                "this state was given to a step already, which donated its memory to the state "
                "that it returned: write `state, metrics = step(state, batch)` and go on from "
                "that. (jax.tree.map(jnp.copy, state) keeps one.)"
            )
        self._checks.look_at(
            state.params, batch, key, first=functools.partial(self._meet, state, key)
        )

    def _meet(self, state: State, key: Any) -> None:
        check_key(self.loss, self._takes_key, key)
        check_params(state.params)
        _check_opt_state(self.optimizer, state)

    def _explain(self, params: Any, batch: Any, key: Any, found: np.ndarray) -> NonFiniteError:
        """The error of a bad step: what wasn't finite and, if it can be seen, why."""
        data = describe_nonfinite(batch)
        if not data:  # the parameters' buffers may be gone, but their types are still known
            params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
            labels = find_labels(self.loss, params, example_types(batch), key)
            data = describe_bad_labels(batch, labels)
        return explain(found, parameter_names(params), batch_size(batch), data)


def check_key(loss: Loss, takes: bool, key: Any) -> None:
    """Raise a TypeError unless a key is there exactly if the loss takes one."""
    if takes and key is None:
        raise TypeError(
            "the loss takes a key, loss(params, example, key): pass key=... to the step."
        )
    if key is not None and not takes:
        raise TypeError(
            "a key was passed, but the loss takes none: it must be loss(params, example, key)."
        )
    if takes:
        arguments.key("train_step", "key", key)


def check_optimizer(where: str, optimizer: Any) -> None:
    """Raise a TypeError unless it is an optax transformation."""
    parts = [getattr(optimizer, name, None) for name in ("init", "update")]
    if isinstance(optimizer, type) or not all(map(callable, parts)):
        hint = " Call it: that makes the transformation." if callable(optimizer) else ""
        raise TypeError(
            f"{where}: optimizer must be an optax transformation such as optax.sgd(0.1), but got "
            f"{arguments.show(optimizer)}.{hint}"
        )


def _is_donated(state: State) -> bool:
    step = state.step
    return isinstance(step, jax.Array) and not _is_traced(step) and step.is_deleted()


def _is_traced(x: Any) -> bool:
    return isinstance(x, Tracer)


def _steepest(g: jax.Array) -> jax.Array:
    return jnp.conj(g) if jnp.issubdtype(g.dtype, jnp.complexfloating) else g


def _check_opt_state(optimizer, state: State) -> None:
    wanted = jax.eval_shape(optimizer.init, state.params)
    shapes = [
        (jax.tree.structure(s), [x.shape for x in jax.tree.leaves(s)])
        for s in (wanted, state.opt_state)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "state.opt_state isn't this optimiser's state for state.params: their structures or "
            "shapes differ. Start again with step.init(params), which makes both.\n"
            f"  wanted: {_structure(wanted)}\n  got:    {_structure(state.opt_state)}"
        )


def _structure(tree: Any) -> str:
    return str(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)).replace("'", "")


def _typed_like(new: Any, old: Any) -> Any:
    """The new state in the old one's dtypes, so that the next step needs no new program."""

    def cast(new, old):
        same = new.dtype == old.dtype and not getattr(new, "weak_type", False)
        return new if same else jax.lax.convert_element_type(new, old.dtype)

    return jax.tree.map(cast, new, old)
