"""What the benchmarks share: fair timing on a busy machine, and tables."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, seconds: float = 0.02
) -> dict[str, list[float]]:
    """Seconds that one call of each function takes, one sample in each round.

    The functions take turns, in an order drawn anew for each round, so that whatever else the
    machine does, and what the one before left in the caches, meets all of them. A sample is
    the mean of as many calls as fit into `seconds` (at least one). Each function must wait
    for its result at the end of a call or, if it has an attribute `wait`, there.
    """
    calls = {}
    for name, function in functions.items():
        _sample(function, 1)
        calls[name] = max(1, round(seconds / min(_sample(function, 1) for _ in range(3))))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        draw = random.Random(0)
        for _ in range(rounds):
            for name in draw.sample(list(functions), len(functions)):
                samples[name].append(_sample(functions[name], calls[name]))
    finally:
        gc.enable()
    return samples


def _sample(function, calls: int) -> float:
    wait = getattr(function, "wait", lambda: None)
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    wait()
    return (time.perf_counter() - start) / calls


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def ratios(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Round by round: each sample over the reference's sample of the same round."""
    return [a / b for a, b in zip(samples, reference, strict=True)]


def milliseconds(samples: Sequence[float]) -> str:
    """Their median."""
    return f"{1e3 * statistics.median(samples):.2f}"


def ratio(samples: Sequence[float], reference: Sequence[float]) -> str:
    """The median of the ratios round by round."""
    return f"{statistics.median(ratios(samples, reference)):.2f}"


def compiled(function: Callable, *args):
    return jax.jit(function).lower(*args).compile()


def installed(module: str, line: str) -> bool:
    """Can it be imported? If not, the line that installs it, or what importing it raises."""
    if importlib.util.find_spec(module) is None:
        print(f"{module} is left out: {line}", file=sys.stderr)
        return False
    try:
        importlib.import_module(module)
    except Exception as error:  # installed, but not for this JAX
        print(f"{module} is left out: importing it raises {error!r}", file=sys.stderr)
        return False
    return True


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """Rows of text under heads: aligned columns, or a Markdown table."""
    widths = [max(len(r[i]) for r in (heads, *rows)) for i in range(len(heads))]

    def line(cells):
        aligned = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(_with(cells))]
        return f"| {' | '.join(aligned)} |" if markdown else "  ".join(aligned).rstrip()

    def _with(cells):
        return zip(cells, widths, strict=True)

    rule = [("-" * w) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    under = f"| {' | '.join(rule)} |" if markdown else "  ".join("-" * w for w in widths)
    return "\n".join([line(heads), under, *map(line, rows)])


def machine() -> str:
    """The processor, its cores, and the versions that matter."""
    name = platform.processor()
    try:
        with open("/proc/cpuinfo") as f:
            name = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    device = jax.devices()[0]
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{name}, {os.cpu_count()} cores{load}; {device.platform} {device.device_kind}; "
        f"Python {platform.python_version()}, JAX {jax.__version__}"
    )
