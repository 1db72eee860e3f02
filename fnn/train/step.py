"""`train_step`: one compiled step of gradient descent on a batch."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from fnn import arguments, text
from fnn.batch import batch_size, example_types
from fnn.meshes import beside
from fnn.params import Where
from fnn.sharding import Layout
from fnn.train import described
from fnn.train.checks import BatchChecks, describe_bad_labels, describe_nonfinite, find_labels
from fnn.train.conversion import as_arrays
from fnn.train.descent import Descent
from fnn.train.devices import FirstStates, check_layout, on_its_mesh
from fnn.train.fitting import foresee
from fnn.train.freezing import Trainable
from fnn.train.loss import Loss, check_key, check_loss, check_model_state, extras
from fnn.train.loss_scaling import DynamicLossScale, check_loss_scale
from fnn.train.nonfinite import Run, Runs, holds_nonfinite
from fnn.train.objective import Objective
from fnn.train.outcome import NONFINITE, NonFinite
from fnn.train.precision import check_compute
from fnn.train.replay import birth_in_step
from fnn.train.state import (
    State,
    check_not_donated,
    check_optimizer,
    check_params,
    check_state,
    with_extra_args,
)


def train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    nonfinite: NonFinite = "raise",
    check: bool = True,
    trainable: Where | None = None,
    accumulate: int = 1,
    compute: Any = None,
    loss_scale: float | str | DynamicLossScale | None = None,
    ema: float | None = None,
    clip: float | None = None,
    layout: Layout | None = None,
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
            `value_fn` of the batch's mean loss, `batch`, and with `trainable` the tree of
            `all_params` (both for `fnn.curvature.kfac`). Complex parameters move along the
            conjugate of JAX's gradient, the direction of steepest descent.
        nonfinite: what to do about a step whose loss or gradient holds inf or nan (or is so
            large that its norm overflows), or that would make a number of the parameters or of
            the optimiser's state inf or nan that wasn't. "raise": the step isn't applied and a
            NonFiniteError is raised, which names the parameters, and the operation, the part of
            the network and the source line where it was born. "skip": the step isn't applied; the
            metric `skipped` is 1. "ignore": apply it; nothing is looked at. "roll_back": in `fit`,
            go back to the last state that was kept; a step called by itself raises.
        check: look at the values of batches too: nan, and labels out of range. See `TrainStep`.
        trainable: which parameters are trained: a pattern of their paths such as "*.head.*" ("*"
            stands for anything), or several, or a function (path, type), as `fnn.params.choose`
            takes them. The others are frozen: they stay as they are to the last bit, and may be of
            any dtype. Nothing is computed for their gradient, and the optimiser keeps nothing for
            them: it is given trees with None in their places. Unless given, all are trained.
        accumulate: k: cut the batch into k microbatches, computed one after the other in the same
            program, so that only one's values for the backward pass are kept at a time. Loss,
            gradient and metrics are those of the whole batch to rounding, whether or not k divides
            its size, and each example has the key that it has in the whole batch. (Where examples
            meet, in `BatchNorm` say, they meet in their microbatch, and the network's state goes
            from one microbatch to the next.)
        compute: the dtype of the forward and the backward pass, jnp.bfloat16 or jnp.float16:
            parameters and the example's floats are cast to it around the loss. Parameters,
            gradients, the optimiser's state, the network's state, and means over examples stay in
            float32 (or as they are).
        loss_scale: what to multiply the loss by in the backward pass, lest cotangents become 0 in
            float16; the gradient is divided by it. A number; or "dynamic", or a
            `DynamicLossScale`, for one that is halved after each step whose loss or gradient isn't
            finite, and doubled after 2000 good ones: such a step isn't applied, it is counted in
            the metric `skipped`, and only where the scale is at its lower bound it is treated as
            `nonfinite` says. The metric `loss_scale` is what the step used. "dynamic" is the
            default with compute=jnp.float16.
        ema: β, from 0 to below 1: keep an average of the parameters in `state.ema`, that of p₁,
            ..., pₜ after t steps with the weights βᵗ⁻ⁱ, as `optax.ema` does. It is a tree like the
            parameters (with copies of the frozen ones) in float32 at least, for
            `fnn.evaluate(loss, state.ema, data)`.
        clip: the longest gradient: one of a larger Euclidean norm is scaled to this one before the
            optimiser gets it, as by `optax.clip_by_global_norm`. What optimisers with line searches
            get as `grad` isn't scaled.
        layout: how the state and the batches are divided over a mesh of devices; see
            `fnn.sharding`. `init` and the step put there what lies elsewhere.

    Returns:
        A `TrainStep`.

    Raises:
        TypeError, ValueError: an argument isn't of its kind, is out of range, or doesn't fit the
            others. (What the parameters and batches must be is told by `init` and the step.)

    The metrics are scalars on the device: `loss`, `grad_norm` (the Euclidean norm of the
    whole gradient, before the optimiser) and the means of the loss's own.
    """
    return TrainStep(
        loss,
        optimizer,
        nonfinite=nonfinite,
        check=check,
        trainable=trainable,
        accumulate=accumulate,
        compute=compute,
        loss_scale=loss_scale,
        ema=ema,
        clip=clip,
        layout=layout,
    )


