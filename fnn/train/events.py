"""Who is told how training goes: the display, what saves the work, what ends it early."""

from __future__ import annotations

from typing import Any

from fnn.train.result import FitResult, Work


class Listener:
    """Told of the events of a training, in the thread of `fit`. Each method may do nothing.

    `work` is the book that `fit` keeps: `work.state`, `work.epoch`, `work.batch`, `work.log`. The
    state's buffers are only good until the method returns: copy what is kept. What a method
    raises ends the training, and passes through `fit` with the result so far.
    """

    def begin(self, work: Work) -> None:
        """Training begins, with `work.state`."""

    def call_over(self, work: Work) -> None:
        """The device is done with one or many steps."""

    def epoch_over(self, work: Work, epoch: int, record: dict[str, Any]) -> bool | None:
        """An epoch is over, and its record in the history. True ends training."""
        return None

    def end(self, work: Work, result: FitResult) -> None:
        """Training ends, also by Ctrl-C; not if it raised."""

    def failed(self, work: Work, result: FitResult, error: BaseException) -> None:
        """Training raised; the error goes on its way afterwards."""


class Listeners:
    """All of them, told in turn."""

    def __init__(self, *listeners: Listener):
        self._listeners = listeners

    def begin(self, work: Work) -> None:
        for listener in self._listeners:
            listener.begin(work)

    def call_over(self, work: Work) -> None:
        for listener in self._listeners:
            listener.call_over(work)

    def epoch_over(self, work: Work, epoch: int, record: dict[str, Any]) -> bool:
        """Tell all; is there one who ends training?"""
        ends = [bool(each.epoch_over(work, epoch, record)) for each in self._listeners]
        return any(ends)

    def end(self, work: Work, result: FitResult) -> None:
        for listener in self._listeners:
            listener.end(work, result)

    def failed(self, work: Work, result: FitResult, error: BaseException) -> None:
        for listener in self._listeners:
            listener.failed(work, result, error)
