"""What hyperparameters make: a member's training step, its first state and its key."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments
from fnn.precision import widest
from fnn.sweeps.axes import Axes, is_integer, is_number, listed
from fnn.train.loss import Loss, check_loss, check_model_state, extras
from fnn.train.state import State
from fnn.train.step import TrainStep, check_optimizer

WHERE = "sweep"


class Recipe:
    """The functions of a sweep, each of the hyperparameters that it names.

    Attributes:
        key: all members' key; None where it is a function of the hyperparameters, or there is
            none.
        start: all members' first parameters; None where they are a function.
        model_state: the same of the network's state.
    """

    def __init__(
        self,
        axes: Axes,
        loss: Any,
        optimizer: Any,
        init: Any,
        key: Any,
        model_state: Any,
        validation_loss: Any,
    ):
        """Check the arguments, as far as it can be done without calling them.

        Raises:
            TypeError: one of them isn't what it should be.
            ValueError: a hyperparameter is named by none of them.
        """
        names = axes.names
        self._used: set[str] = set()
        self._makes_loss = self._look_at_loss("loss", loss, names)
        self._makes_validation_loss = validation_loss is not None and self._look_at_loss(
            "validation_loss", validation_loss, names
        )
        self._loss, self._validation_loss = loss, validation_loss
        makes_step = self._makes_loss and optimizer is None
        if isinstance(loss, TrainStep) and optimizer is not None:
            raise TypeError(
                "sweep: loss is a TrainStep, which has an optimizer: give only one. (A function of "
                "hyperparameters may return a TrainStep.)"
            )
        if optimizer is None and not (isinstance(loss, TrainStep) or makes_step):
            raise TypeError(
                "sweep: optimizer is missing: an optax transformation, or a function of "
                "hyperparameters that returns one, such as lambda learning_rate: "
                "optax.adam(learning_rate)."
            )
        self._optimizer = optimizer
        self._makes_optimizer = optimizer is not None and self._look_at_maker(
            "optimizer", optimizer, names, _is_optimizer, "an optax transformation"
        )
        self._init = init
        self.makes_params = callable(init) and self._look_at_maker(
            "init", init, names, lambda x: False, "a tree of parameters"
        )
        self.start = None if self.makes_params else init
        self._model_state = model_state
        makes_state = callable(model_state) and self._look_at_maker(
            "model_state", model_state, names, lambda x: False, "a tree of arrays"
        )
        self._makes_model_state = makes_state
        self.model_state = None if makes_state else model_state
        self._key = key
        self.key = None
        if callable(key):
            self._look_at_maker("key", key, names, lambda x: False, "a key")
        elif key is not None:
            self.key = arguments.key(WHERE, "key", key)
        elif "seed" in names:
            self._check_seeds(axes)
            self._used.add("seed")
        self.has_key = key is not None or "seed" in names
        # What no function names may be a hyperparameter that the optimiser's state holds.
        self.injected = tuple(n for n in names if n not in self._used and n != "batch_size")
        for name in self.injected:
            other = [v for v in axes.values(name) if not is_number(v)]
            if other:
                raise TypeError(
                    f"sweep: no function takes {name!r}, so it is a hyperparameter in the "
                    "optimiser's state (optax.inject_hyperparams), which must be a number, but its "
                    f"axis holds {arguments.show(other[0])}."
                )
            if name in axes.static:
                self.refuse_unused((name,))

    @property
    def functions(self) -> tuple:
        """All that decides what a program computes, the loss first."""
        others = (self._optimizer, self._init, self._key, self._model_state)
        return (self._loss, self._validation_loss, *filter(callable, others), self._optimizer)

    # ------------------------------------------------------------------------- what they make

    def step(self, hyper: Mapping[str, Any]) -> TrainStep:
        """A member's training step."""
        made = self._made("loss", self._loss, hyper) if self._makes_loss else self._loss
        if isinstance(made, TrainStep):
            if self._optimizer is not None:
                raise TypeError(
                    "sweep: loss returned a TrainStep, which has an optimizer: leave out "
                    "optimizer=..."
                )
            if made.layout is not None:
                raise TypeError(
                    "sweep: the TrainStep has a layout, but a sweep decides itself where its "
                    "networks lie: leave out the step's layout=..."
                )
            return made
        if self._optimizer is None:
            raise TypeError(
                f"sweep: the function {arguments.name_of(self._loss)} must return a TrainStep "
                f"where there is no optimizer, but returned {arguments.show(made)}."
            )
        bound = made if self._makes_loss else self._bound(made, hyper)
        check_loss(WHERE, bound)
        optimizer = self._optimizer
        if self._makes_optimizer:
            optimizer = self._made("optimizer", optimizer, hyper)
        check_optimizer(WHERE, optimizer)
        return TrainStep(bound, optimizer, nonfinite="ignore", check=False)

    def loss(self, hyper: Mapping[str, Any]) -> Loss:
        """A member's loss."""
        made = self._made("loss", self._loss, hyper) if self._makes_loss else self._loss
        if isinstance(made, TrainStep):
            return made.loss
        return made if self._makes_loss else self._bound(made, hyper)

    def validation_loss(self, hyper: Mapping[str, Any]) -> Loss:
        """A member's loss on the validation data."""
        if self._validation_loss is None:
            return self.loss(hyper)
        if self._makes_validation_loss:
            return self._made("validation_loss", self._validation_loss, hyper)
        return self._bound(self._validation_loss, hyper)

    def begin(self, hyper: Mapping[str, Any], example: Any, shared: Any) -> State:
        """A member's first state.

        Args:
            hyper: its hyperparameters.
            example: the types of one example.
            shared: all members' `(start, model_state)`.
        """
        start, model_state = shared
        params = self._made("init", self._init, hyper) if self.makes_params else start
        hyper = as_floats_of(params, hyper)
        step = self.step(hyper)
        found = extras(step.loss)
        if self._makes_model_state:
            model_state = self._made("model_state", self._model_state, hyper)
        elif model_state is None and found.state is not None:
            make = getattr(step.loss, "init_state", None)
            if make is None and found.needs_state:
                raise TypeError(
                    "sweep: the loss takes a state: pass model_state=net.init_state(x), for an "
                    "example x."
                )
            model_state = None if make is None else make(example)
        check_model_state(WHERE, step.loss, model_state)
        state = step.init(params, model_state)
        return self._injected_into(state, hyper)

    def key_of(self, hyper: Mapping[str, Any], shared: Any) -> Any:
        """A member's key; None if it has none."""
        if callable(self._key):
            return arguments.key(WHERE, "key", self._made("key", self._key, hyper))
        if shared is not None:
            return shared
        return jax.random.key(hyper["seed"]) if self.has_key else None

    # ---------------------------------------------------------------------------- their names

    def refuse_unused(self, names: Collection[str]) -> None:
        """Raise: these hyperparameters have no use."""
        makers = {
            "loss": self._loss,
            "optimizer": self._optimizer,
            "init": self._init,
            "key": self._key,
            "model_state": self._model_state,
            "validation_loss": self._validation_loss,
        }
        known = [
            f"{what} takes ({', '.join(p.name for p in arguments.parameters(f) or [])})"
            for what, f in makers.items()
            if callable(f) and not isinstance(f, TrainStep)
        ]
        raise ValueError(
            f"sweep: the axis {listed(list(names))} is used by nothing: {', '.join(known)}, and "
            "the optimiser's state has no injected hyperparameter of that name "
            "(optax.inject_hyperparams)."
        )

    def _check_seeds(self, axes: Axes) -> None:
        if not all(map(is_integer, axes.values("seed"))):
            raise TypeError(
                "sweep: the axis 'seed' makes each member's key, jax.random.key(seed), so it must "
                f"hold integers, but holds {listed(axes.values('seed'))}. (Or pass key=...)"
            )

    def _look_at_loss(self, name: str, loss: Any, names: Collection[str]) -> bool:
        """Whether it is a function of hyperparameters alone; else check that it is a loss."""
        if isinstance(loss, TrainStep) and name == "loss":
            return False
        form = "a loss(params, example), a TrainStep, or a function of hyperparameters"
        arguments.function(WHERE, name, loss, form)
        required = _required(loss)
        taken = _taken(loss, names)
        if required and all(n in names for n in required):
            self._used |= set(taken)
            return True
        bound = functools.partial(loss, **dict.fromkeys(_extra(loss, names)))
        check_loss(WHERE, bound if _extra(loss, names) else loss, name)
        self._used |= set(_extra(loss, names))
        return False

    def _look_at_maker(
        self,
        name: str,
        function: Any,
        names: Collection[str],
        is_it: Callable[[Any], bool],
        what: str,
    ) -> bool:
        """Whether it is a function of hyperparameters, and not the thing itself."""
        if is_it(function):
            return False
        form = f"{what}, or a function of hyperparameters that returns it"
        if isinstance(function, type):
            raise TypeError(f"sweep: {name} must be {form}, but got {arguments.show(function)}.")
        arguments.function(WHERE, name, function, form)
        unknown = [n for n in _required(function) if n not in names]
        if unknown:
            raise TypeError(
                f"sweep: {name} must be {form}, but {arguments.name_of(function)} wants "
                f"{', '.join(unknown)}, and the axes are {', '.join(names)}."
            )
        self._used |= set(_taken(function, names))
        return True

    def _made(self, name: str, function: Callable, hyper: Mapping[str, Any]) -> Any:
        given = {n: hyper[n] for n in _taken(function, hyper)}
        with _told_of_static(name, given):
            return function(**given)

    def _bound(self, loss: Loss, hyper: Mapping[str, Any]) -> Loss:
        """The loss, given the hyperparameters that it names beside its own arguments."""
        given = {n: hyper[n] for n in _extra(loss, hyper)}
        return functools.partial(loss, **given) if given else loss

    def _injected_into(self, state: State, hyper: Mapping[str, Any]) -> State:
        wanted = {name: hyper[name] for name in self.injected}
        found: set[str] = set()
        opt_state = _inject(state.opt_state, wanted, found)
        unused = [name for name in self.injected if name not in found]
        if unused:
            self.refuse_unused(unused)
        return state._replace(opt_state=opt_state)


