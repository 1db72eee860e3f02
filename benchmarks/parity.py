"""`fnn.value_and_grad` against `jax.value_and_grad` on the zoo of models (tests/zoo.py).

    python benchmarks/parity.py [--batch 32] [--only mlp lstm] [--rounds 15] [--markdown]

Each number is a ratio, ours to JAX's: below 1 we do less. FLOPs, exp (calls of exp, tanh and
the like) and temporary bytes are the compiler's own count, exact and repeatable. Trace is the
processor time from the Python function to StableHLO, compile that from there to machine code
(the smaller of two), step the time of a call (the median over rounds in turn).
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time

import jax
from measure import interleaved, machine, ratios, table

import fnn

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
from zoo import ZOO

LIBRARIES = {"jax": jax.value_and_grad, "fnn": fnn.value_and_grad}


def compare(name: str, batch: int, rounds: int, repeats: int = 3) -> dict[str, float]:
    """The ratios fnn / jax for one model."""
    loss, params, data = ZOO[name]("float32", batch)
    times: dict = {(kind, library): [] for kind in ("trace", "compile") for library in LIBRARIES}
    compiled = {}
    # The first tracing of all fills caches of jax.numpy's own functions, for either library.
    jax.jit(jax.value_and_grad(loss)).lower(params, *data)
    for _ in range(repeats):
        for library, value_and_grad in LIBRARIES.items():
            start = time.process_time()
            lowered = jax.jit(value_and_grad(loss)).lower(params, *data)
            middle = time.process_time()
            compiled[library] = lowered.compile()
            times["trace", library].append(middle - start)
            times["compile", library].append(time.process_time() - middle)

    def step(program):
        return lambda: jax.block_until_ready(program(params, *data))

    samples = interleaved({k: step(c) for k, c in compiled.items()}, rounds, seconds=0.005)
    cost = {k: c.cost_analysis() for k, c in compiled.items()}
    memory = {k: c.memory_analysis().temp_size_in_bytes for k, c in compiled.items()}
    both = {k: sum(min(times[t, k]) for t in ("trace", "compile")) for k in LIBRARIES}

    def ratio(of):
        return of["fnn"] / of["jax"] if of["jax"] else float(of["fnn"] > 0)

    return {
        "FLOPs": ratio({k: c.get("flops", 0) for k, c in cost.items()}),
        "exp": ratio({k: c.get("transcendentals", 0) for k, c in cost.items()}),
        "bytes": ratio(memory),
        "trace": ratio({k: min(times["trace", k]) for k in LIBRARIES}),
        "compile": ratio({k: min(times["compile", k]) for k in LIBRARIES}),
        "both": ratio(both),
        "step": statistics.median(ratios(samples["fnn"], samples["jax"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=2, help="compilations of each")
    parser.add_argument("--only", nargs="*", choices=list(ZOO), default=list(ZOO), metavar="MODEL")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()

    rows, found = [], []
    for name in options.only:
        found.append(compare(name, options.batch, options.rounds, options.repeats))
        rows.append(
            [name, *(f"{r:.3f}" if k in EXACT else f"{r:.2f}" for k, r in found[-1].items())]
        )
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    heads = ["fnn / jax", *found[0]]
    for label, statistic in (("median", statistics.median), ("largest", max)):
        rows.append([label, *(f"{statistic([f[h] for f in found]):.3f}" for h in heads[1:])])
    print(machine())
    print(table(heads, rows, options.markdown))


EXACT = ("FLOPs", "exp", "bytes")

if __name__ == "__main__":
    main()
