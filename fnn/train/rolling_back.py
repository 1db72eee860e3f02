"""Back to the last kept state after a bad step, and on behind its batch."""

from __future__ import annotations

from typing import Any

from fnn.train.calls import Calls
from fnn.train.chunks import Chunk
from fnn.train.nonfinite import NonFiniteError
from fnn.train.result import Work

# How often in an epoch, before it is given up.
MOST = 3


class RollingBack:
    """Calls of the device that end a bad step by going back, a few times in an epoch.

    Parameters, optimiser and all else of the state become those of the last state that `fit` kept:
    of an epoch's end, or of the start. The data go on behind the bad batch: what came between isn't
    made again. (So did Chowdhery et al., "PaLM", 2022, section 5.1, after spikes of the loss.)

    Args:
        calls: see `Calls`.
        active: whether to go back at all; else an error passes through.
    """

    def __init__(self, calls: Calls, active: bool):
        self._calls, self._active = calls, active
        self._in_epoch = 0

    def __call__(self, work: Work, chunk: Chunk, at: int) -> int:
        """As of `Calls`; a batch whose step was bad counts as done."""
        before = work.log.count
        try:
            return self._calls(work, chunk, at)
        except NonFiniteError as error:
            if not self._active:
                raise
            if self._in_epoch == MOST:
                times = f"{MOST} times in this epoch"
                error.add_note(f"(fnn.fit: it had gone back to the last kept state {times}.)")
                raise
            work.roll_back()
            self._in_epoch += 1
            return work.log.count - before

    def of_epoch(self) -> dict[str, Any]:
        """What an epoch's record says of it: how often it went back."""
        count, self._in_epoch = self._in_epoch, 0
        return {"rolled_back": count} if self._active else {}
