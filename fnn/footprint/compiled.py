"""The memory of a compiled program, and of the device that it is to run on."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Compiled(NamedTuple):
    """The bytes of a compiled program, on one device, as XLA has laid them out.

    Fields:
        arguments, outputs: of what goes in and comes out.
        aliased: of outputs that take the place of donated arguments.
        temporaries: of all between, what is kept for the backward pass among it.
        peak: of all together, which the device must have while it runs. (XLA lays the temporaries
            out in one block, as large as they are at once at most.)
        code: of the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    code: int


def compiled_memory(compiled: Any) -> Compiled | None:
    """What XLA says of a compiled program (`jax.jit(f).lower(...).compile()`), if it says it."""
    found = None
    with contextlib.suppress(Exception):  # not every backend can tell
        found = compiled.memory_analysis()
    if found is None:
        return None
    arguments, outputs = found.argument_size_in_bytes, found.output_size_in_bytes
    aliased, temporaries = found.alias_size_in_bytes, found.temp_size_in_bytes
    peak = arguments + outputs + temporaries - aliased
    return Compiled(
        arguments, outputs, aliased, temporaries, peak, found.generated_code_size_in_bytes
    )


class Room(NamedTuple):
    """The memory of a device, in bytes.

    Fields:
        total: all that it has for us.
        free: what is free of it.
        of: what to call it.
    """

    total: int
    free: int
    of: str


def room(device: Any = None) -> Room | None:
    """The memory of a device, the first one unless given; None where that can't be known.

    Of a GPU or TPU from `device.memory_stats()`; of a CPU on Linux what the system says is
    available, or the limit of the container if that is less.
    """
    device = jax.local_devices()[0] if device is None else device
    stats = None
    with contextlib.suppress(Exception):
        stats = device.memory_stats()
    if stats and stats.get("bytes_limit"):
        total = int(stats["bytes_limit"])
        return Room(total, total - int(stats.get("bytes_in_use", 0)), str(device))
    return _of_this_machine() if device.platform == "cpu" else None


def free_memory() -> int | None:
    """The bytes that are free on the first device; None where that can't be known."""
    there = room()
    return None if there is None else max(there.free, 0)


def _of_this_machine() -> Room | None:
    try:
        lines = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    kilobytes = {name: int(n) for name, n in re.findall(r"^(\w+):\s+(\d+) kB", lines, re.MULTILINE)}
    if "MemTotal" not in kilobytes or "MemAvailable" not in kilobytes:
        return None
    total, free = 1024 * kilobytes["MemTotal"], 1024 * kilobytes["MemAvailable"]
    total += 1024 * kilobytes.get("SwapTotal", 0)
    limit, used = _container("memory.max"), _container("memory.current")
    if limit is not None and used is not None and limit < total:
        total, free = limit, min(free, limit - used + _cached())
    return Room(total, free, "this machine")


def _container(name: str) -> int | None:
    """A number of the control group that this process runs in, if it has a limit."""
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _cached() -> int:
    """The bytes of files that this group keeps in memory, and gives up when they are needed."""
    try:
        text = (Path("/sys/fs/cgroup") / "memory.stat").read_text()
        return int(re.findall(r"^file (\d+)", text, re.MULTILINE)[0])
    except (OSError, IndexError):
        return 0