def as_floats_of(params: Any, hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters that are traced floats, in the parameters' widest dtype.

    A Python number of a `fit` takes the dtype of what it meets; an array would widen it.
    """
    kinds = [x.dtype for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.inexact)]
    dtype = jnp.finfo(widest(jnp.float32, *kinds)).dtype  # of complex numbers that of their parts

    def of(x):
        is_float = isinstance(x, (jax.Array, np.ndarray)) and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if is_float else x

    return {name: of(x) for name, x in hyper.items()}


def _is_optimizer(x: Any) -> bool:
    return not isinstance(x, type) and all(
        callable(getattr(x, part, None)) for part in ("init", "update")
    )


def _inject(opt_state: Any, values: Mapping[str, Any], found: set[str]) -> Any:
    """Set the hyperparameters that `optax.inject_hyperparams` keeps in its state.

    Those that follow a schedule are computed anew at each step: to set them changes nothing.
    """

    def at(x):
        if not _holds_hyperparameters(x):
            return x
        scheduled = getattr(x, "hyperparams_states", {})
        own = {n: v for n, v in x.hyperparams.items() if n in values and n not in scheduled}
        found.update(own)
        new = {n: _like(old, values[n]) for n, old in own.items()}
        inner = _inject(x.inner_state, values, found)
        return x._replace(hyperparams={**x.hyperparams, **new}, inner_state=inner)

    return jax.tree.map(at, opt_state, is_leaf=_holds_hyperparameters)


def _like(old: Any, value: Any) -> jax.Array:
    """The value in the old one's dtype; a float in one of its own where that is an integer's."""
    old, value = jnp.asarray(old), jnp.asarray(value)
    is_whole = jnp.issubdtype(old.dtype, jnp.integer)
    return (
        value
        if is_whole and jnp.issubdtype(value.dtype, jnp.floating)
        else (value.astype(old.dtype))
    )


def _holds_hyperparameters(x: Any) -> bool:
    return isinstance(getattr(x, "hyperparams", None), dict) and hasattr(x, "inner_state")


def _required(function: Callable) -> list[str]:
    """The arguments that must be given."""
    gathers = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = arguments.parameters(function) or []
    return [p.name for p in found if p.default is p.empty and p.kind not in gathers]


def _taken(function: Callable, names: Collection[str]) -> list[str]:
    """The hyperparameters that a function names; all of them, if it gathers keywords."""
    found = arguments.parameters(function) or []
    if any(p.kind is p.VAR_KEYWORD for p in found):
        return list(names)
    own = {p.name for p in found if p.kind is not p.POSITIONAL_ONLY}
    return [name for name in names if name in own]


def _extra(loss: Loss, names: Collection[str]) -> list[str]:
    """The hyperparameters that a loss names behind `params` and `example`."""
    found = (arguments.parameters(loss) or [])[2:]
    own = {p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return [name for name in names if name in own]


@contextlib.contextmanager
def _told_of_static(name: str, given: Mapping[str, Any]) -> Iterator[None]:
    """A note to errors from a function of hyperparameters: what is traced, and how it isn't."""
    try:
        yield
    except Exception as error:
        traced = [n for n, x in given.items() if isinstance(x, jax.core.Tracer)]
        if traced:
            error.add_note(
                f"sweep called {name} with {', '.join(traced)} as traced "
                f"{'arrays' if len(traced) > 1 else 'array'}, so that one program trains every "
                "member. If it needs a number of Python's there (a width, a count, a seed of "
                f"numpy's), name that static: sweep(..., static={traced[-1]!r})."
            )
        raise