def _made_again(loss: Loss, optimizer: Any, options: dict[str, Any]) -> TrainStep:
    return TrainStep(loss, optimizer, **options)


class TrainStep:
    """What `train_step` returns: `init`, the step itself, and `finish`.

    Checks. Shapes are checked when a new shape of batch is traced, before it is compiled.
    With `check`, the values of the first batch of each shape are looked at too (nan, and
    labels out of range where the loss uses an fnn operation on labels), and the labels of
    every batch of numpy arrays. Nothing else costs time at each step.

    A step is compiled as any jitted function is: what the loss reads besides its arguments
    (variables that it closes over, globals) is read when a new shape of batch is traced, and
    stays as it was then. Make a new step after a change.

    Non-finite numbers. The device notices; the host reads a step's notice when it is there,
    and doesn't wait for it. So a NonFiniteError comes from a later call of the step with the
    state that came of it, or from `finish`, which waits; one error tells of all bad steps until
    then. As a bad step isn't applied, and a call that raises applies nothing and doesn't take
    the state, the state in hand is then a good one: go on from it, with the batch of the call
    that raised. For the next 32 steps each waits for its own notice, so that the error comes
    from the call with the bad batch. Where no good step came between, the error also tells where
    the inf or nan was born (see `NonFiniteError.birth`): the bad step is made again operation by
    operation, which takes as long as the step does outside `jit`.

    Runs. One step may serve several runs, in turn or in threads. Notices belong to the run, the
    chain of states; a copy of a state (by `jax.tree.map`, from a file) begins a run of its own.
    If a run is given up, its notices end as a RuntimeWarning.

    Attributes, for the rest of the library:
        loss, optimizer, layout: as given; the optimiser takes extra arguments.
        traced: the step as a traceable function, with the options in its fields.
        find_labels: `find_labels` of the loss.
        made_of: `(loss, optimizer, options)`, by which to make the step again.
        programs: where `fit` keeps the programs that it compiled.
        first_states: those of `init`, on a layout.
    """

    def __init__(
        self,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        *,
        nonfinite: NonFinite = "raise",
        check: bool = True,
        trainable: Where | None = None,
        accumulate: int = 1,
        compute: Any = None,
        loss_scale: float | str | DynamicLossScale | None = None,
        ema: float | None = None,
        clip: float | None = None,
        layout: Layout | None = None,
    ):
        where = "train_step"
        check_loss(where, loss)
        check_optimizer(where, optimizer)
        arguments.choice(where, "nonfinite", nonfinite, NONFINITE)
        arguments.flag(where, "check", check)
        if ema is not None:
            arguments.number(where, "ema", ema, least=0, below=1)
        if clip is not None:
            arguments.number(where, "clip", clip, above=0)
        options: dict[str, Any] = {"nonfinite": nonfinite, "check": check, "trainable": trainable}
        options |= {"accumulate": accumulate, "compute": compute, "loss_scale": loss_scale}
        check_layout(where, layout, extras(loss).mode is not None)
        options |= {"ema": ema, "clip": clip, "layout": layout}
        self.made_of = (loss, optimizer, options)
        self.layout = layout
        self.loss = loss
        self.optimizer = with_extra_args(optimizer)
        chosen = Trainable(trainable, where)
        compute = check_compute(where, compute)
        accumulate = arguments.integer(where, "accumulate", accumulate, least=1)
        self.traced = traced = Descent(
            Objective(loss, compute, accumulate, layout),
            self.optimizer,
            chosen,
            nonfinite,
            check_loss_scale(where, loss_scale, compute),
            ema=None if ema is None else float(ema),
            clip=None if clip is None else float(clip),
            layout=layout,
        )
        self.programs: Any = None
        self.find_labels = functools.partial(find_labels, loss, trained=chosen.flags)
        self._extras = extras(loss)
        self.first_states = FirstStates()
        self.first_states.serve(traced)
        self._runs = Runs()
        self._checks = BatchChecks(self.find_labels, check)

        def step(state: State, batch: Any, key: Any, exact: bool = False) -> Any:
            return traced(state, batch, key, exact)

        self._compiled = jax.jit(step, donate_argnums=0, static_argnums=3)

    def __reduce__(self):
        """Pickled and copied as the call that made it: compiled programs and runs are left out."""
        return _made_again, self.made_of

    def __deepcopy__(self, memo: dict) -> TrainStep:
        return _made_again(*self.made_of)

    @on_its_mesh
    def init(self, params: chex.ArrayTree, model_state: chex.ArrayTree | None = None) -> State:
        """The state to start from: a copy of `params`, the optimiser's state, step 0.

        Args:
            params: a tree of arrays of floats.
            model_state: the network's state, `net.init_state(x)`, for a loss that takes one.

        Raises:
            TypeError: a parameter isn't an array of floats, and the message names it; or a
                model_state is given, but the loss takes none.
            ValueError: there are no parameters, or none is trained.
        """
        check_model_state("step.init", self.loss, model_state)
        if model_state is None:
            if self._extras.needs_state:
                raise TypeError(
                    "the loss takes a state: step.init(params, model_state), with "
                    "model_state = net.init_state(x), say."
                )
            model_state = {}
        params = as_arrays(params, "params", only_arrays=True)
        model_state = as_arrays(model_state, "model_state", only_arrays=True)
        check_params(params, self.traced.trainable.flags)
        if self.layout is None:
            return self.traced.first(params, model_state)
        return self.first_states(self.layout, params, model_state)

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
            MemoryError: its program is larger than the device's memory; before it runs.

        Warns:
            RuntimeWarning: the program is larger than what is free there now. Or a run whose states
                are all gone had met inf or nan.
        """
        check_state(state)
        check_not_donated(state)
        batch = as_arrays(batch, "batch")
        if any(isinstance(x, Tracer) for x in jax.tree.leaves((state, batch, key))):
            self._look_at(state, batch, key)
            return self._compiled(state, batch, key, True)[:2]
        return self.advance(state, batch, key, look_at=True)

    def finish(self, state: State | None = None) -> None:
        """Wait for the steps under way.

        Args:
            state: the run's latest state; unless given, all runs of this thread: those whose
                state is still held by somebody, and the one whose step came last.

        Raises:
            TypeError: state isn't one.
            NonFiniteError: one of them met inf or nan (with nonfinite="raise").
        """
        if state is not None:
            check_state(state, "step.finish: state")
        for run in self._runs.of_this_thread() if state is None else [self._run_of(state)]:
            run.read(state, wait=True)

    def __repr__(self) -> str:
        loss, optimizer, options = self.made_of
        defaults = inspect.signature(TrainStep).parameters
        shown = [described.option(loss), described.transformations(optimizer)]
        for name, value in options.items():
            if value is not defaults[name].default and value != defaults[name].default:
                shown.append(f"{name}={described.option(value)}")
        return text.one_screen(f"TrainStep({', '.join(shown)})")

    # ------------------------------------------------------------------- for `fit` and `sweep`

    @on_its_mesh
    def advance(
        self, state: State, batch: Any, key: Any, *, look_at: bool
    ) -> tuple[State, dict[str, chex.Array]]:
        """The step, called with arrays.

        Args:
            state, batch, key: as above; the state's memory is taken.
            look_at: whether to check the batch before.

        Raises:
            NonFiniteError: as above.
        """
        known = self._runs.of(state) is not None
        if self.layout is not None:
            state = state if known else self.layout.place(state)
            batch, key = self.layout.place_batch(batch), self.layout.spread(key)
        elif not known:
            state = beside(state, batch)
        run = self._run_of(state)
        run.read(state)
        if look_at and self._look_at(state, batch, key):
            args = (state, batch, key, run.exact)
            foresee("train_step", self, self._compiled, args, state, batch, key)
        # A state that was told of is kept for the caller, if the next step is refused, too.
        given = jax.tree.map(jnp.copy, state) if run.careful else state
        new, metrics, report = self._compiled(given, batch, key, run.exact)
        if report is not None:
            types = run.types
            describe = lambda: self._what_is_wrong_with(batch, types, key)
            search = lambda state: birth_in_step(self, state, batch, key)
            run.add(report, (batch_size(batch), describe, search))
            if run.careful:
                run.careful -= 1
                run.read(state, wait=True)
        self._runs.link(new, run)
        return new, metrics

    def _run_of(self, state: State) -> Run:
        run = self._runs.of(state)
        if run is not None:
            return run
        self._runs.warn_of_abandoned()
        trained, _ = self.traced.trainable.split(state)
        with jax.ensure_compile_time_eval():
            run = Run(
                state, trained, self.traced.nonfinite != "ignore" and holds_nonfinite(trained)
            )
        self._runs.link(state, run)
        return run

    # ------------------------------------------------------------------ checks, on the host

    def _look_at(self, state: State, batch: Any, key: Any) -> bool:
        """Check what goes in: quickly, as it is done at every step, but new shapes thoroughly.

        Returns whether these are new.
        """
        new: list[None] = []

        def first():
            new.append(None)
            check_key(self._extras, key)
            self.traced.check(state)

        self._checks.look_at(state.params, batch, key, state.model_state, first=first)
        return bool(new)

    def _what_is_wrong_with(self, batch: Any, types: tuple[Any, Any], key: Any) -> str:
        """What is wrong with the batch of a bad step, if that can be seen; see `Run.types`."""
        params, state = types
        data = describe_nonfinite(batch)
        if not data:
            labels = find_labels(self.loss, params, example_types(batch), key, state)
            data = describe_bad_labels(batch, labels)
        return data
