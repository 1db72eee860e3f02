"""One step of gradient descent as a traceable function: what `train_step` compiles."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fnn.sharding import Layout
from fnn.train.averaging import averaged, first_average
from fnn.train.clipping import clipped
from fnn.train.devices import everywhere, held
from fnn.train.freezing import Trainable
from fnn.train.loss_scaling import DynamicLossScale
from fnn.train.objective import Objective
from fnn.train.outcome import NonFinite, settle
from fnn.train.precision import optimizers_promotion
from fnn.train.result import annotate
from fnn.train.state import (
    State,
    check_average,
    check_opt_state,
    check_params,
    check_scale,
    own,
    typed_like,
)

# Of what an optimiser raises: optax and Python name no argument.
IN_UPDATE = (
    "(train_step: in the optimizer's update. A schedule, if it has one, is called with the number "
    "of steps as a traced array, and must return a real number.)"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Descent:
    """The step, called with a state, a batch and a key. See `train_step` for the options.

    Fields:
        objective: the mean loss of a batch, and its gradient.
        optimizer: any optax transformation, with extra arguments.
        trainable: which parameters are trained.
        nonfinite: what to do about a step with inf or nan.
        loss_scale: a number, how it changes, or None.
        ema, clip: floats or None.
        layout: how state and batch are divided over devices, or None.
    """

    objective: Objective
    optimizer: optax.GradientTransformationExtraArgs
    trainable: Trainable
    nonfinite: NonFinite
    loss_scale: float | DynamicLossScale | None = None
    ema: float | None = None
    clip: float | None = None
    layout: Layout | None = None

    @property
    def scaling(self) -> DynamicLossScale | None:
        """How the scale of the loss changes, if it does."""
        return self.loss_scale if isinstance(self.loss_scale, DynamicLossScale) else None

    def first(self, params: Any, model_state: Any) -> State:
        """The state to start from, in arrays of its own."""
        with optimizers_promotion():
            opt_state = self.optimizer.init(self.trainable.part(params))
        start = State(params, opt_state, jnp.zeros((), jnp.int32), model_state=model_state)
        if self.ema is not None:
            start = start._replace(ema=first_average(params))
        if self.scaling is not None:
            start = start._replace(loss_scale=self.scaling.first())
        # A step donates its state's buffers; copies keep the caller's `params` alive.
        return own(start)

    def check(self, state: State) -> None:
        """Raise a TypeError or ValueError unless the state's parts are those of this step."""
        check_params(state.params, self.trainable.flags)
        check_opt_state(self.optimizer, self.trainable.part(state.params), state.opt_state)
        check_average(state, self.ema is not None)
        check_scale(state, self.scaling is not None)

    def __call__(
        self,
        state: State,
        batch: Any,
        key: Any,
        exact: bool = False,
        count: Any = None,
        look: bool | None = None,
        folded: bool = False,
    ) -> tuple[State, dict[str, jax.Array], jax.Array | None]:
        """The step, traced: `(state, metrics, report or None)`.

        Args:
            state: before it.
            batch: a tree of arrays with the examples along their first axes.
            key: split into one for each example; or None.
            exact: see `square_sums`.
            count: how many of the batch's first examples count; all unless given.
            look: whether to look for inf and nan before the step is applied; by default, unless
                `nonfinite` is "ignore".
            folded: see `square_norms`.

        Raises:
            TypeError, ValueError: the state isn't one of this step.
        """
        # Python comes by here only to trace a new program: to check shapes here costs no time.
        self.check(state)
        state, whole = self.trainable.split(state)
        every = lambda params: whole(state._replace(params=params)).params
        scale = self.loss_scale if self.scaling is None else state.loss_scale.scale
        found = self.objective.found(
            state.params, every, batch, key, state.model_state, count=count, scale=scale
        )
        gradient = jax.tree.map(_steepest, found.gradient)

        # A line search passes on what else update was given.
        def value_of(params, batch=batch, all_params=None):
            return self.objective.value(every(params), batch, key, state.model_state, count)

        # The model may be part of the optimiser, as of KFAC, and needs what is frozen, too.
        more = {} if self.trainable.is_all else {"all_params": every(state.params)}

        def apply():
            try:
                with optimizers_promotion():
                    updates, opt_state = self.optimizer.update(
                        gradient if self.clip is None else clipped(gradient, self.clip),
                        state.opt_state,
                        state.params,
                        value=found.means["loss"],
                        grad=gradient,
                        value_fn=value_of,
                        batch=batch,
                        **more,
                    )
            except Exception as error:
                annotate(error, IN_UPDATE)
                raise
            with optimizers_promotion():
                params = optax.apply_updates(state.params, updates)
            new = state._replace(
                params=params,
                opt_state=opt_state,
                step=state.step + 1,
                model_state=found.model_state,
            )
            if self.ema is not None:
                new = new._replace(ema=averaged(state.ema, new.params, self.ema, new.step))
            return typed_like(new, state)

        kept, metrics, report = settle(
            state,
            apply,
            gradient,
            found.means["loss"],
            found.losses,
            nonfinite=self.nonfinite,
            look=self.nonfinite != "ignore" if look is None else look,
            exact=exact,
            folded=folded,
            scaling=self.scaling,
        )
        new, metrics = whole(kept), found.means | metrics
        if self.layout is not None:
            new = held(self.layout, new)
            metrics, report = everywhere(self.layout, (metrics, report))
        return new, metrics, report


def _steepest(g: jax.Array) -> jax.Array:
    return jnp.conj(g) if jnp.issubdtype(g.dtype, jnp.complexfloating) else g
