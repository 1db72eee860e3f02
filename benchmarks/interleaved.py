"""Timing several contenders in one process, in turns, so that noise falls on all alike."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable

import numpy as np


def interleaved(contenders: dict[str, Callable[[], None]], rounds: int, seconds: float) -> dict:
    """Milliseconds a call, one number a round, for each contender.

    Each contender is a function that does its work and waits for it. In each round every
    contender in turn, in an order that changes, runs for about `seconds`.
    """
    repeats = {}
    for name, run in contenders.items():
        run(), run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, int(seconds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(contenders)):
            run = contenders[name]
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append(1e3 * (time.perf_counter() - start) / repeats[name])
    return {name: np.array(t) for name, t in times.items()}


def table(head: list[str], rows: list[list[str]], markdown: bool) -> str:
    """Rows as an aligned table, or in Markdown."""
    if markdown:
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *rows]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def machine() -> str:
    """The processor, its cores, and the versions that matter."""
    import jax

    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass
    return (
        f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, JAX {jax.__version__}"
    )
