"""What it costs that XLA takes a step's memory from Linux anew each time: pages, processor time.

    python benchmarks/pages.py [--model lenet resnet vit gpt lstm] [--rounds 5] [--markdown]

XLA's CPU client allocates what a program needs besides arguments and results at each call, and
frees it behind. What is larger than 32 MB the C library (glibc) gives back to the kernel, which at
the next call brings in page by page. After `fnn.keep_memory()` glibc keeps it. Each round runs a
step of `models.py` in fnn in two new processes, one without and one with it, in turns.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

from measure import machine, table
from models import BATCH, loop, prepare
from peers import MODELS, data

import fnn

SECONDS = 4


def measure(model: str) -> dict[str, float]:
    """Of a step in this process: milliseconds, page faults, and processor time in ms."""
    body = loop(prepare("fnn", model), *data(model, BATCH[model]))
    for _ in range(3):
        body()
    body.wait()
    before, start, steps = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        body()
        body.wait()
        steps += 1
    after, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - start
    spent = lambda of: of.ru_utime + of.ru_stime
    return {
        "ms": 1e3 * wall / steps,
        "pages": (after.ru_minflt - before.ru_minflt) / steps,
        "system": 1e3 * (after.ru_stime - before.ru_stime) / steps,
        "processor": 1e3 * (spent(after) - spent(before)) / steps,
    }


def in_a_process(model: str, keep: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--inside", model, *(["--keep"] if keep else [])]
    printed = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(printed.stdout.splitlines()[-1])


def row(model: str, without: list[dict[str, float]], kept: list[dict[str, float]]) -> list[str]:
    middle = lambda found, name: statistics.median(x[name] for x in found)
    pairs = list(zip(without, kept, strict=True))
    over = lambda name: statistics.median(b[name] / a[name] for a, b in pairs)
    cells = [model]
    for name, form in (("pages", "{:,.0f}"), ("system", "{:.0f}"), ("ms", "{:.0f}")):
        cells += [form.format(middle(found, name)) for found in (without, kept)]
    return [*cells, f"{over('ms'):.2f}", f"{over('processor'):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--inside", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        if options.keep:
            fnn.keep_memory()
        print(json.dumps(measure(options.inside)))
        return
    rows = []
    for model in options.model:
        without, kept = [], []
        for i in range(options.rounds):
            pair = [(without, False), (kept, True)]
            for found, keep in pair if i % 2 == 0 else pair[::-1]:
                found.append(in_a_process(model, keep))
        rows.append(row(model, without, kept))
    heads = ["pages", "kept", "system ms", "kept", "ms", "kept", "ratio", "processor time"]
    print(f"{machine()}\n{table(['a step', *heads], rows, options.markdown)}")


if __name__ == "__main__":
    main()
