"""Which learning rate, and which width? Networks trained together on the digits, by one call.

    python examples/sweep.py            about ten seconds on two cores
    python examples/sweep.py --quick    two seeds, four rates, four epochs

Two-layer networks of two widths with nine learning rates from four seeds each, 72 in all: one
program for each width. In the folder out/ you find afterwards

    sweep_rates.png     validation loss against the learning rate, bands over seeds
    sweep_curves.png    validation loss over the epochs, bands over seeds
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from fnn import ops, plot
from fnn.layers import Linear, chain

try:
    import matplotlib  # noqa: F401
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    line = 'pip install "scikit-learn>=1.5" "matplotlib>=3.9"'
    raise SystemExit(f"{error}. For this example: {line}") from None


def load():
    """Images as vectors and labels: for training, and for validation."""
    images, labels = load_digits(return_X_y=True)
    images = ((images - images.mean()) / images.std()).astype(np.float32)
    labels = labels.astype(np.int32)
    X, Xv, y, yv = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return (X, y), (Xv, yv)


def network(width):
    return chain(hidden=Linear(width), f=ops.relu, output=Linear(10))


def loss_of(width):
    return fnn.supervised(network(width), ops.softmax_cross_entropy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, four rates, four epochs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data, validation = load()
    image = data[0][0]
    seeds, count, epochs = (2, 4, 4) if options.quick else (4, 9, 20)
    rates = jnp.logspace(-4, 0, count)

    found = fnn.sweep(
        loss_of,
        {"seed": range(seeds), "width": [16, 128], "learning_rate": rates},
        data,
        optimizer=lambda learning_rate: optax.adam(learning_rate),
        init=lambda seed, width: network(width).init(jax.random.key(seed), image),
        static="width",
        epochs=epochs,
        validation=validation,
    )
    print(found)
    print(f"\nThe mean over seeds\n{found.mean(over='seed')}")
    best = found.mean(over="seed").best()
    print(f"\nThe best: width {best['width']}, learning rate {best['learning_rate']:.3g}\n")
    plot.against(found, "learning_rate").savefig(options.out / "sweep_rates.png", dpi=110)
    plot.bands(found).savefig(options.out / "sweep_curves.png", dpi=110)


if __name__ == "__main__":
    main()
