"""The machine: its cores, and its free memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import jax


def cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def free_bytes() -> int | None:
    """The free memory of the device that computes, in bytes; None where it isn't told."""
    device = jax.local_devices()[0]
    with contextlib.suppress(Exception):
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    free = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        with open("/proc/meminfo") as lines:
            line = next(line for line in lines if line.startswith("MemAvailable:"))
        free.append(1024 * int(line.split()[1]))
    with contextlib.suppress(OSError, ValueError):  # a container's own limit
        group = Path("/sys/fs/cgroup")
        most, now = (group / f"memory.{name}" for name in ("max", "current"))
        free.append(int(most.read_text()) - int(now.read_text()))
    return max(0, min(free)) if free else None
