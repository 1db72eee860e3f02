"""Ctrl-C and SIGTERM between calls of the device, never inside one.

A call may have taken the state. A KeyboardInterrupt that struck after the call has run and before
its result has a name would lose both.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

GRACE = 1.0


class Terminated(KeyboardInterrupt):
    """SIGTERM, heard as Ctrl-C is."""


class Interrupts:
    """While entered, Ctrl-C waits for the end of a block `with interrupts.held():`.

    Elsewhere it raises a KeyboardInterrupt as always (so does a second Ctrl-C inside the
    block: the step may hang). For a second after it was raised, others are let pass: a hurried
    or bouncing key must not strike what saves the work. Outside the main thread, or where the
    program has a handler of its own for the signal, nothing changes.

    Args:
        terminated: whether SIGTERM, too, is heard, as a `Terminated`.
    """

    def __init__(self, terminated: bool = False):
        self._heard: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
        if terminated:
            self._heard[signal.SIGTERM] = signal.SIG_DFL
        self._holding = False
        self._pending: type[KeyboardInterrupt] | None = None
        self._installed: list[int] = []
        self._raised = -math.inf

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number, default in self._heard.items():
                if signal.getsignal(number) == default:
                    signal.signal(number, self._handle)
                    self._installed.append(number)
        return self

    def __exit__(self, *_):
        while self._installed:
            number = self._installed.pop()
            if signal.getsignal(number) == self._handle:  # else the program has taken it over
                signal.signal(number, self._heard[number])

    def _handle(self, signum, frame):
        if time.monotonic() - self._raised < GRACE:
            return
        kind = Terminated if signum == signal.SIGTERM else KeyboardInterrupt
        if self._holding and self._pending is None:
            self._pending = kind
        else:
            self._raise(kind)

    def _raise(self, kind: type[KeyboardInterrupt]):
        self._pending = None
        self._raised = time.monotonic()
        raise kind

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let the block end before a Ctrl-C inside it is raised.

        If the block raises, that ends what was to be ended, and the Ctrl-C is forgotten: it must
        not strike what saves the work, and take the error's place.
        """
        self._holding = True
        try:
            yield
        except BaseException:
            self._pending = None
            raise
        finally:
            self._holding = False
        if self._pending is not None:
            self._raise(self._pending)
