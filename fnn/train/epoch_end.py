"""What is done at an epoch's end: validation, the display, logs, the user's function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from fnn import arguments
from fnn.logs import Logs
from fnn.sharding import Layout
from fnn.train.checks import check_values
from fnn.train.data import Arrays, batches_of, is_tree_of_arrays
from fnn.train.evaluation import evaluation_of
from fnn.train.events import Listener
from fnn.train.loss import Loss, extras
from fnn.train.progress import Progress
from fnn.train.result import Work
from fnn.train.state import State


class Shown(Listener):
    """Has the display show what there is."""

    def __init__(self, display: Progress):
        self._display = display

    def call_over(self, work: Work) -> None:
        self._display.step(work.epoch, work.batch, work.log.latest)

    def epoch_over(self, work: Work, epoch: int, record: dict[str, Any]) -> None:
        self._display.epoch(epoch, record)


class Logged(Listener):
    """Writes the records down."""

    def __init__(self, books: Logs):
        self._books = books

    def begin(self, work: Work) -> None:
        self._books.begin(work.epoch)

    def epoch_over(self, work: Work, epoch: int, record: dict[str, Any]) -> None:
        self._books.write(epoch, work.seen, record)


class AfterEpoch(Listener):
    """Calls a function, which may end training."""

    def __init__(self, function: Callable):
        self._function = function

    def epoch_over(self, work: Work, epoch: int, record: dict[str, Any]) -> bool:
        found = self._function(epoch, work.state, record)
        try:
            return bool(found)
        except (TypeError, ValueError):  # of several entries
            raise TypeError(
                "fit: after_epoch must return whether training ends, True or False, but returned "
                f"{arguments.show(found)}."
            ) from None


def validation_of(
    stack: contextlib.ExitStack,
    data: Any,
    loss: Loss,
    state: State,
    batch_size: int | None,
    epochs: int,
    key: Any,
    check: bool,
    layout: Layout | None,
) -> Callable[[State], dict[str, Any]]:
    """A function from the state to the validation's part of an epoch's record.

    Args:
        stack: closed when training is over.
        data: arrays or batches, or None for no validation.
        state: the first.
        (The others are `fit`'s, and the validation's key.)

    Raises:
        TypeError, ValueError: the data or the key don't fit the loss.
    """
    if data is None:
        return lambda state: {}
    draws = extras(loss).needs_key
    if draws and key is None:
        raise TypeError("the validation loss takes a key: pass key=... to fit.")
    size = batch_size if is_tree_of_arrays(data) else None
    source = batches_of(
        "fit", data, batch_size=size, shuffle=False, epochs=epochs, name="validation"
    )
    evaluation = stack.enter_context(evaluation_of(loss))
    if check and isinstance(source, Arrays):  # before training begins, and no more
        check_values(
            evaluation.find_labels,
            state.params,
            source.data,
            key if draws else None,
            state.model_state,
            "validation",
        )
        check = False

    def validate(state):
        means = evaluation.means(
            state.params, state.model_state, source, key, check, "validation", layout
        )
        return {f"validation_{name}": value for name, value in means.items()}

    return validate
