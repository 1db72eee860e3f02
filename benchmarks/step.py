"""One step of training: fnn against its peers and against the bare matrix products.

    python benchmarks/step.py [--network mlp cnn transformer] [--optimizer sgd] [--rounds 40]
                              [--torch-compile] [--only PEER ...] [--markdown]

All run in one process and take turns. `us` is the median time of a step in microseconds, with
the quartiles behind it; `/ products` the median, round by round, of its ratio to the bare matrix
products and convolutions of the same step, which are the physical limit; `/ fnn` of its ratio
to fnn.train_step's time in the same round: above 1 the peer is slower.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import jax.numpy as jnp
import networks
import optax
from measure import interleaved, machine, quartiles, ratios, table

OPTIMIZERS = {"sgd": (optax.sgd, 1e-2), "adam": (optax.adam, 1e-3)}


def compare(network: str, optimizer: str, rounds: int, names: list[str]) -> list[list[str]]:
    """The rows of one network's table."""
    make, rate = OPTIMIZERS[optimizer]
    x, y = networks.data(network)
    steps = {}
    for name in names:
        print(f"{network}: preparing {name}", file=sys.stderr, flush=True)
        if name.startswith("PyTorch"):
            steps[name] = networks.CONTENDERS[name](network, (optimizer, rate), x, y)
        elif name == "Equinox":
            steps[name] = networks.equinox(network, make(rate), x, y)
        else:
            arrays = jnp.asarray(x), jnp.asarray(y)
            steps[name] = networks.CONTENDERS[name](network, make(rate), *arrays)
    samples = interleaved(steps, rounds)
    rows = []
    for name, found in samples.items():
        low, middle, high = (1e6 * t for t in quartiles(found))
        rows.append(
            [
                name,
                f"{middle:.0f}",
                f"{low:.0f} to {high:.0f}",
                *(
                    f"{_ratio(found, samples.get(of)):.2f}"
                    for of in ("bare products", networks.OURS)
                ),
            ]
        )
    return rows


def _ratio(samples, reference) -> float:
    return statistics.median(ratios(samples, reference)) if reference else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--network", nargs="*", default=networks.NETWORKS, choices=networks.NETWORKS
    )
    parser.add_argument("--optimizer", default="sgd", choices=OPTIMIZERS)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", nargs="*", choices=networks.CONTENDERS, metavar="PEER")
    parser.add_argument("--torch-compile", action="store_true", help="takes a minute to prepare")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    names = options.only or [
        name
        for name in networks.CONTENDERS
        if options.torch_compile or not name.endswith("torch.compile")
    ]
    print(machine())
    for network in options.network:
        rows = compare(network, options.optimizer, options.rounds, names)
        heads = [network, "us", "quartiles", "/ products", "/ fnn"]
        print(f"\n{table(heads, rows, options.markdown)}", flush=True)


if __name__ == "__main__":
    main()
