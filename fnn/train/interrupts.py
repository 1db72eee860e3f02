"""Ctrl-C between calls of the device, never inside one.

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

GRACE = 1.0


class Interrupts:
    """While entered, Ctrl-C waits for the end of a block `with interrupts.held():`.

    Elsewhere it raises a KeyboardInterrupt as always (so does a second Ctrl-C inside the
    block: the step may hang). For a second after it was raised, others are let pass: a hurried
    or bouncing key must not strike what saves the work. Outside the main thread, or where the
    program has a handler of its own for the signal, nothing changes.
    """

    def __init__(self):
        self._holding = False
        self._pending = False
        self._installed = False
        self._raised = -math.inf

    def __enter__(self) -> Interrupts:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *_):
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._installed = False

    def _handle(self, signum, frame):
        if time.monotonic() - self._raised < GRACE:
            return
        if self._holding and not self._pending:
            self._pending = True
        else:
            self._raise()

    def _raise(self):
        self._pending = False
        self._raised = time.monotonic()
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let the block end before a Ctrl-C inside it is raised."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending:
            self._raise()
