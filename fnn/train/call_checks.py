"""What `fit` is called with, checked before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fnn import arguments
from fnn.train.checkpoints import Checkpoints, check_checkpoints
from fnn.train.early_stopping import EarlyStopping, check_early_stopping
from fnn.train.learning_rate import scheduled
from fnn.train.loss import Loss, check_loss, check_model_state, extras
from fnn.train.outcome import NONFINITE
from fnn.train.result import annotate
from fnn.train.state import State, check_not_donated, check_optimizer
from fnn.train.step import TrainStep


def step_of(loss: Any, optimizer: Any, options: dict[str, Any], check: bool) -> TrainStep:
    """The step that is given, or the one of a loss and an optimiser.

    Args:
        loss: a loss, or a `TrainStep`.
        optimizer: an optax transformation; None with a TrainStep.
        options: those of `train_step`.
        check: see `fit`.

    Raises:
        TypeError: an optimiser or an option is given beside a TrainStep.
    """
    if not isinstance(loss, TrainStep):
        check_loss("fit", loss)
        check_optimizer("fit", optimizer)
        arguments.choice("fit", "nonfinite", options["nonfinite"], NONFINITE)
        return TrainStep(loss, optimizer, check=check, **options)
    defaults = inspect.signature(TrainStep).parameters
    given = [name for name, value in options.items() if value != defaults[name].default]
    if optimizer is not None or given:
        raise TypeError(
            f"fit: {', '.join(given) or 'optimizer'} is given beside a TrainStep, which has its "
            "own: give it to train_step."
        )
    return loss


def check_call(
    loss: Loss,
    params: Any,
    *,
    flags: dict[str, Any],
    key: Any,
    model_state: Any,
    checkpoints: Checkpoints | None,
    validates: bool,
    validation_loss: Loss | None,
    early_stopping: EarlyStopping | None,
    schedule: Callable | None,
    after_epoch: Callable | None,
) -> None:
    """Raise unless the arguments of `fit` are of their kinds, and fit each other.

    Args:
        flags: those that are True or False, by name.
        validates: whether there are data for validation.
        (The others are `fit`'s.)
    """
    if isinstance(params, State):
        check_not_donated(params)
    else:
        arguments.no_result("fit", "params", params)
    for name, value in flags.items():
        arguments.flag("fit", name, value)
    if key is not None:
        arguments.key("fit", "key", key)
    if checkpoints is not None:
        check_checkpoints(checkpoints, validates)
    if validation_loss is not None:
        check_loss("fit", validation_loss, "validation_loss")
        if not validates:
            raise ValueError("fit: validation_loss is given, but no data for it: validation=...")
    if early_stopping is not None:
        check_early_stopping(early_stopping, validates)
    if schedule is not None:
        arguments.function("fit", "schedule", schedule, "a function of the number of steps")
        try:
            scheduled(schedule, 0)
        except Exception as error:
            annotate(error, "(fnn.fit: schedule was called with the number of steps before, 0.)")
            raise
    if after_epoch is not None:
        form = "a function after_epoch(epoch, state, record)"
        arguments.function("fit", "after_epoch", after_epoch, form)
    if extras(loss).needs_key and key is None:
        raise TypeError("the loss takes a key, loss(params, example, key): pass key=... to fit.")
    check_model_state("fit", loss, model_state)
    if isinstance(params, State) and model_state is not None:
        raise TypeError("fit: params is a training State, which has a model_state: give only one.")
