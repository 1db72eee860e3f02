"""Whether a compiled program fits into the device's memory, told before it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from fnn.footprint.compiled import Compiled, Room, compiled_memory, room
from fnn.footprint.kept import Residuals
from fnn.footprint.measure import in_bytes, table
from fnn.frames import warn

_ROWS = 6


def check_fits(
    where: str,
    compiled: Any,
    kept: Callable[[], Residuals],
    advice: Sequence[str],
    device: Any = None,
) -> None:
    """Warn, or raise, if a program is larger than the memory that is there.

    An error where it can't fit, even if nothing else were there: the device would refuse it, and on
    a CPU the system would end the process, with all that it holds. A warning where it doesn't fit
    beside what is there now, since that may be freed before it is needed.

    Args:
        where: the public function.
        compiled: the program.
        kept: what its backward pass keeps; called only if there is something to tell.
        advice: what would help, each a phrase.
        device: where it is to run.

    Raises:
        MemoryError: the program is larger than all of the device's memory.
    """
    size, there = compiled_memory(compiled), room(device)
    if size is None or there is None:
        return
    if size.peak > there.total:
        raise MemoryError(_explained(where, size, there, kept, advice, f"has {_of(there.total)}"))
    # The arguments are there already.
    if size.peak - size.arguments > there.free:
        warn(_explained(where, size, there, kept, advice, f"has {_of(there.free)} free"))


def _of(count: int) -> str:
    return in_bytes(max(count, 0))


def _explained(
    where: str,
    size: Compiled,
    there: Room,
    kept: Callable[[], Residuals],
    advice: Sequence[str],
    has: str,
) -> str:
    lines = [
        f"{where}: the program takes {in_bytes(size.peak)} at its largest (arguments "
        f"{in_bytes(size.arguments)}, temporaries {in_bytes(size.temporaries)}, outputs "
        f"{in_bytes(size.outputs)}), but {there.of} {has}."
    ]
    with contextlib.suppress(Exception):  # the explanation must not stand in the error's way
        found = kept()
        if found.made:
            lines.append(
                f"Its backward pass keeps {in_bytes(found.bytes)} of the forward pass, above all:"
            )
            lines.append(table(found.made, _ROWS))
    lines.append(f"What would help: {'; '.join(advice)}.")
    return "\n".join(lines)
