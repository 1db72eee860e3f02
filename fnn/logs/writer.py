"""What a log is, and several of them as `fit` uses them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from fnn import arguments
from fnn.frames import warn


@runtime_checkable
class Writer(Protocol):
    """A log: `CSV`, `JSONL`, `TensorBoard`, or one of your own with these three methods."""

    def begin(self, first: int) -> None:
        """Training begins with epoch number `first`: forget what is logged of it and of later ones.

        Called once for each call of `fit`, before anything is computed: what is raised here
        ends the call.
        """

    def write(self, epoch: int, step: int, record: Mapping[str, Any]) -> None:
        """An epoch is over: log it, whole or not at all.

        If this raises, it is called again for the same epoch later.

        Args:
            epoch: its number, from 1.
            step: how many batches there were in all.
            record: its numbers, floats (or arrays, for metrics that are arrays).
        """

    def close(self) -> None:
        """Training is over, well or badly."""


class Logs:
    """Several logs, none of which ends the training that it is of.

    Args:
        where: the public function that was given them, for errors.
        writers: what it was given.

    On many processes the first alone writes.

    Raises:
        TypeError: writers isn't a list of logs.
    """

    def __init__(self, where: str, writers: Any):
        wanted = "a list of logs, such as [fnn.logs.CSV('log.csv')]"
        if isinstance(writers, (str, os.PathLike, Writer)) or not isinstance(writers, Sequence):
            raise TypeError(f"{where}: logs must be {wanted}, but got {arguments.show(writers)}.")
        for i, writer in enumerate(writers):
            if isinstance(writer, type) or not isinstance(writer, Writer):
                raise TypeError(
                    f"{where}: logs must be {wanted}, each with begin, write and close, but "
                    f"logs[{i}] is {arguments.show(writer)}."
                )
        mine = writers if jax.process_index() == 0 else ()
        self._kept: list[tuple[Writer, list]] = [(w, []) for w in mine]
        self._warned: set[int] = set()

    def begin(self, first: int) -> None:
        """Before the first epoch; errors pass through."""
        for writer, _ in self._kept:
            writer.begin(first)

    def write(self, epoch: int, step: int, record: Mapping[str, Any]) -> None:
        """An epoch's record, to all; what failed before is tried first."""
        for i, (writer, waiting) in enumerate(self._kept):
            waiting.append((epoch, step, dict(record)))
            self._drain(i, writer, waiting)

    def close(self) -> None:
        """The end, good or bad."""
        for i, (writer, waiting) in enumerate(self._kept):
            self._drain(i, writer, waiting)
            if waiting:
                _warn(
                    f"{writer!r} has no record of {len(waiting)} epoch"
                    f"{'s' if len(waiting) > 1 else ''} (they are in result.history)."
                )
            with contextlib.suppress(Exception):
                writer.close()

    def _drain(self, i: int, writer: Writer, waiting: list) -> None:
        try:
            while waiting:
                writer.write(*waiting[0])
                del waiting[0]
        except Exception as error:  # whatever it is: training goes on
            if i not in self._warned:
                self._warned.add(i)
                _warn(
                    f"the log {writer!r} could not be written, training goes on, and it is tried "
                    f"again after each epoch: {type(error).__name__}: {error}"
                )


def _warn(text: str) -> None:
    with contextlib.suppress(Exception):  # warnings may be errors, stderr dead
        warn(f"fit: {text}")


def checked_path(where: str, path: Any, wanted: str = "path must be that of a file") -> Path:
    """A path of a file or folder.

    Args:
        where: the public function.
        path: what it was given.
        wanted: the argument, and what it must be.

    Raises:
        TypeError: it isn't one.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise TypeError(f"{where}: {wanted}, but got {arguments.show(path)}.")
    return Path(path)
