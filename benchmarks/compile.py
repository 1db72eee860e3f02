"""How long a GPT's training step takes to trace and compile, against its depth.

    python benchmarks/compile.py [--blocks 2 12 24 48] [--width 128] [--rounds 1] [--markdown]

Seconds, the least of the rounds. fnn's blocks are one loop over stacked weights (`repeat`), so that
its time doesn't grow with their number; the peers' default is a Python list of blocks.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time

import jax
from measure import installed, machine, table
from peers import data

LIBRARIES = {
    "fnn": ("fnn", "of_fnn"),
    "Flax NNX": ("flax", "of_nnx"),
    "Flax Linen": ("flax", "of_linen"),
    "Equinox": ("equinox", "of_equinox"),
    "Haiku": ("haiku", "of_haiku"),
}
LENGTH = 64


def seconds(module: str, blocks: int, width: int) -> tuple[float, float]:
    """To trace and lower, and to compile."""
    sizes = {"blocks": blocks, "width": width, "heads": 4, "length": LENGTH}
    training = importlib.import_module(f"peers.{module}").training("gpt", **sizes)
    x, y = training.inputs(*data("gpt", 2, LENGTH))
    jax.block_until_ready(training.state)
    jax.clear_caches()
    began = time.perf_counter()
    lowered = training.step.lower(training.state, x, y)
    traced = time.perf_counter()
    lowered.compile()
    return traced - began, time.perf_counter() - traced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", nargs="*", type=int, default=[2, 12, 24, 48])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=LIBRARIES, metavar="PEER")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    print(machine())
    rows = []
    for name in options.only or LIBRARIES:
        package, module = LIBRARIES[name]
        if not installed(package, "pip install -e '.[bench]'"):
            continue
        row = [name]
        for blocks in options.blocks:
            print(f"{name}: {blocks} blocks", file=sys.stderr, flush=True)
            found = [seconds(module, blocks, options.width) for _ in range(options.rounds)]
            trace, build = min(found, key=sum)
            row.append(f"{trace:.1f} + {build:.1f}")
        rows.append(row)
    heads = ["trace + compile, s", *(f"{n} blocks" for n in options.blocks)]
    print(f"\n{table(heads, rows, options.markdown)}", flush=True)


if __name__ == "__main__":
    main()
