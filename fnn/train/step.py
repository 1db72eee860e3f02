"""`train_step`: one compiled step of gradient descent on a batch."""

from __future__ import annotations

import functools
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from fnn import arguments
from fnn.backprop import value_and_grad
from fnn.batch import batch_size, example_types
from fnn.meshes import beside
from fnn.train.checks import BatchChecks, describe_bad_labels, describe_nonfinite, find_labels
from fnn.train.data import as_arrays
from fnn.train.loss import Extras, Loss, check_loss, extras, mean_loss, mean_metrics
from fnn.train.nonfinite import (
    Run,
    Runs,
    holds_nonfinite,
    propose,
    report,
    square_norms,
    square_sums,
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
        loss: for ONE example: `loss(params, example)`, which returns a scalar, or a pair of a
            scalar and a dict of metrics. The step maps it over the batch. Whatever it also names
            of these as arguments, it is given: `key`, a key to draw random numbers from; `mode`,
            the `fnn.layers.Mode` of training, with a key and the axis over the batch; `state`,
            the network's state, of which it returns the new one, last: `(scalar, state)` or
            `(scalar, metrics, state)`. `fnn.supervised(net, ...)` writes such a loss.
        optimizer: any optax transformation. Those that want more than the gradient
            (`optax.lbfgs`, `polyak_sgd`, `reduce_on_plateau`, ...) get `value`, `grad` and
            `value_fn` of the batch's mean loss, and `batch` (for `fnn.curvature.kfac`). Complex
            parameters move along the conjugate of JAX's gradient, the direction of steepest
            descent.
        nonfinite: what to do about a step whose loss or gradient holds inf or nan (or is so
            large that its norm overflows), or that would make a number of the parameters or of
            the optimiser's state inf or nan that wasn't. "raise": the step isn't applied and a
            NonFiniteError that names the parameters is raised. "skip": the step isn't
            applied; the metric `skipped` is 1. "ignore": apply it; nothing is looked at.
        check: look at the values of batches too: nan, and labels out of range. See `TrainStep`.

    Returns:
        A `TrainStep`.

    The metrics are scalars on the device: `loss`, `grad_norm` (the Euclidean norm of the
    whole gradient, before the optimiser) and the means of the loss's own.
    """
    return TrainStep(loss, optimizer, nonfinite=nonfinite, check=check)


def _made_again(loss, optimizer, nonfinite: NonFinite, check: bool) -> TrainStep:
    return TrainStep(loss, optimizer, nonfinite=nonfinite, check=check)


class TrainStep:
    """What `train_step` returns: `init`, the step itself, and `finish`.

    Checks. Shapes are checked when a new shape of batch is traced, before it is compiled.
    With `check`, the values of the first batch of each shape are looked at too (nan, and
    labels out of range where the loss uses an fnn operation on labels), and the labels of
    every batch of numpy arrays. Nothing else costs time at each step.

    A step is compiled as any jitted function is: what the loss reads besides its arguments
    (variables that it closes over, globals) is read when a new shape of batch is traced, and
    stays as it was then. Make a new step after a change. (`fit` makes one at each call.)

    Non-finite numbers. The device notices; the host reads a step's notice when it is there,
    and doesn't wait for it. So a NonFiniteError comes from a later call of the step with the
    state that came of it, or from `finish`, which waits; one error tells of all bad steps until
    then. As a bad step isn't applied, and a call that raises applies nothing and doesn't take
    the state, the state in hand is then a good one: go on from it, with the batch of the call
    that raised. For the next 32 steps each waits for its own notice, so that the error comes
    from the call with the bad batch.

    Runs. One step may serve several runs, in turn or in threads. Notices belong to the run, the
    chain of states; a copy of a state (by `jax.tree.map`, from a file) begins a run of its own.
    If a run is given up, its notices end as a RuntimeWarning.
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
        self._made_of = (loss, optimizer, nonfinite, check)
        self.loss = loss
        self.optimizer = optax.with_extra_args_support(optimizer)
        self._nonfinite = nonfinite
        self._extras = extras(loss)
        self._runs = Runs()
        self._made: list | None = None  # `fit` has its step note here what it made
        self._checks = BatchChecks(functools.partial(find_labels, loss, trained=True), check)
        self._compiled = jax.jit(self._step, donate_argnums=0, static_argnums=3)

    def __reduce__(self):
        """Pickled and copied as the call that made it: compiled programs and runs are left out."""
        return _made_again, self._made_of

    def __deepcopy__(self, memo: dict) -> TrainStep:
        return _made_again(*self._made_of)

    def init(self, params: chex.ArrayTree, model_state: chex.ArrayTree | None = None) -> State:
        """The state to start from: a copy of `params`, the optimiser's state, step 0.

        Args:
            params: a tree of arrays of floats.
            model_state: the network's state, `net.init_state(x)`, for a loss that takes one.

        Raises:
            TypeError: a parameter isn't an array of floats; the message names it.
            ValueError: there are no parameters.
        """
        if model_state is None:
            if self._extras.needs_state:
                raise TypeError(
                    "the loss takes a state: step.init(params, model_state), with "
                    "model_state = net.init_state(x), say."
                )
            model_state = {}
        params = as_arrays(params, "params", only_arrays=True)
        model_state = as_arrays(model_state, "model_state", only_arrays=True)
        return initial_state(params, self.optimizer, model_state)

    def __call__(
        self, state: State, batch: chex.ArrayTree, key: chex.PRNGKey | None = None
    ) -> tuple[State, dict[str, chex.Array]]:
        """One step.

        Args:
            state: from `init` or from the step before. It is donated.
            batch: a tree of arrays; the first axis of each runs over the examples. Those of
                other libraries, and lists of numbers, are converted as by `fit`.
            key: for a loss that takes a key, or a mode; split into one for each example. Pass a
                new one at each step.

        Returns:
            `(state, metrics)`, both on the device.

        Raises:
            TypeError, ValueError: the state or the batch isn't one, or doesn't fit.
            NonFiniteError: a step before this one met inf or nan (with nonfinite="raise").
        """
        self._look_at_state(state)
        batch = as_arrays(batch, "batch")
        if any(map(_is_traced, jax.tree.leaves((state, batch, key)))):
            self._look_at(state, batch, key)
            return self._compiled(state, batch, key, True)[:2]
        if self._runs.of(state) is None:
            state = beside(state, batch)
        run = self._run_of(state)
        run.read()
        self._look_at(state, batch, key)
        # A state that was told of is kept for the caller, if the next step is refused, too.
        given = jax.tree.map(jnp.copy, state) if run.careful else state
        made: list = [] if self._made is None else self._made
        made.clear()
        # No signal's handler can come between a step's end and its result's place in the list:
        # they run between Python's instructions, and `extend` is one.
        made.extend(map(self._compiled, (given,), (batch,), (key,), (run.exact,)))
        new, metrics, report = made[0]
        if report is not None:
            types = run.types
            run.add(
                report, (batch_size(batch), lambda: self._what_is_wrong_with(batch, types, key))
            )
            if run.careful:
                run.careful -= 1
                run.read(wait=True)
        self._runs.link(new, run)
        return new, metrics

    def finish(self, state: State | None = None) -> None:
        """Wait for the steps under way.

        Args:
            state: the run's latest state; unless given, all runs of this thread: those whose
                state is still held by somebody, and the one whose step came last.

        Raises:
            NonFiniteError: one of them met inf or nan (with nonfinite="raise").
        """
        for run in self._runs.of_this_thread() if state is None else [self._run_of(state)]:
            run.read(wait=True)

    def _run_of(self, state: State) -> Run:
        run = self._runs.of(state)
        if run is not None:
            return run
        self._runs.warn_of_abandoned()
        with jax.ensure_compile_time_eval():
            run = Run(state, self._nonfinite != "ignore" and holds_nonfinite(state))
        self._runs.link(state, run)
        return run

    # ---------------------------------------------------------------- the step, on the device

    def _step(self, state: State, batch: Any, key: Any, exact: bool = False):
        # Python comes by here only to trace a new program: to check shapes here costs no time.
        check_params(state.params)
        _check_opt_state(self.optimizer, state)
        size = batch_size(batch)

        def mean(params):
            return mean_loss(self.loss, params, batch, size, key, state.model_state)

        (value, (losses, metrics, model_state)), gradient = value_and_grad(mean, has_aux=True)(
            state.params
        )
        model_state = _checked_state(model_state, state.model_state)
        gradient = jax.tree.map(_steepest, gradient)
        metrics = {"loss": value, **mean_metrics(metrics)}

        def value_of(params, batch=batch):  # a line search passes on what else update was given
            return mean_loss(self.loss, params, batch, size, key, state.model_state)[0]

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
            new = state._replace(
                params=params, opt_state=opt_state, step=state.step + 1, model_state=model_state
            )
            return _typed_like(new, state)

        if self._nonfinite == "ignore":
            squares = square_norms(gradient)
            return apply(), metrics | {"grad_norm": jnp.sqrt(jnp.sum(squares))}, None
        new, again = propose(apply)
        sums = square_sums(gradient, new, state, exact=exact)
        total = jnp.sum(sums[: len(jax.tree.leaves(gradient))])
        good = jnp.isfinite(value) & jnp.all(jnp.isfinite(sums)) & jnp.isfinite(total)

        def bad():  # what explains a bad step is computed only if there is one
            squares = square_norms(gradient)
            norm = jnp.sqrt(jnp.sum(squares))
            return state, norm.astype(total.dtype), report(state, losses, squares, sums)

        quiet = jax.eval_shape(bad)[2]
        kept, norm, told = jax.lax.cond(
            good, lambda: (again(), jnp.sqrt(total), jnp.zeros(quiet.shape, quiet.dtype)), bad
        )
        metrics["grad_norm"] = norm
        if self._nonfinite == "skip":
            return kept, metrics | {"skipped": (~good).astype(jnp.float32)}, None
        return kept, metrics, told

    # ------------------------------------------------------------------ checks, on the host

    def _look_at_state(self, state: State) -> None:
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

    def _look_at(self, state: State, batch: Any, key: Any) -> None:
        """Check what goes in: quickly, as it is done at every step, but new shapes thoroughly."""
        self._checks.look_at(
            state.params,
            batch,
            key,
            state.model_state,
            first=functools.partial(self._meet, state, key),
        )

    def _meet(self, state: State, key: Any) -> None:
        check_key(self._extras, key)
        check_params(state.params)
        _check_opt_state(self.optimizer, state)

    def _what_is_wrong_with(self, batch: Any, types: tuple[Any, Any], key: Any) -> str:
        """What is wrong with the batch of a bad step, if that can be seen; see `Run.types`."""
        params, state = types
        data = describe_nonfinite(batch)
        if not data:
            labels = find_labels(self.loss, params, example_types(batch), key, state)
            data = describe_bad_labels(batch, labels)
        return data


def check_key(found: Extras, key: Any) -> None:
    """Raise a TypeError unless a key is there if the loss needs one, and not if it has no use."""
    if found.needs_key and key is None:
        raise TypeError(
            "the loss takes a key, loss(params, example, key): pass key=... to the step."
        )
    if key is not None and not found.may_draw:
        raise TypeError(
            "a key was passed, but the loss takes none: it must be loss(params, example, key), or "
            "loss(params, example, mode)."
        )
    if key is not None:
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
    wanted = jax.eval_shape(lambda params: optimizer.init(params), state.params)
    if _form(wanted) != _form(state.opt_state):
        raise ValueError(
            "state.opt_state isn't this optimiser's state for state.params: their structures or "
            "shapes differ. Start again with step.init(params), which makes both.\n"
            f"  wanted: {arguments.shapes(wanted)}\n  got:    {arguments.shapes(state.opt_state)}"
        )


def _checked_state(new: Any, old: Any) -> Any:
    """The network's new state, which must be built as the old one was; the old one for None."""
    if new is None:
        return old
    if _form(new) != _form(old):
        raise ValueError(
            "the loss must return a state of the structure and the shapes of the one that it gets, "
            f"{arguments.shapes(old)}, but it returned {arguments.shapes(new)}."
        )
    return jax.tree.map(jnp.asarray, new)


def _form(tree: Any) -> tuple[Any, list]:
    """How a tree is built: its structure, and its arrays' shapes."""
    return jax.tree.structure(tree), list(map(jnp.shape, jax.tree.leaves(tree)))


def _typed_like(new: Any, old: Any) -> Any:
    """The new state in the old one's dtypes, so that the next step needs no new program."""

    def cast(new, old):
        same = new.dtype == old.dtype and not getattr(new, "weak_type", False)
        return new if same else jax.lax.convert_element_type(new, old.dtype)

    return jax.tree.map(cast, new, old)
