"""The machine: its cores, and what computes."""

from __future__ import annotations

import os

import jax


def cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def platform() -> str:
    """That of this process's devices: "cpu", "gpu" or "tpu"."""
    return jax.local_devices()[0].platform
