"""A convolutional network on handwritten digits: 99 % without a look at the test digits.

    python examples/digits_convolution.py            under two minutes on two cores
    python examples/digits_convolution.py --quick    a few seconds, to see that it runs

The data are scikit-learn's 1797 digits of 8x8 pixels. A fifth of them is kept for testing and
looked at once, at the end. What there is to choose, whether to train on turned, stretched and
shifted digits, and how much dropout, is chosen on a fifth of the rest. Then networks from three
starts are trained on all the training digits. In the folder out/ you find afterwards

    convolution.png    the first layer's 3x3 weights, what each finds in a digit, and the test
                       digits that the networks get wrong
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from fnn import ops
from fnn.layers import Conv, Dropout, Layer, Linear, MaxPool, chain

try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    line = 'pip install "scikit-learn>=1.5" "matplotlib>=3.9"'
    raise SystemExit(f"{error}. For this example: {line}") from None

EPOCHS = 30
STARTS = 3
BATCH = 64
LEARNING_RATE = 0.005  # of adamw: an epoch of warmup, then falling to zero along a cosine
WEIGHT_DECAY = 0.05
SMOOTHING = 0.1  # of the labels

# These and the amounts of distortion were compared on parts of the training digits.

Data = tuple[jax.Array, jax.Array]  # images (count, 8, 8, 1), float32, and labels 0..9, int32


class Choice(NamedTuple):
    """What is chosen on the validation digits."""

    distort: bool
    dropout: float

    def __str__(self):
        return f"{'distorted' if self.distort else 'as they are'}, dropout {self.dropout}"


CHOICES = (Choice(False, 0.3), Choice(True, 0.3), Choice(True, 0.5))


def split(images: Any, labels: Any, seed: int) -> tuple[Data, Data]:
    """Four fifths and a fifth, with all digits alike in both."""
    a, b, a_labels, b_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    return (a, a_labels), (b, b_labels)


def load() -> tuple[Data, Data]:
    """Training and test digits, scaled by the training pixels' mean and standard deviation."""
    images, labels = load_digits(return_X_y=True)
    train, test = split(images.reshape(-1, 8, 8, 1), labels.astype("int32"), 0)
    mean, deviation = train[0].mean(), train[0].std()
    scaled = lambda data: (jnp.asarray((data[0] - mean) / deviation, "float32"), data[1])
    return scaled(train), scaled(test)


def network(dropout: float) -> Layer:
    return chain(
        conv1=Conv(16, 3),
        relu1=ops.relu,
        conv2=Conv(32, 3),
        relu2=ops.relu,
        pool1=MaxPool(2),
        conv3=Conv(32, 3),
        relu3=ops.relu,
        conv4=Conv(64, 3),
        relu4=ops.relu,
        pool2=MaxPool(2),
        flat=jnp.ravel,
        dropout=Dropout(dropout),
        output=Linear(10),
    )


def distorted(key: jax.Array, image: jax.Array) -> jax.Array:
    """A digit turned by up to 0.15 rad, stretched by up to a tenth, shifted by half a pixel.

    Each pixel takes the value that the image has, linearly between its pixels, at the place that
    comes to lie there; outside is background.
    """
    turn_key, stretch_key, shift_key = jax.random.split(key, 3)
    angle = jax.random.uniform(turn_key, minval=-0.15, maxval=0.15)
    stretch = jnp.exp(jax.random.uniform(stretch_key, (2, 1), minval=-0.1, maxval=0.1))
    shift = jax.random.uniform(shift_key, (2,), minval=-0.5, maxval=0.5)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pixels = jnp.arange(8.0)
    centred = jnp.stack(jnp.meshgrid(pixels - 3.5, pixels - 3.5, indexing="ij"), axis=-1)
    places = centred @ (stretch * jnp.array([[cos, -sin], [sin, cos]])).T + 3.5 + shift
    near = jnp.maximum(0, 1 - jnp.abs(places[..., None] - pixels))  # (8, 8, 2, 8)
    background = jnp.min(image)
    seen = jnp.einsum("ijh,ijw,hwc->ijc", near[:, :, 0], near[:, :, 1], image - background)
    return seen + background


