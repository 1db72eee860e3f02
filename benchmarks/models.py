"""A step of training of five models: fnn against Flax, Equinox, Haiku and PyTorch.

    python benchmarks/models.py [--model lenet resnet vit gpt lstm] [--rounds 15]
                                [--only PEER ...] [--keep-memory] [--torch-compile] [--markdown]

The models are in `peers/`: each as a user of its library writes it, float32, Adam, the mean
cross-entropy of a batch. All run in one process and take turns. `ms` is the median time of a
step with its quartiles; `/ fnn` the median, round by round, of its ratio to fnn's: above 1 the peer
is slower. `temporaries` is what the compiled step needs beside its arguments and results.
"fnn, unrolled" is fnn's GPT without a loop over its blocks (`unroll=`). `--keep-memory` calls
`fnn.keep_memory` first, which serves all libraries in the process.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from typing import Any

import jax
from measure import installed, interleaved, machine, quartiles, ratios, table
from peers import MODELS, Training, data

import fnn

LIBRARIES = {
    "fnn": ("fnn", "of_fnn"),
    "fnn, unrolled": ("fnn", "of_fnn"),
    "Flax NNX": ("flax", "of_nnx"),
    "Flax Linen": ("flax", "of_linen"),
    "Equinox": ("equinox", "of_equinox"),
    "Haiku": ("haiku", "of_haiku"),
    "PyTorch": ("torch", "of_torch"),
    "PyTorch, compiled": ("torch", "of_torch"),
}
BATCH = {"lenet": 64, "resnet": 8, "vit": 8, "gpt": 8, "lstm": 16}


def prepare(library: str, model: str) -> Training:
    options: dict[str, Any] = {"compiled": True} if library.endswith("compiled") else {}
    if library.endswith("unrolled"):
        options["unrolled"] = True
    module = importlib.import_module(f"peers.{LIBRARIES[library][1]}")
    return module.training(model, **options)


def loop(training: Training, x: Any, y: Any):
    """The body of a training loop."""
    now = [training.state]

    def body():
        now[0] = training.step(now[0], x, y)

    body.wait = lambda: jax.block_until_ready(now[0])
    return body


def temporaries(training: Training, x: Any, y: Any) -> str:
    """Megabytes, as the compiler counts them."""
    if not hasattr(training.step, "lower"):
        return "-"
    memory = training.step.lower(training.state, x, y).compile().memory_analysis()
    return f"{memory.temp_size_in_bytes / 1e6:.1f} MB"


def compare(model: str, rounds: int, names: list[str]) -> list[list[str]]:
    """The rows of one model's table."""
    bodies, bytes_of, counts = {}, {}, {}
    for name in names:
        print(f"{model}: preparing {name}", file=sys.stderr, flush=True)
        training = prepare(name, model)
        x, y = training.inputs(*data(model, BATCH[model]))
        bytes_of[name], counts[name] = temporaries(training, x, y), training.parameters
        bodies[name] = loop(training, x, y)
    samples = interleaved(bodies, rounds)
    rows = []
    for name, found in samples.items():
        low, middle, high = (1e3 * t for t in quartiles(found))
        ratio = statistics.median(ratios(found, samples["fnn"])) if "fnn" in samples else 0.0
        spread = f"{low:.1f} to {high:.1f}"
        cells = f"{counts[name]:,}", f"{middle:.1f}", spread, f"{ratio:.2f}", bytes_of[name]
        rows.append([name, *cells])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", choices=LIBRARIES, metavar="PEER")
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--torch-compile", action="store_true", help="takes minutes to prepare")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    if options.keep_memory:
        fnn.keep_memory()
    names = [
        name
        for name in options.only or LIBRARIES
        if (options.torch_compile or not name.endswith("compiled"))
        and installed(LIBRARIES[name][0], "pip install -e '.[bench]'")
    ]
    print(machine())
    for model in options.model:
        heads = [f"{model}, batch {BATCH[model]}", "parameters", "ms", "quartiles", "/ fnn"]
        own = [name for name in names if model == "gpt" or not name.endswith("unrolled")]
        rows = compare(model, options.rounds, own)
        print(f"\n{table([*heads, 'temporaries'], rows, options.markdown)}", flush=True)


if __name__ == "__main__":
    main()
