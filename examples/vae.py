"""A variational autoencoder of handwritten digits: a plane of which every point is a digit.

    python examples/vae.py            about half a minute on two cores
    python examples/vae.py --quick    a few seconds, to see that it runs

The data are scikit-learn's 1797 digits of 8x8 pixels, a fifth of them kept for testing. The
encoder makes of a digit a normal distribution over points z of a plane, the decoder of a point the
probability of each pixel to be dark. They are trained to raise the evidence lower bound (ELBO) of
Kingma and Welling (2014). In the folder out/ you find afterwards

    vae.png    the test digits as points of the plane; the digits that the decoder sees at points of
               a grid over the plane; test digits and their reconstructions; digits of its own,
               decoded from random points
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from fnn.layers import Network, training
from fnn.models import decode, negative_elbo, vae

try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    line = 'pip install "scikit-learn>=1.5" "matplotlib>=3.9"'
    raise SystemExit(f"{error}. For this example: {line}") from None

EPOCHS = 300
LATENT = 2
HIDDEN = 256
BATCH = 64
LEARNING_RATE = 2e-3


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training images `(1437, 8, 8)` from 0 to 1, test images `(360, 8, 8)`, and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8)
    train, test, _, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return train, test, test_labels


def independent_pixels(train: np.ndarray, test: np.ndarray) -> float:
    """The bound, in nats, of a model that knows each pixel's mean alone."""
    p = np.clip(train.mean(axis=0), 1e-3, 1 - 1e-3)
    each = test * np.log(p) + (1 - test) * np.log(1 - p)
    return float(each.sum(axis=(1, 2)).mean())


def bound(model: Network, params: dict, images: np.ndarray, key: jax.Array) -> float:
    """The mean ELBO in nats, z drawn 16 times for each image."""

    def one(key, image):
        def drawn(key):
            return negative_elbo(model(params, image, mode=training(key)), image)

        return -jnp.mean(jax.vmap(drawn)(jax.random.split(key, 16)))

    return float(jnp.mean(jax.jit(jax.vmap(one))(jax.random.split(key, len(images)), images)))


def tiles(images: Any, rows: int) -> np.ndarray:
    """Images `(rows · columns, 8, 8)` side by side, with a margin between them."""
    padded = np.pad(np.asarray(images), ((0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    grid = padded.reshape(rows, -1, *padded.shape[1:])
    return grid.transpose(0, 2, 1, 3).reshape(rows * padded.shape[1], -1)[:-1, :-1]


def draw(model: Network, params: dict, test: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """The plane in points and in digits, reconstructions, and digits of the model's own."""
    see = jax.jit(jax.vmap(lambda z: decode(model, params, z)))
    means = jax.jit(jax.vmap(lambda x: model(params, x).mean))(test)
    figure = Figure(figsize=(12, 8), layout="constrained")
    (points, plane), (pairs, own) = figure.subplots(2, 2, height_ratios=(4, 1))
    for digit in range(10):
        points.scatter(*means[labels == digit].T, s=12, color=f"C{digit}", label=str(digit))
    points.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    points.set(title="test digits: the means of q(z|x)", xlabel="z₁", ylabel="z₂", aspect="equal")

    # Points that divide the plane into cells of equal probability.
    at = np.array([NormalDist().inv_cdf((i + 0.5) / 18) for i in range(18)], "float32")
    z2, z1 = np.meshgrid(at[::-1], at, indexing="ij")
    plane.imshow(tiles(see(np.stack([z1.ravel(), z2.ravel()], axis=-1)), 18), cmap="Greys")
    plane.set(title="the decoder's digits over the plane", xlabel="z₁", ylabel="z₂")

    chosen = test[:12]
    pairs.imshow(tiles(np.concatenate([chosen, see(means[:12])]), 2), cmap="Greys")
    pairs.set(title="test digits, and their reconstructions")
    z = jax.random.normal(jax.random.key(1), (36, LATENT))
    own.imshow(tiles(see(z), 3), cmap="Greys")
    own.set(title="digits of its own: z drawn from N(0, 1)")
    for axes in (plane, pairs, own):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 epochs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    arguments = parser.parse_args()
    began = time.perf_counter()
    epochs = 20 if arguments.quick else EPOCHS
    arguments.out.mkdir(parents=True, exist_ok=True)

    train, test, labels = load()
    model = vae((8, 8), LATENT, HIDDEN)
    params = model.init(jax.random.key(0), train[0])
    steps = epochs * -(-len(train) // BATCH)
    result = fnn.fit(
        fnn.supervised(model, negative_elbo),
        params,
        (train, train),  # each image is its own target
        optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps)),
        epochs=epochs,
        batch_size=BATCH,
        key=jax.random.key(1),
    )
    params = result.params
    elbo = bound(model, params, test, jax.random.key(2))
    print(f"ELBO of {len(test)} test digits: {elbo:.2f} nats")
    print(f"    pixels independent of each other: {independent_pixels(train, test):.2f} nats")
    draw(model, params, test, labels, arguments.out / "vae.png")
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} seconds. The picture is in {arguments.out}{os.sep}")


if __name__ == "__main__":
    main()