class Trainer:
    """Trains the network of a choice, from any number of starts with the same program."""

    def __init__(self, choice: Choice, count: int, epochs: int):
        """`count`: how many images there are to train on."""
        self.net, self.epochs, self.steps = network(choice.dropout), epochs, count // BATCH

        def loss(params, example, key, mode):
            image, label = example
            if choice.distort:
                image = distorted(key, image)
            scores = self.net(params, image, mode=mode)
            return ops.softmax_cross_entropy(scores, label, label_smoothing=SMOOTHING)

        schedule = optax.warmup_cosine_decay_schedule(
            0.0, LEARNING_RATE, self.steps, epochs * self.steps + 1
        )
        optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
        self.step = fnn.train_step(loss, optimizer, nonfinite="ignore")
        self.epoch = jax.jit(self.one_epoch, donate_argnums=0)

    def one_epoch(self, state: fnn.State, data: Data, key: jax.Array) -> fnn.State:
        """All images in a new order; the scan over the steps is one program."""
        images, labels = data
        order_key, key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(images))[: self.steps * BATCH]

        def one(state, given):
            where, key = given
            state, _ = self.step(state, (images[where], labels[where]), key)
            return state, None

        given = order.reshape(self.steps, BATCH), jax.random.split(key, self.steps)
        return jax.lax.scan(one, state, given)[0]

    def __call__(self, data: Data, start: int) -> dict:
        """The parameters after training."""
        key = jax.random.key(start)
        state = self.step.init(self.net.init(key, data[0][0]))
        for epoch in range(self.epochs):
            state = self.epoch(state, data, jax.random.fold_in(key, epoch))
        return state.params


@jax.jit
def scores(params: dict, images: jax.Array) -> jax.Array:
    return jax.vmap(network(0.0), (None, 0))(params, images)


def accuracy(params: dict, data: Data) -> float:
    images, labels = data
    return float(jnp.mean(jnp.argmax(scores(params, images), axis=-1) == labels))


def draw(params: dict, test: Data, wrong: np.ndarray, path: Path) -> None:
    """The first layer's weights, its responses to a digit, and the digits that are misread."""
    images, labels = test
    first = params["conv1"]
    responses = ops.relu(Conv(16, 3)(first, images[0]))
    guesses = jnp.argmax(scores(params, images[wrong]), axis=-1)
    figure = Figure(figsize=(12, 3), layout="constrained")
    grid = figure.subplots(3, 16)
    limit = float(jnp.max(jnp.abs(first["W"])))
    for i in range(16):
        weights = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
        grid[0, i].imshow(first["W"][i, 0], **weights)
        grid[1, i].imshow(responses[..., i], cmap="Greys")
        if i < len(wrong):
            grid[2, i].imshow(images[wrong[i], ..., 0], cmap="Greys")
            said = f"{labels[wrong[i]]} as {guesses[i]}"
            grid[2, i].set_title(said, fontsize="small")
    for axes in grid.flat:
        axes.axis("off")
    for row, name in enumerate(("weights", "responses", "misread")):
        grid[row, 0].annotate(
            name, (-0.3, 0.5), xycoords="axes fraction", rotation=90, ha="center", va="center"
        )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one epoch, two starts")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    arguments = parser.parse_args()
    began = time.perf_counter()
    epochs, starts = (1, 2) if arguments.quick else (EPOCHS, STARTS)
    arguments.out.mkdir(parents=True, exist_ok=True)

    training, test = load()
    part, validation = split(*training, 1)
    print(fnn.summary(network(0.3), training[0][0]))
    print(f"\nTraining on {len(part[0])} digits, validating on {len(validation[0])}:")
    found = {}
    for choice in CHOICES:
        params = Trainer(choice, len(part[0]), epochs)(part, 0)
        found[choice] = accuracy(params, validation)
        print(f"    {choice!s:<28} {found[choice]:.2%}", flush=True)
    best = max(CHOICES, key=lambda choice: found[choice])

    print(f"Training on all {len(training[0])} ({best}), from {starts} starts:")
    train = Trainer(best, len(training[0]), epochs)
    trained = [train(training, 1 + start) for start in range(starts)]
    results = [accuracy(params, test) for params in trained]
    shown = ", ".join(f"{value:.2%}" for value in results)
    print(f"    accuracy on {len(test[0])} test digits: {shown}; mean {np.mean(results):.2%}")
    images, labels = test
    guesses = jnp.argmax(scores(trained[0], images), axis=-1)
    wrong = np.flatnonzero(guesses != labels)[:16]
    draw(trained[0], test, wrong, arguments.out / "convolution.png")
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} seconds. The picture is in {arguments.out}{os.sep}")


if __name__ == "__main__":
    main()
